"""Switching the backward of torchdeq's DEQs to a mode and back, and naming the loss that it nudges by."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import Any, Literal, cast

from torch import nn
from torch.utils.hooks import RemovableHandle
from torchdeq.core import DEQBase, DEQIndexing

from torchdeq_ep.errors import EPError, InvalidOptionError, NoDEQError, PluginError
from torchdeq_ep.host.deqs import deqs_of
from torchdeq_ep.host.free_phase import FreePhase
from torchdeq_ep.host.homeostasis import HomeostasisHandle, register_homeostasis
from torchdeq_ep.host.rules import EquilibriumRule, EvaluationHook, Loss, ObservedSolver, PhantomGradient
from torchdeq_ep.modes import ModeLike, Need, NudgeReport, get_backward
from torchdeq_ep.plugins import ADAPTERS, entries, leave_out, load
from torchdeq_ep.relaxation.kept import check_pair
from torchdeq_ep.state import Memory

DEFAULT_BACKWARD = "ep"


class _SwitchedRules(list[Any]):
    """The gradient rules of a switched DEQ, and what they replaced. A copy or pickle of it forgets the latter."""

    def __init__(self, rules: Sequence[Any], below: list[Any] | None = None, solver_below: Any = None) -> None:
        super().__init__(rules)
        self.below, self.solver_below = below, solver_below
        self.hook: RemovableHandle | None = None
        self.removed = False

    def __reduce__(self) -> Any:
        return _SwitchedRules, (list(self),)


class BackwardHandle:
    """What [`use_backward`][torchdeq_ep.use_backward] returns: undoes the switch, at the end of a `with` or on demand.

    Switches may be nested and removed in any order: the latest one still there is in force.

    Args:
        switched: The DEQs with their rules, as `use_backward` switched them.
        names: Their names in the module.

    Example:
        >>> import torch, torchdeq, torchdeq_ep as tep
        >>> deq = torchdeq.get_deq(ift=True)
        >>> with tep.use_backward(deq, "ep"):
        ...     pass  # train here
    """

    def __init__(self, switched: list[tuple[DEQBase, _SwitchedRules]], names: Sequence[str]) -> None:
        self._switched, self._names = switched, tuple(names)
        self._is_removed = False
        self.homeostasis: HomeostasisHandle | None = None
        """The homeostasis that `use_backward` was asked for; it goes with the switch."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {'removed' if self._is_removed else 'in force'}\n{self.summary()}>"

    @property
    def deqs(self) -> tuple[DEQBase, ...]:
        """The DEQs that were switched, in the order of `module.modules()`."""
        return tuple(deq for deq, _ in self._switched)

    @property
    def last(self) -> dict[str, NudgeReport]:
        """The report of the last backward pass of each DEQ that had one, by its name in the module."""
        return {name: rule.slot.report for name, rule in self._rules() if rule.slot.report is not None}

    def summary(self) -> str:
        """What all backward passes so far reported: how many there were, and what each kind of warning counts.

        Returns:
            A paragraph for each DEQ.
        """
        paragraphs = []
        for name, rule in self._rules():
            passes, found = rule.memory.passes, rule.memory.summary()
            head = f"{name or 'the DEQ'}: {passes} backward pass{'' if passes == 1 else 'es'}"
            report = rule.slot.report
            if report is not None:
                head += f", the last with a residual of {report.residual:.1e} after {report.calls} calls"
                head += "".join(f"\n  {line}" for line in [*_accuracy(report, rule.memory), *self._alignment(name)])
            paragraphs.append("\n".join([head, *(f"  {line}" for line in found.splitlines())]))
        return "\n".join(paragraphs)

    def _alignment(self, name: str) -> list[str]:
        """What an automatic homeostasis has reached at a DEQ."""
        measured = self.homeostasis.last if self.homeostasis is not None else None
        alignment = measured.alignment.get(name, math.nan) if measured is not None else math.nan
        if measured is None or math.isnan(alignment):
            return []
        return [
            f"homeostasis: the cosine of its error vector to the exact one was {alignment:.2f} when last measured, the "
            f"weight is {measured.weights[name]:.3g}"
        ]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What each DEQ remembers of its passes: amplitudes, rounding, independence of rows, what was said.

        A run that is resumed with it is the run that was stopped. `torch.save` and `torch.load(weights_only=True)`
        take it.

        Returns:
            Plain values, by the name of the DEQ.
        """
        return {name: rule.memory.state_dict() for name, rule in self._rules()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember what a handle of the same model remembered.

        Args:
            state: As `state_dict` returned it.

        Raises:
            InvalidOptionError: If it is of other DEQs, or no such state.
        """
        rules = dict(self._rules())
        if set(rules) != set(state):
            raise InvalidOptionError(f"the state is one of the DEQs {sorted(state)}, and these are {sorted(rules)}.")
        for name, rule in rules.items():
            rule.memory.load_state_dict(state[name])

    def _rules(self) -> list[tuple[str, EquilibriumRule]]:
        return [(name, rules[-1]) for name, (_, rules) in zip(self._names, self._switched, strict=True)]

    def remove(self) -> None:
        """Give every DEQ the rules back that it had before; a second call does nothing."""
        self._is_removed = True
        if self.homeostasis is not None:
            self.homeostasis.remove()
        for deq, rules in self._switched:
            rules.removed = True
            if rules.hook is not None:
                rules.hook.remove()
            while isinstance(deq.produce_grad, _SwitchedRules) and deq.produce_grad.removed:
                top = deq.produce_grad
                deq.produce_grad = top.below
                if isinstance(deq.f_solver, FreePhase) and top.solver_below is not None:
                    deq.f_solver = top.solver_below

    def __enter__(self) -> BackwardHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _accuracy(report: NudgeReport, memory: Memory) -> list[str]:
    """How good the gradient is, in a sentence each."""
    lines = []
    if memory.certified:
        total, largest = memory.adjoint_residuals
        mean = total / memory.certified
        lines.append(f"residual of the error vector in v = J^T v + g: {mean:.1e} in the mean, {largest:.1e} at most")
    if report.beta and report.is_usable:
        lines.append(f"the finite nudge adds {report.nudge_error:.1e} to it, f rounds by {report.rounding:.1e}")
    return lines


def use_backward(
    module: nn.Module,
    backward: str | ModeLike = DEFAULT_BACKWARD,
    *,
    certificate: bool = True,
    homeostasis: float | Literal["auto"] | None = None,
    **options: Any,
) -> BackwardHandle:
    """Switch every torchdeq DEQ inside a module to another backward pass.

    The forward pass, parameters, buffers, random state and `state_dict` stay as they are. The mode applies to the
    equilibrium; states sampled on the way to it (`n_states`, `indexing`) keep torchdeq's phantom gradient.

    Args:
        module: A model that contains DEQs made by `torchdeq.get_deq`, or such a DEQ.
        backward: Name or spec of a backward mode (`"ep"`, `"hep:n_points=6"`), or a mode.
        certificate: Whether each pass reports its [adjoint residual](certificate.md), which takes one `J^T v` beside
            the gradients of the parameters.
        homeostasis: Weight of a penalty on the asymmetry along the error vector, which then reaches the parameters by
            itself; `"auto"` finds it. See [`register_homeostasis`][torchdeq_ep.register_homeostasis], which is what to
            use with a `GradScaler` or with accumulated gradients.
        **options: Options of the mode, e.g. `tol=1e-4`.

    Returns:
        A handle that restores what was there, at the end of a `with` block or by `handle.remove()`.

    Raises:
        NoDEQError: If there is no DEQ in the module.
        UnknownBackwardError: If no backward mode has that name.
        InvalidOptionError: If the mode has no such option, or the homeostasis no such weight.

    Example:
        >>> import torch, torchdeq, torchdeq_ep as tep
        >>> linear, deq = torch.nn.Linear(3, 3), torchdeq.get_deq(ift=True)
        >>> handle = tep.use_backward(deq, "ep")
        >>> (z,), info = deq(lambda z: 0.5 * torch.tanh(linear(z)), torch.zeros(2, 3))
        >>> z.sum().backward()
        >>> linear.weight.grad.shape
        torch.Size([3, 3])
        >>> handle.remove()
    """
    if isinstance(module, nn.Module) and not any(isinstance(part, DEQBase) for part in module.modules()):
        for adapter in entries(ADAPTERS):
            adapted = _adapted(adapter, module, backward, options)
            if adapted is not None and homeostasis is not None:
                adapted.remove()
                raise InvalidOptionError(
                    f"homeostasis is for the DEQs of torchdeq, and those of {type(module).__name__} are switched by "
                    f"{adapter.value}. Leave it out."
                )
            if adapted is not None:
                return adapted
    mode = get_backward(backward, **options)
    deqs = deqs_of(module)
    names = {part: name for name, part in module.named_modules()}
    handle = BackwardHandle([(deq, switch(deq, mode, certificate)) for deq in deqs], [names[deq] for deq in deqs])
    if homeostasis is not None:
        handle.homeostasis = register_homeostasis(module, homeostasis, estimator="error-vector", inject=True)
    return handle


def _adapted(
    adapter: EntryPoint, module: nn.Module, backward: str | ModeLike, options: Mapping[str, Any]
) -> BackwardHandle | None:
    """The handle of an adapter that knows the layers of a module; a broken one must not keep anybody from training."""
    try:
        adapt = load(adapter)
    except PluginError as error:
        leave_out(adapter, error)
        return None
    try:
        return cast("BackwardHandle | None", adapt(module, backward, **options))
    except EPError:  # its layers are in the module, and cannot be switched as asked
        raise
    except Exception as error:
        leave_out(adapter, error)
        return None


def switch(deq: DEQBase, mode: ModeLike, certificate: bool = True) -> _SwitchedRules:
    """Put a mode in the place of the last gradient rule of a DEQ; `BackwardHandle` undoes it."""
    below: list[Any] = deq.produce_grad
    *earlier, last = [_picklable(rule) for rule in below]
    steps = last if isinstance(last, PhantomGradient) else PhantomGradient()
    rule = EquilibriumRule(mode, steps, certificate)
    solver_below, deq.f_solver = deq.f_solver, _observed(deq, mode, rule)
    rules = _SwitchedRules([*earlier, rule], below, solver_below)
    rules.hook = deq.register_forward_hook(EvaluationHook(rule), with_kwargs=True)
    deq.produce_grad = rules
    return rules


def _observed(deq: DEQBase, mode: ModeLike, rule: EquilibriumRule) -> FreePhase:
    """The solver of a DEQ as its rule needs it: observed for the sake of the mode, its trajectory complete."""
    solver = deq.f_solver
    while isinstance(solver, (FreePhase, ObservedSolver)):
        solver = solver.solver
    need: Need | None = getattr(mode, "needs", None)
    check_pair(solver, need)
    if need is not None:
        solver = ObservedSolver(solver, rule.slot, need)
    return FreePhase(solver, completes=isinstance(deq, DEQIndexing))


def _picklable(rule: Any) -> Any:
    """A phantom rule of torchdeq, which is a closure, as a value; any other rule as it is."""
    if isinstance(rule, EquilibriumRule):
        return rule.steps
    names = inspect.getclosurevars(rule).nonlocals if inspect.isfunction(rule) else {}
    if "n_grad_step" not in names:
        return rule
    return PhantomGradient(
        names["n_grad_step"], names.get("tau", 1.0), names.get("sup_gap", -1), tuple(names.get("sup_loc", ()))
    )


@contextmanager
def nudge_loss(module: nn.Module, loss_of_state: Loss) -> Iterator[None]:
    """Nudge by the loss itself, re-evaluated at the nudged state, in backward passes inside this context.

    This is the papers' form of nudging (arXiv 2309.02214, eq. 4); without it the cotangent at the free state is used
    throughout. Both have the same limit. A factor between `loss_of_state` and the loss that is differentiated does not
    matter; any other difference is warned about.

    Args:
        module: A model whose DEQs have been switched to a mode of equilibrium propagation.
        loss_of_state: The scalar loss as a function of the equilibrium, in the form the DEQ returns it: a tensor, or a
            list of tensors.

    Yields:
        Nothing.

    Raises:
        NoDEQError: If no DEQ in the module has been switched.
        InvalidOptionError: If `loss_of_state` cannot be called.

    Example:
        >>> import torch, torchdeq, torchdeq_ep as tep
        >>> linear, deq = torch.nn.Linear(3, 3), torchdeq.get_deq(core="ep-sliced")
        >>> (z,), info = deq(lambda z: 0.5 * torch.tanh(linear(z)), torch.zeros(2, 3))
        >>> with tep.nudge_loss(deq, lambda z: (z**2).sum()):
        ...     (z**2).sum().backward()
    """
    rules = [rule for deq in deqs_of(module) for rule in deq.produce_grad if isinstance(rule, EquilibriumRule)]
    if not rules:
        raise NoDEQError(
            f"no DEQ inside {type(module).__name__} uses a backward of torchdeq_ep: call "
            "tep.use_backward(module, 'ep') before the forward pass."
        )
    if not callable(loss_of_state):
        raise InvalidOptionError(f"loss_of_state must be a function from the state to a scalar, not {loss_of_state!r}.")
    before = [rule.slot.loss_of_state for rule in rules]
    for rule in rules:
        rule.slot.loss_of_state = loss_of_state
    try:
        yield
    finally:
        for rule, loss in zip(rules, before, strict=True):
            rule.slot.loss_of_state = loss
