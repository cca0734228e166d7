"""What a switched DEQ calls: the gradient rule, which gives states a gradient, and a hook at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchdeq.core import DEQBase
from torchdeq.solver.stat import SolverStat

from torchdeq_ep.asymmetry import AsymmetryPenalty, Keep
from torchdeq_ep.closing import is_followed, is_transforming, may_have_tangents
from torchdeq_ep.compiling import not_compiled
from torchdeq_ep.errors import NoGradientWarning, TransformError
from torchdeq_ep.host.deqs import fixed_point
from torchdeq_ep.layer import Layer
from torchdeq_ep.modes import ModeLike, Need, NudgeReport, Trajectory
from torchdeq_ep.nn import ReadoutLoss
from torchdeq_ep.node import connect, connect_with_penalty
from torchdeq_ep.recording import depends_on_more, leaves_of, reaches_state, recorded, recording_of
from torchdeq_ep.relaxation.kept import kept_by, replay
from torchdeq_ep.state import Autocast, Equilibrium, Map, Memory, Packing, forget_casts, tensors_of, undisturbed
from torchdeq_ep.transformed import connect_transformed

Loss = Callable[[Any], Tensor]


class Penalised(Protocol):
    """Who is told what the penalty was, and shown the error vector."""

    def acts_on(self, leaf: Tensor) -> bool:
        """Whether the penalty is to reach a parameter."""

    @property
    def guard(self) -> float:
        """Weight of the guard of stability, relative to that of the asymmetry."""

    @property
    def keep(self) -> Keep | None:
        """What takes the gradient of the penalty, if it is not to be added to that of the loss."""

    def on_value(self, value: float, rate: float) -> None:
        """Told the mean over the samples of `|(J - J^T) v|^2 / |v|^2`, and what most have less of `|J^T v| / |v|`."""

    def on_error_vector(self, equilibrium: Equilibrium, v: Tensor) -> None:
        """Shown each error vector, where calls of `f` leave no trace."""


@dataclass
class Slot:
    """What one DEQ is told by `nudge_loss` and homeostasis, and what its passes leave for them. A copy is empty."""

    loss_of_state: Loss | None = None
    report: NudgeReport | None = None
    penalised: Penalised | None = None
    """What wants a penalty on the asymmetry along the error vector."""
    history: object = None
    """Of the last forward pass: what the solver kept for a mode that needs it."""
    zero: Tensor | None = None
    """Of the last forward pass: a scalar of value 0, whose cotangent is the weight of that penalty."""

    def __reduce__(self) -> Any:
        # What is in it belongs to one pass of one DEQ.
        return Slot, ()


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


def _lasting() -> Memory:
    return Memory(lasting=True)


@dataclass(frozen=True, eq=False)
class EquilibriumRule:
    """A gradient rule of torchdeq, `rule(trainer, func, z_pred, writer) -> states`, that uses a backward mode.

    The states returned have the values that the rule it replaces gives them: the steps of the phantom gradient it was
    configured with, one for implicit differentiation.
    """

    mode: ModeLike
    steps: PhantomGradient = PhantomGradient()
    certificate: bool = True
    slot: Slot = field(default_factory=Slot)
    memory: Memory = field(default_factory=_lasting)

    @not_compiled
    def __call__(self, trainer: nn.Module, func: Any, z_pred: Any, writer: Any = None, **_: Any) -> list[Any]:
        history, self.slot.history = self.slot.history, None
        visited = self._followed(func, z_pred) if is_transforming() else self._visited(func, z_pred)
        if isinstance(history, SolverRun):
            history = Trajectory(partial(self._replayed, func, history))
        kept = [None] * (len(visited) - 1) + [history]  # which is of the equilibrium alone
        return [self._connect(func, *state, writer, past) for state, past in zip(visited, kept, strict=True)]

    def _followed(self, func: Any, z_pred: Any) -> list[tuple[Any, Any]]:
        """The states of the rule under a transform, which makes a graph of its own."""
        with undisturbed():
            return self.steps.visit(func, z_pred, detach=func.detach)

    def _replayed(self, func: Any, run: SolverRun, _: Map) -> Tensor:
        """All steps of the solver and of the rule, with their graph."""
        z = replay(func, run.start, run.solved, run.counts)
        for _step in range(self.steps.steps):
            z = func(z, tau=self.steps.tau)
        return Packing.of(z).pack(z)

    def _visited(self, func: Any, z_pred: Any) -> list[tuple[Any, Any]]:
        """The states of the rule, recorded at their sources where `func` allows it: found out once."""
        forget_casts()
        if self.certificate and self.memory.recordable and torch.is_grad_enabled() and not may_have_tangents():
            try:
                visited = self.steps.visit(func, z_pred, detach=lambda z: recorded(func.detach(z)))
            except RuntimeError:  # f writes into its state, or takes it out of autograd's hands
                self.memory.recordable = False
            else:
                # A value without a graph says nothing: parameters may be frozen for a while.
                if self.memory.passes == 0:
                    self.memory.recordable = all(reaches_state(returned, source) for returned, source in visited)
                    recordings = [recording_of(source) for _, source in visited]
                    self.memory.state_is_hidden = any(each is not None and each.is_hidden for each in recordings)
                if self.memory.recordable:
                    return [self._marked(returned, source) for returned, source in visited]
        return self.steps.visit(func, z_pred, detach=func.detach)

    def _marked(self, returned: Any, source: Any) -> tuple[Any, Any]:
        recording = recording_of(source)
        if recording is not None:
            recording.is_hidden = self.memory.state_is_hidden
        return returned, source

    def _connect(self, func: Any, returned: Any, source: Any, writer: Any, history: object) -> Any:
        device = (source if isinstance(source, Tensor) else source[0]).device
        autocast = Autocast.current(device.type)
        packing = Packing.of(source, lenient=autocast.enabled)

        def f(packed: Tensor) -> Tensor:
            return packing.pack(func(packing.unpack(packed), tau=self.steps.tau))

        def loss_of_packed_state() -> Map | None:
            loss = self.slot.loss_of_state
            if loss is None or (isinstance(loss, ReadoutLoss) and _is_bare(func, packing, source)):
                return loss  # which knows its gradient where the state lies as the layer returns it
            return lambda packed: loss(func.vec2list(packing.unpack(packed)))

        layer = Layer(
            f,
            self.mode,
            autocast,
            packing,
            partial(self._record, writer),
            loss_of_packed_state,
            self.memory,
            history=history,
        )
        value, state, wanted = packing.pack(returned), packing.pack(source, "the solver").detach(), self.slot.penalised
        self.slot.zero = None
        if is_transforming():
            connected = connect_transformed(layer, state, value, is_penalised=wanted is not None)
            return packing.restore(connected, like=returned)
        recording = recording_of(source)
        if wanted is None or not depends_on_more(value, recording):
            return packing.restore(connect(layer, state, value, value, recording), like=returned)
        leaves = tuple(leaf for leaf in leaves_of(value, recording) if wanted.acts_on(leaf))
        layer.penalty = AsymmetryPenalty(leaves, wanted.on_value, wanted.guard, wanted.keep)
        layer.controller = wanted.on_error_vector
        connected, self.slot.zero = connect_with_penalty(layer, state, value, value, recording)
        return packing.restore(connected, like=returned)

    def _record(self, writer: Any, report: NudgeReport) -> None:
        self.slot.report = report
        if writer is not None:
            writer(solver_statistics(report))


def _is_bare(func: Any, packing: Packing, state: Any) -> bool:
    """Whether a state is one real matrix, and the same to the solver, to the layer and to the user."""
    if not isinstance(state, Tensor) or state.dim() != 2 or state.is_complex():
        return False
    form = func.vec2list(packing.unpack(state))
    return isinstance(form, Tensor) and form.shape == state.shape


@dataclass(frozen=True)
class SolverRun:
    """How a solver of torchdeq went: where it started, where it ended, and the steps of each row."""

    start: Any
    solved: Any
    counts: Tensor


@dataclass(frozen=True, eq=False)
class ObservedSolver:
    """A solver that leaves in the slot of a DEQ what its mode needs of the forward pass."""

    solver: Callable[..., Any]
    slot: Slot
    need: Need | None

    def __call__(self, func: Any, x0: Any, *args: Any, **kwargs: Any) -> Any:
        if kept_by(self.solver) is not None:
            kwargs["on_history"] = self._keep
        state, trajectory, info = self.solver(func, x0, *args, **kwargs)
        if self.need == "steps":
            self._keep(SolverRun(x0, state, info["nstep"]))
        return state, trajectory, info

    def _keep(self, history: object) -> None:
        self.slot.history = history


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


@dataclass(frozen=True, eq=False)
class EvaluationHook:
    """A forward hook that speaks up once if a gradient is expected in evaluation mode: torchdeq gives none."""

    rule: EquilibriumRule

    def __call__(self, deq: DEQBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        memory = self.rule.memory
        self.rule.slot.history = None  # it holds the map, and with it a graph
        if deq.training or deq.produce_grad[-1] is not self.rule:
            return
        if may_have_tangents():
            self._refuse_derivative(args, kwargs, output)
        if memory.seen_in_evaluation or not torch.is_grad_enabled() or is_transforming():
            return
        memory.seen_in_evaluation = True
        f, z = fixed_point(args, kwargs, output)
        with undisturbed(), torch.enable_grad():
            value = f(z)
        if any(tensor.requires_grad for tensor in ([value] if isinstance(value, Tensor) else value)):
            memory.warn(
                NoGradientWarning,
                "evaluation",
                "the DEQ was called in evaluation mode with autograd on, and there it has no gradient: whatever is in "
                "its map is not trained by this pass",
                lambda: (
                    "To train, call model.train(), and freeze single layers by their own eval(). To evaluate, use "
                    "torch.no_grad()."
                ),
            )

    def _refuse_derivative(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        f, z = fixed_point(args, kwargs, output)
        with undisturbed(), torch.enable_grad():
            value = f(z)
        if any(is_followed(tensor) for tree in (value, output[0][-1]) for tensor in tensors_of(tree)):
            raise TransformError(
                "the DEQ was called in evaluation mode, where torchdeq gives it no derivative, and a transform asks "
                "for one. Call model.train(), and freeze single layers by their own eval()."
            )
