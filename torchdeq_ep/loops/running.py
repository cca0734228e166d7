"""Loops written by hand: steps of a map with the backward of one's choice, whatever the loop is part of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast, get_args, overload

import torch
from torch import Tensor

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.closing import is_transforming, may_have_tangents, named_failures
from torchdeq_ep.errors import InvalidOptionError, TransformError
from torchdeq_ep.layer import Layer
from torchdeq_ep.loops.report import LoopReport
from torchdeq_ep.loops.states import detached, in_container, where, with_gradient
from torchdeq_ep.modes import ModeLike, Need, NudgeReport, Unrolled, get_backward
from torchdeq_ep.node import connect
from torchdeq_ep.recording import reaches_state, recorded, recording_of
from torchdeq_ep.relaxation import Solver, find_solver
from torchdeq_ep.relaxation.kept import solve_and_keep
from torchdeq_ep.state import Autocast, Memory, Packing, State, norm, tensors_of
from torchdeq_ep.transformed import connect_transformed

AnyState = TypeVar("AnyState", bound=Tensor | Sequence[Tensor])
Halt = Callable[[Any, int], Tensor]
Carry = Literal["detached", "graph"]

_TOL = 1e-4

_override: ContextVar[ModeLike | None] = ContextVar("torchdeq_ep_loops", default=None)


@contextmanager
def loops_by(mode: ModeLike) -> Iterator[None]:
    """A context in which every loop has another backward than its own, to measure it.

    Args:
        mode: The mode.

    Yields:
        Nothing.
    """
    token = _override.set(mode)
    try:
        yield
    finally:
        _override.reset(token)


@overload
def loop(
    f: Callable[..., Any],
    z0: AnyState,
    steps: int,
    backward: str | ModeLike = ...,
    *,
    solver: str | Solver | None = ...,
    tol: float = ...,
    supervise: None = ...,
    carry: Carry = ...,
    halt: Halt | None = ...,
    writer: Callable[[NudgeReport], None] | None = ...,
    on_stop: Callable[[LoopReport], None] | None = ...,
    certificate: bool = ...,
    memory: Memory | None = ...,
) -> AnyState: ...


@overload
def loop(
    f: Callable[..., Any],
    z0: AnyState,
    steps: int,
    backward: str | ModeLike = ...,
    *,
    solver: str | Solver | None = ...,
    tol: float = ...,
    supervise: Sequence[int],
    carry: Carry = ...,
    halt: Halt | None = ...,
    writer: Callable[[NudgeReport], None] | None = ...,
    on_stop: Callable[[LoopReport], None] | None = ...,
    certificate: bool = ...,
    memory: Memory | None = ...,
) -> list[AnyState]: ...


def loop(
    f: Callable[..., Any],
    z0: AnyState,
    steps: int,
    backward: str | ModeLike = "unrolled",
    *,
    solver: str | Solver | None = None,
    tol: float = _TOL,
    supervise: Sequence[int] | None = None,
    carry: Carry = "detached",
    halt: Halt | None = None,
    writer: Callable[[NudgeReport], None] | None = None,
    on_stop: Callable[[LoopReport], None] | None = None,
    certificate: bool = True,
    memory: Memory | None = None,
) -> AnyState | list[AnyState]:
    """Run `z <- f(z)`, with the gradient of one's choice.

    The values are those of the loop written by hand, to the last bit. Only the gradient differs:

    * `"unrolled"`: through all steps, also into `z0`; `"unrolled:k=8"`: through the last eight.
    * `"one-step"`: through the last step. Every mode of the [menu](menu.md) takes the state before that as `z*`: no
      gradient flows into `z0`.

    Args:
        f: The map: a closure or module over parameters and inputs. Several tensors are passed as `f(*z)`, or as one
            sequence if `f` takes exactly one required argument.
        z0: Where to start: a tensor of any shape, or a tuple or list of tensors.
        steps: Number of steps; with a solver the largest number of its calls of `f`, to which one is added, as
            in torchdeq.
        backward: Name or spec of a backward mode, or a mode.
        solver: Name of a solver registered with torchdeq (`"anderson"`, `"broyden-inverse"`, `"reversible"`), or a
            callable of that form; `None` for plain steps.
        tol: Relative residual at which the solver stops.
        supervise: Numbers of steps, rising and up to `steps`, after which the state is returned as well: deep
            supervision. The steps between two of them are a segment, whose end has the gradient of that segment.
        carry: Whether a segment starts from the detached end of the one before, as recursive reasoning models do, or
            the graph goes on: `"detached"`, or `"graph"` (with `"unrolled"` alone).
        halt: Called after each step as `halt(z, step)`, without a graph; a boolean for each sample, of shape `(B,)`. A
            sample that halts keeps the state it has, and its gradient is through its own last steps. Samples must be
            treated apart by `f`, which is called again at the state before these, unless all steps are unrolled.
        writer: Called with the [`NudgeReport`][torchdeq_ep.NudgeReport] of each backward pass, but not for steps of the
            loop itself that are unrolled: that pass is autograd's own.
        on_stop: Called with a [`LoopReport`][torchdeq_ep.LoopReport] once the loop has ended: at which
            residual it stopped, and whether the gradient of an equilibrium means anything there.
        certificate: As for [`attach`][torchdeq_ep.node.attach].
        memory: What is remembered from one call to the next, a `tep.Memory(lasting=True)` that the model keeps: what
            was measured of `f` is not measured again, and a warning is issued once, with counts, not in every pass.

    Returns:
        The last state, in the container of `z0`; with `supervise` a list of the states asked for.

    Raises:
        UnknownBackwardError: If no backward mode has that name.
        InvalidOptionError: If an option is not acceptable.
        MapContractError: If `z0` is no state, or `f` does not return one of the same shapes and dtypes.
        MissingHistoryError: If the mode needs a solver that keeps what it did, or the solver a mode that uses that.

    Example:
        >>> import torch
        >>> bias = torch.tensor([0.5], requires_grad=True)
        >>> reports = []
        >>> z = loop(lambda z: 0.5 * torch.tanh(z) + bias, torch.zeros(1), 6, "one-step", on_stop=reports.append)
        >>> z.backward()
        >>> bias.grad, reports[0].is_equilibrium
        (tensor([1.]), True)
    """
    mode = _override.get() or get_backward(backward)
    ends = _ends(steps, supervise)
    check_choice("carry", carry, get_args(Carry))
    if carry == "graph" and not isinstance(mode, Unrolled):
        raise InvalidOptionError(
            "carry='graph' keeps the graph of all segments, which only backward='unrolled' follows."
        )
    if solver is not None and (halt is not None or len(ends) > 1):
        raise InvalidOptionError("a solver has no segments and no halting: leave out solver, or supervise and halt.")
    tensors = tensors_of(z0)
    autocast = Autocast.current(tensors[0].device.type)
    packing = Packing.of(z0, lenient=autocast.enabled)
    run = _Run(f, mode, packing, autocast, writer, certificate, halt, on_stop is not None, memory or Memory())
    with named_failures() if is_transforming() else nullcontext():
        if solver is not None:
            states = [run.solved(find_solver(solver), z0, steps, tol)]
        else:
            states, z, begin = [], cast(State, z0), 0
            for end in ends:
                states.append(run.segment(z, begin, end))
                z, begin = (states[-1] if carry == "graph" else detached(states[-1])), end
    if on_stop is not None:
        on_stop(run.report())
    return cast(AnyState, states[-1]) if supervise is None else cast(list[AnyState], states)


def _ends(steps: int, supervise: Sequence[int] | None) -> list[int]:
    check_count("steps", steps)
    if supervise is None:
        return [steps]
    ends = list(supervise)
    if not ends or ends != sorted(set(ends)) or ends[0] < 1 or ends[-1] > steps:
        raise InvalidOptionError(f"supervise must be rising numbers from 1 to {steps}, not {supervise!r}.")
    return ends


@dataclass
class _Run:
    """One call of `loop`."""

    f: Callable[..., Any]
    mode: ModeLike
    packing: Packing
    autocast: Autocast
    writer: Callable[[NudgeReport], None] | None
    certificate: bool
    halt: Halt | None
    measured: bool
    memory: Memory
    active: Tensor | None = None
    row_steps: Tensor | None = None
    made: int = 0
    is_checked: bool = False
    sizes: list[tuple[float, float]] = field(default_factory=list)

    def segment(self, z: State, begin: int, end: int) -> State:
        """Steps from `begin` to `end`, with the gradient of the mode."""
        unrolled = isinstance(self.mode, Unrolled)
        kept = self.mode.k if isinstance(self.mode, Unrolled) else 1
        if not _is_followed() or (unrolled and (kept is None or (self.halt is None and kept >= end - begin))):
            return self.steps(z, begin, end)[0]
        assert kept is not None
        if self.halt is None:
            with torch.no_grad():
                # Without tangents as well, which no_grad leaves.
                z = detached(self.steps(detached(z), begin, end - kept)[0])
            if unrolled:
                return self.steps(z, end - kept, end)[0]
            value, source = self.recorded_step(z)
            self.note(z, value)
            self.made = end
            return self.connected(source, value, value)
        with torch.no_grad():
            before = self.row_steps
            last, window = self.steps(detached(z), begin, end, kept)
            last, start = detached(last), detached(window[0])
        assert self.row_steps is not None
        own = self.row_steps if before is None else self.row_steps - before
        if unrolled:
            return with_gradient(last, self.repeated(start, own, kept))
        value, source = self.recorded_step(start)
        moved = own > 0  # a sample that had halted before has no step here, and no gradient
        if is_transforming() and not bool(moved.all()):
            raise TransformError(
                "samples that have halted have no gradient in later segments, and a transform of torch.func would give "
                "them one. Call loss.backward(), use 'unrolled', or ask for no state after a sample has halted."
            )
        return self.connected(source, where(moved, value, detached(value)), last)

    def steps(self, z: State, begin: int, end: int, kept: int = 0) -> tuple[State, list[State]]:
        """Plain steps; and for each sample the states before its last `kept` ones, if there are so many."""
        step, window = self.packing.state_map(self.f), [z] * kept
        if self.halt is not None and self.active is None:
            first = tensors_of(z)[0]
            self.active = torch.ones(len(first), dtype=torch.bool, device=first.device)
            self.row_steps = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        for index in range(begin, end):
            value = self.like(z, step(z))
            if self.halt is None or self.active is None or self.row_steps is None:
                self.note(z, value)
                z, self.made = value, index + 1
                continue
            if not bool(self.active.any()):
                break
            window = [where(self.active, later, state) for state, later in pairwise([*window, z])]
            value = where(self.active, value, z)
            self.note(z, value)
            z, self.made = value, index + 1
            self.row_steps = self.row_steps + self.active
            with torch.no_grad():
                halted = self.halt(detached(z), index + 1)
            self.active = self.active & ~self.checked(halted)
        return z, window

    def checked(self, halted: Any) -> Tensor:
        """What `halt` returned, if it is a decision for each sample."""
        assert self.active is not None
        if not isinstance(halted, Tensor) or halted.dtype is not torch.bool or halted.shape != self.active.shape:
            got = (
                f"{halted.dtype} of shape {tuple(halted.shape)}"
                if isinstance(halted, Tensor)
                else type(halted).__name__
            )
            raise InvalidOptionError(
                f"halt must return one boolean for each sample, of shape {tuple(self.active.shape)}, not {got}."
            )
        return halted

    def repeated(self, z: State, own: Tensor, kept: int) -> State:
        """The last `kept` steps of each sample once more, with their graph."""
        step = self.packing.state_map(self.f)
        for index in range(kept):
            z = where(kept - index <= own, self.like(z, step(z)), z)
        return z

    def solved(self, solver: Solver, z0: State, steps: int, tol: float) -> State:
        """The state that a solver comes to, with the gradient of the mode."""
        need: Need | None = getattr(self.mode, "needs", None)
        f = self.packing.map(self.f)
        start = self.packing.pack(z0, "z0")
        grad = _is_followed()
        start = start if need in ("steps", "reversible") else start.detach()
        options: dict[str, Any] = {"max_iter": steps, "tol": tol, "stop_mode": "rel"}
        z, history, self.made = solve_and_keep(solver, f, start, self.packing.rows, need if grad else None, **options)
        if not grad or need == "steps":
            state = self.packing.unpack(z)
            value = self.like(state, self.packing.state_map(self.f)(state))
            self.note(state, value)
            return value
        state = self.packing.unpack(z.detach())
        value, source = self.recorded_step(state)
        self.note(state, value)
        return self.connected(source, value, value, history)

    def recorded_step(self, z: State) -> tuple[State, State]:
        """One step with its graph, at a state that asks for a gradient where `f` allows it; and that state."""
        step = self.packing.state_map(self.f)
        if self.certificate and not may_have_tangents():
            source = recorded(z)
            try:
                value = self.like(z, step(source))
            except RuntimeError:  # f writes into its state, or takes it out of autograd's hands
                pass
            else:
                if reaches_state(value, source):
                    return value, source
        return self.like(z, step(z)), z

    def connected(self, source: State, value: State, returned: State, history: object = None) -> State:
        layer = Layer(
            self.packing.map(self.f),
            self.mode,
            self.autocast,
            self.packing,
            self.writer,
            memory=self.memory,
            history=history,
        )
        free = self.packing.pack(detached(source), "the loop")
        values = self.packing.pack(detached(returned))
        if is_transforming():
            connected = connect_transformed(layer, free, values)
        else:
            connected = connect(layer, free, self.packing.pack(value), values, recording_of(source))
        return self.packing.restore(connected, like=returned)

    def like(self, z: State, value: Any) -> State:
        """A value of `f` in the container of the state, if it is one."""
        if not self.is_checked:
            self.packing.pack(value)  # which refuses what is no state of the same shapes
            self.is_checked = True
        return cast(State, value) if isinstance(z, Tensor) else in_container(z, value)

    def note(self, z: State, value: State) -> None:
        """Keep how large a step was, if somebody asks for it; a transform follows numbers that may have no value."""
        if self.measured and not is_transforming():
            old, new = (self.packing.pack(detached(state)) for state in (z, value))
            self.sizes.append((norm(new - old), norm(old) or 1.0))

    def report(self) -> LoopReport:
        trace = tuple(size / whole for size, whole in self.sizes)
        pairs = [size for size, _ in self.sizes[-2:]]
        contraction = pairs[1] / pairs[0] if len(pairs) == 2 and pairs[0] > 0 else math.nan
        return LoopReport(self.made, trace[-1] if trace else math.nan, contraction, self.row_steps, trace)


def _is_followed() -> bool:
    """Whether a derivative of any kind may be asked for."""
    return torch.is_grad_enabled() or may_have_tangents()
