"""Switching the backward of torchdeq's DEQs to a mode and back, and naming the loss that it nudges by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq.core import DEQBase, DEQIndexing
from torchdeq.solver.stat import SolverStat

from torchdeq_ep.errors import InvalidOptionError, NoDEQError
from torchdeq_ep.modes import ModeLike, NudgeReport, get_backward
from torchdeq_ep.node import Layer, connect
from torchdeq_ep.state import Autocast, Map, Memory, Packing

Loss = Callable[[Any], Tensor]

DEFAULT_BACKWARD = "ep"


@dataclass
class _Slot:
    """Where `nudge_loss` leaves the loss for the backward passes of one DEQ, and these leave their last report."""

    loss_of_state: Loss | None = None
    report: NudgeReport | None = None


@dataclass(frozen=True)
class PhantomGradient:
    """torchdeq's phantom gradient (Geng et al. 2021, arXiv 2111.05177) as a value that can be pickled.

    `steps` damped steps of `f` with their graph; `sup_gap` or `sup_loc` pick which of the states are returned.
    """

    steps: int = 1
    tau: float = 1.0
    sup_gap: int = -1
    sup_loc: tuple[int, ...] = ()

    def __call__(self, trainer: nn.Module, func: Any, z_pred: Any, **_: Any) -> list[Any]:
        return [state for state, _ in self.visit(func, z_pred)]

    def visit(self, func: Any, z_pred: Any, detach: Callable[[Any], Any] = lambda z: z) -> list[tuple[Any, Any]]:
        """The states returned, each with the one it was computed from, which `detach` cuts off its own past."""
        visited: list[tuple[Any, Any]] = []
        for step in range(1, self.steps + 1):
            source = detach(z_pred)
            z_pred = func(source, tau=self.tau)
            last = step == self.steps
            if step % self.sup_gap == 0 if self.sup_gap > 0 else (step in self.sup_loc or last):
                visited.append((z_pred, source))
            if last and self.sup_loc and step in self.sup_loc and self.sup_gap <= 0:
                visited.append((z_pred, source))  # torchdeq returns the last state twice then
        return visited


@dataclass(frozen=True, eq=False)
class EquilibriumRule:
    """A gradient rule of torchdeq, `rule(trainer, func, z_pred, writer) -> states`, that uses a backward mode.

    The states returned have the values that the rule it replaces gives them: the steps of the phantom gradient it was
    configured with, one for implicit differentiation.
    """

    mode: ModeLike
    steps: PhantomGradient = PhantomGradient()
    slot: _Slot = field(default_factory=_Slot)
    memory: Memory = field(default_factory=Memory)

    def __call__(self, trainer: nn.Module, func: Any, z_pred: Any, writer: Any = None, **_: Any) -> list[Any]:
        return [
            self._connect(func, returned, source, writer)
            for returned, source in self.steps.visit(func, z_pred, detach=func.detach)
        ]

    def _connect(self, func: Any, returned: Any, source: Any, writer: Any) -> Any:
        device = (source if isinstance(source, Tensor) else source[0]).device
        autocast = Autocast.current(device.type)
        packing = Packing.of(source, lenient=autocast.enabled)

        def f(packed: Tensor) -> Tensor:
            return packing.pack(func(packing.unpack(packed), tau=self.steps.tau))

        def loss_of_packed_state() -> Map | None:
            loss = self.slot.loss_of_state
            return None if loss is None else lambda packed: loss(func.vec2list(packing.unpack(packed)))

        layer = Layer(
            f,
            self.mode,
            autocast,
            packing,
            partial(self._record, writer),
            loss_of_packed_state,
            self.memory,
        )
        value = packing.pack(returned)
        state = packing.pack(source, "the solver").detach()
        return packing.restore(connect(layer, state, value, value), like=returned)

    def _record(self, writer: Any, report: NudgeReport) -> None:
        self.slot.report = report
        if writer is not None:
            writer(solver_statistics(report))


@dataclass(frozen=True)
class CompleteTrajectory:
    """A solver that returns as many trajectory states as it was asked for, also if it converges before the last.

    torchdeq's solvers stop with the indices they have reached, and `DEQIndexing` then drops the gradient rules of the
    rest, the one of the equilibrium first. The states after convergence are the converged one.
    """

    solver: Callable[..., Any]

    def __call__(self, func: Any, x0: Any, *args: Any, indexing: Sequence[int] | None = None, **kwargs: Any) -> Any:
        state, trajectory, info = self.solver(func, x0, *args, indexing=indexing, **kwargs)
        missing = len(indexing or ()) - len(trajectory)
        return state, [*trajectory, *([state] * missing)], info


class _SwitchedRules(list[Any]):
    """The gradient rules of a switched DEQ, and what they replaced. A copy or pickle of it forgets the latter."""

    def __init__(self, rules: Sequence[Any], below: list[Any] | None = None, solver_below: Any = None) -> None:
        super().__init__(rules)
        self.below, self.solver_below = below, solver_below
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
            paragraphs.append("\n".join([head, *(f"  {line}" for line in found.splitlines())]))
        return "\n".join(paragraphs)

    def _rules(self) -> list[tuple[str, EquilibriumRule]]:
        return [(name, rules[-1]) for name, (_, rules) in zip(self._names, self._switched, strict=True)]

    def remove(self) -> None:
        """Give every DEQ the rules back that it had before; a second call does nothing."""
        self._is_removed = True
        for deq, rules in self._switched:
            rules.removed = True
            while isinstance(deq.produce_grad, _SwitchedRules) and deq.produce_grad.removed:
                top = deq.produce_grad
                deq.produce_grad = top.below
                if isinstance(deq.f_solver, CompleteTrajectory) and top.solver_below is not None:
                    deq.f_solver = top.solver_below

    def __enter__(self) -> BackwardHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def use_backward(module: nn.Module, backward: str | ModeLike = DEFAULT_BACKWARD, **options: Any) -> BackwardHandle:
    """Switch every torchdeq DEQ inside a module to another backward pass.

    The forward pass, parameters, buffers, random state and `state_dict` stay as they are. The mode applies to the
    equilibrium; states sampled on the way to it (`n_states`, `indexing`) keep torchdeq's phantom gradient.

    Args:
        module: A model that contains DEQs made by `torchdeq.get_deq`, or such a DEQ.
        backward: Name or spec of a backward mode (`"ep"`, `"hep:n_points=6"`), or a mode.
        **options: Options of the mode, e.g. `tol=1e-4`.

    Returns:
        A handle that restores what was there, at the end of a `with` block or by `handle.remove()`.

    Raises:
        NoDEQError: If there is no DEQ in the module.
        UnknownBackwardError: If no backward mode has that name.
        InvalidOptionError: If the mode has no such option.

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
    mode = get_backward(backward, **options)
    deqs = deqs_of(module)
    names = {part: name for name, part in module.named_modules()}
    return BackwardHandle([(deq, switch(deq, mode)) for deq in deqs], [names[deq] for deq in deqs])


def deqs_of(module: nn.Module) -> list[DEQBase]:
    """The DEQs of a module whose backward can be switched.

    Args:
        module: A model, or a DEQ.

    Returns:
        At least one DEQ, in the order of `module.modules()`.

    Raises:
        NoDEQError: If there is none.

    Example:
        >>> import torchdeq
        >>> len(deqs_of(torch.nn.ModuleList([torchdeq.get_deq(), torchdeq.get_deq()])))
        2
    """
    if not isinstance(module, nn.Module):
        raise NoDEQError(f"expected a torch.nn.Module that contains torchdeq DEQs, got {type(module).__name__}.")
    deqs = [part for part in module.modules() if isinstance(part, DEQBase)]
    for deq in deqs:
        if not isinstance(getattr(deq, "produce_grad", None), list):
            raise NoDEQError(
                f"{type(deq).__name__} has no list 'produce_grad' of gradient rules, so its backward cannot be "
                "switched. Derive it from DEQSliced or DEQIndexing, or call tep.attach(f, z_star) in its forward."
            )
    if not deqs:
        raise NoDEQError(
            f"there is no torchdeq DEQ inside {type(module).__name__}. Make one with torchdeq.get_deq(...) and store "
            "it as an attribute of the module; a hand-written implicit layer takes tep.attach(f, z_star) instead."
        )
    return deqs


def switch(deq: DEQBase, mode: ModeLike) -> _SwitchedRules:
    """Put a mode in the place of the last gradient rule of a DEQ; `BackwardHandle` undoes it."""
    below: list[Any] = deq.produce_grad
    *earlier, last = [_picklable(rule) for rule in below]
    steps = last if isinstance(last, PhantomGradient) else PhantomGradient()
    solver_below = None
    if isinstance(deq, DEQIndexing) and not isinstance(deq.f_solver, CompleteTrajectory):
        solver_below, deq.f_solver = deq.f_solver, CompleteTrajectory(deq.f_solver)
    rules = _SwitchedRules([*earlier, EquilibriumRule(mode, steps)], below, solver_below)
    deq.produce_grad = rules
    return rules


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


def solver_statistics(report: NudgeReport) -> SolverStat:
    """A backward solve in the form that torchdeq hands to a `backward_writer`.

    Args:
        report: Report of a backward solve.

    Returns:
        torchdeq's keys, with one row for the whole state, and `report` itself under `"report"`. `abs_*` and `rel_*` are
        both relative to the force on the nudged state, the scale at which the displacement is solved.
    """
    trace = torch.tensor([report.trace or (report.residual,)])
    lowest = torch.tensor([report.residual])
    return SolverStat(
        abs_lowest=lowest,
        rel_lowest=lowest.clone(),
        abs_trace=trace,
        rel_trace=trace.clone(),
        nstep=torch.tensor([float(report.iterations)]),
        report=report,
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
