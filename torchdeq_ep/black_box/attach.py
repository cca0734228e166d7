"""Training a system whose solver is a black box: gradients from free and nudged equilibria and the local force law.

An equilibrium `z*` satisfies `F(z*, theta, x) = 0`. A simulator, or an instrument, finds it, and finds it again under
an added force, `F(z_b, theta, x) + b g = 0`. With `K = -dF/dz` at `z*` the displacement `(z_b - z*) / b` tends to
`K^-1 g`. The gradient wants `v = K^-T g`, the same vector where `K` is symmetric: in every system whose force has an
energy. Then

    dL/dtheta = (dF/dtheta)^T v,    dL/dx = (dF/dx)^T v,

one VJP of the force law at one state; nothing goes through the solver (Scellier & Bengio 2017, arXiv 1602.05179;
Kendall et al. 2020, arXiv 2006.01981, for circuits). With a positive diagonal `M` that makes `(dF/dz) M` symmetric, the
force is `b M g` and `v = M^-1 K^-1 M g`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.black_box.containers import map_tensors, tensors_of
from torchdeq_ep.black_box.instrument import Instrument, Measurement, Nudge, Solve
from torchdeq_ep.black_box.report import EquilibriumReport
from torchdeq_ep.errors import (
    InvalidOptionError,
    MapChangedError,
    MapContractError,
    NonFiniteError,
    NotHolomorphicError,
    SolverError,
    TruncationWarning,
)
from torchdeq_ep.modes import EquilibriumPropagation, ForceScale, Stencil
from torchdeq_ep.state import first_derivative_only, norm

ForceLaw = Callable[[Tensor, Any, Any], Tensor]


_PILOTS = 12


_CLOSE_ENOUGH = 2.0


_VISIBLE = 10.0


_NEARLY_LINEAR = 1.5


_FROM_NOTHING = 1e3


_AFTER_A_FAILURE = 1e-2


def attach_equilibrium(
    solve: Solve,
    force: ForceLaw,
    theta: Any,
    x: Any = None,
    *,
    stencil: Stencil | str = "symmetric",
    scale: ForceScale | Literal["response"] = "relative",
    metric: Tensor | Callable[[Tensor], Tensor] | None = None,
    shape: Sequence[int] | None = None,
    repeats: int = 1,
    noise: float | None = None,
    batched: bool = True,
    timeout: float | None = None,
    retries: int = 0,
    executor: Literal["thread", "process"] | Executor | None = None,
    workers: int | None = None,
    writer: Callable[[EquilibriumReport], None] | None = None,
) -> Tensor:
    """Solve for an equilibrium with a black box, and give it the gradient that nudged equilibria measure.

    The free phase is solved now, the nudged phases in the backward pass. The gradient is exact, up to the order of the
    stencil, if the system is reciprocal: `dF/dz` is symmetric, or becomes so with the metric.

    Args:
        solve: `solve(current) -> state`, the equilibrium `F(z, theta, x) + current = 0`. It knows `theta` and `x` by
            itself. The current is a detached tensor of the shape of the state, and zero in the free phase. The state
            is a tensor or an array. With `batched=False` it is `solve(current, row)`, for one row of the batch.
        force: The local force law `F(z, theta, x)`, differentiable in `theta` and `x`, in the units of the current. It
            is used at the free state only. `f(z) - z` for a map `f`.
        theta: The parameters: a tensor, or tensors in lists, tuples and dictionaries. They are handed to `force`.
        x: The input, of any such form, or `None`.
        stencil: A [`Stencil`][torchdeq_ep.Stencil] with real nodes, or the name of one with `beta="auto"`:
            `"one-sided"`, `"symmetric"` or `"richardson"`. The automatic amplitude balances truncation and noise.
        scale: `"relative"` multiplies the amplitude by `|z*| / |M g|`, as elsewhere: right where force and state have
            the same units. `"response"` finds the amplitude at which the state moves by `beta |z*|`, in one to three
            more solves: for systems in physical units. `"absolute"` takes it as it is.
        metric: Positive diagonal `M` for which `(dF/dz) M` is symmetric, or a function of the free state to it.
        shape: Shape of the state. Without it, the free phase is solved with a zero that has no dimensions and
            broadcasts.
        repeats: How often each phase is solved. Answers are averaged; from two on there is a standard error.
        noise: Error of one solve relative to the state, in the norm, for `beta="auto"`: the resolution of a converter,
            the tolerance of a solver. By default it is measured from the repeats, and the rounding error of the dtype
            if there are none.
        batched: Whether one call solves the whole batch.
        timeout: Seconds that a call may take. One that takes longer is abandoned in its thread, or killed with its
            process.
        retries: How often a call is repeated that raises, takes too long, or returns NaN or a wrong shape.
        executor: `"thread"` or `"process"` solves nudged phases concurrently; also an executor of your own.
        workers: Largest number of concurrent calls, by default the number of processors.
        writer: Called with the [`EquilibriumReport`][torchdeq_ep.black_box.EquilibriumReport] of each backward pass.

    Returns:
        The free state, in the dtype and on the device of the first tensor in `theta`, with a gradient for whatever
        `force` depends on.

    Raises:
        InvalidOptionError: If an option is not acceptable.
        NotHolomorphicError: If the stencil has complex nodes.
        SolverError: If the solver fails, here or in the backward pass, more often than `retries` allows:
            `SolverTimeoutError`, `SolverNonFiniteError` and `SolverShapeError` say how.
        MapContractError: If `force` does not return the shape of the state.
        MapChangedError: In the backward pass, if `theta` or `x` was written into after the free phase.
        NonFiniteError: In the backward pass, if the cotangent is not finite.

    Example:
        >>> stiffness = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> load = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> def solve(current):  # knows no derivatives
        ...     return (load + current).numpy() / stiffness.detach().numpy()
        >>> z = attach_equilibrium(solve, lambda z, k, x: x - k * z, stiffness, load)
        >>> z.sum().backward()
        >>> stiffness.grad  # -load / stiffness^2
        tensor([-0.2500, -0.0625], dtype=torch.float64)
    """
    chosen = cast(Stencil, EquilibriumPropagation(stencil).stencil)
    if not chosen.is_real:
        raise NotHolomorphicError(
            f"the {chosen.name} stencil nudges by complex forces, which a black box cannot be given. Use "
            "Stencil.richardson for a high order."
        )
    if not callable(force):
        raise InvalidOptionError(f"force must be a function force(z, theta, x), not {force!r}.")
    check_choice("scale", scale, ("relative", "absolute", "response"))
    if metric is not None and not isinstance(metric, Tensor) and not callable(metric):
        raise InvalidOptionError(f"metric must be a tensor, a function of the state, or None, not {metric!r}.")
    if noise is not None and not (isinstance(noise, (int, float)) and 0 < noise < math.inf):
        raise InvalidOptionError(f"noise must be a positive number or None, not {noise!r}.")
    check_count("repeats", repeats, 1)
    system = _System(
        Instrument(solve, batched, timeout, retries, executor, workers),
        force,
        theta,
        x,
        chosen,
        scale,
        metric,
        repeats,
        noise,
        writer,
    )
    free = system.free_phase(None if shape is None else torch.Size(shape))
    like = system.like
    state = torch.stack(free.states).mean(0).to(like.device, like.dtype)
    if not torch.is_grad_enabled():
        return state
    value = force(state, theta, x)
    _require_shape(value, state)
    if not value.requires_grad:
        return state
    attached: Tensor = _MeasuredGradient.apply(system, free, value, state)  # type: ignore[no-untyped-call]
    return attached


class _MeasuredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: _System, free: Measurement, value: Tensor, state: Tensor) -> Tensor:
        ctx.system, ctx.free = system, free
        return state.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, Tensor, None]:
        (cotangent,) = cotangents
        error_vector = ctx.system.error_vector(ctx.free, cotangent.detach())
        return None, None, first_derivative_only(error_vector, cotangent), None


@dataclass(frozen=True)
class _System:
    """One call of `attach_equilibrium`, as its autograd node remembers it."""

    instrument: Instrument
    force: ForceLaw
    theta: Any
    x: Any
    stencil: Stencil
    scale: ForceScale | Literal["response"]
    metric: Tensor | Callable[[Tensor], Tensor] | None
    repeats: int
    noise: float | None
    writer: Callable[[EquilibriumReport], None] | None
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self._versions())

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that the caller computes in."""
        tensors = [t for t in (*tensors_of(self.theta), *tensors_of(self.x)) if t.is_floating_point()]
        return tensors[0] if tensors else torch.zeros(())

    def free_phase(self, shape: torch.Size | None) -> Measurement:
        zero = self.like.new_zeros(() if shape is None else shape)
        return self._measure([(0.0, zero)], shape)

    def error_vector(self, free: Measurement, cotangent: Tensor) -> Tensor:
        if not bool(torch.isfinite(cotangent).all()):
            raise NonFiniteError(
                f"the cotangent dL/dz* has {int((~torch.isfinite(cotangent)).sum())} of {cotangent.numel()} entries "
                "that are NaN or infinite, so there is nothing to nudge by. Look for overflow in the loss."
            )
        if self._versions() != self.versions:
            raise MapChangedError(
                "theta or x was written into after the free phase, so the nudged phases would be those of another "
                "system. Call backward() before optimizer.step()."
            )
        if norm(cotangent) == 0.0:
            return torch.zeros_like(cotangent)
        samples = torch.stack(free.states)
        rest = samples.mean(0)
        wide = rest.dtype
        noise = self._noise(samples)
        stencil = self.stencil.resolve(noise / self.repeats**0.5)
        metric = self._metric(rest)
        direction = (cotangent if metric is None else metric * cotangent).to(wide)
        unit, pilots = self._unit(rest, direction, stencil, noise)
        amplitudes = [unit * cast(float, node) for node in stencil.nodes]
        forces = [(node, b * direction) for node, b in zip(stencil.nodes, amplitudes, strict=True)]
        nudged = self._measure(forces, rest.shape)
        shifts = torch.stack(nudged.states).reshape(-1, self.repeats, *rest.shape) - rest
        weights = [c / b for c, b in zip(stencil.coefficients, amplitudes, strict=True)]
        displacement = torch.einsum("k,kr...->...", torch.tensor(weights, dtype=wide), shifts.to(wide)) / self.repeats
        v = (displacement if metric is None else displacement / metric).to(cotangent)
        if self.scale == "response":
            self._warn_of_saturation(shifts, rest, stencil, noise)
        if self.writer is not None:
            # The free state is subtracted from each; in stencils that are symmetric about it, it cancels.
            scatter = [*zip(weights, shifts, strict=True), (sum(weights), samples - rest)]
            (errors, errors_x), freedom = self._standard_errors(rest, scatter, metric)
            moved = max(norm(shift.mean(0)) for shift in shifts)
            self.writer(
                EquilibriumReport(
                    stencil.name,
                    beta=float(stencil.beta),
                    nudge=unit * float(stencil.beta),
                    noise=noise,
                    signal_to_noise=moved / (noise * _size(rest)),
                    calls=len(samples) + pilots + len(nudged.states),
                    failures=free.failures + nudged.failures,
                    standard_error=errors,
                    standard_error_x=errors_x,
                    degrees_of_freedom=freedom,
                )
            )
        return v

    def _measure(self, forces: Sequence[tuple[complex, Tensor]], shape: torch.Size | None) -> Measurement:
        """Each force, as often as there are repeats, in the dtype and on the device of the caller."""
        like = self.like
        nudges = [
            Nudge(cast(float, amplitude), current.to(like.device, like.dtype), repeat)
            for amplitude, current in forces
            for repeat in range(self.repeats)
        ]
        done = self.instrument.measure(nudges, shape, 0 if self.instrument.batched else self._rows(shape))
        # The solver's own precision is kept: a displacement is a small difference.
        dtype = torch.promote_types(done.states[0].dtype, like.dtype)
        return Measurement([state.to(like.device, dtype) for state in done.states], done.failures)

    def _rows(self, shape: torch.Size | None) -> int:
        inputs = tensors_of(self.x)
        if shape is None and not (inputs and inputs[0].dim()):
            raise InvalidOptionError("batched=False needs to know the number of rows: give shape=, or x with a batch.")
        return len(inputs[0]) if shape is None else shape[0]

    def _noise(self, samples: Tensor) -> float:
        """Relative error of one solve."""
        eps = float(torch.finfo(samples.dtype).eps)
        if self.noise is not None:
            return max(self.noise, eps)
        rest = samples.mean(0)
        if len(samples) < 2:
            return eps
        return max(norm(samples - rest) / math.sqrt(len(samples) - 1) / _size(rest), eps)

    def _metric(self, rest: Tensor) -> Tensor | None:
        if self.metric is None:
            return None
        metric = self.metric if isinstance(self.metric, Tensor) else self.metric(rest.to(self.like.dtype))
        if not isinstance(metric, Tensor) or not bool(((metric > 0) & torch.isfinite(metric)).all()):
            raise InvalidOptionError("the metric must be a positive and finite tensor: it is the diagonal of M.")
        return metric.detach().to(rest).expand(rest.shape)

    def _unit(self, rest: Tensor, direction: Tensor, stencil: Stencil, noise: float) -> tuple[float, int]:
        """What the nodes of the stencil are multiplied by, and the solves it took to find out."""
        unit = 1.0 if self.scale == "absolute" else _size(rest) / norm(direction)
        if self.scale != "response":
            return unit, 0
        # A pilot that moves less than the noise shows nothing.
        target = max(float(stencil.beta), _VISIBLE * noise / math.sqrt(self.repeats))
        failure: SolverError | None = None
        for pilot in range(1, _PILOTS + 1):
            try:
                state = self._measure([(target, target * unit * direction)], rest.shape).states
            except SolverError as error:  # so strong a force may be beyond what the system can bear
                failure, unit = error, unit * _AFTER_A_FAILURE
                continue
            moved = norm(torch.stack(state).mean(0) - rest) / _size(rest)
            unit *= target / moved if moved > 0 else _FROM_NOTHING
            if moved > 0 and 1 / _CLOSE_ENOUGH <= target / moved <= _CLOSE_ENOUGH:
                return unit, pilot * self.repeats
        if failure is not None:
            raise failure
        raise InvalidOptionError(
            f"scale='response' found no force that moves the state by {target:.1e} of its norm in {_PILOTS} "
            "solves. If the state cannot move in the direction of the cotangent there is no gradient; else give "
            "scale='absolute'."
        )

    def _warn_of_saturation(self, shifts: Tensor, rest: Tensor, stencil: Stencil, noise: float) -> None:
        """The pilot said how far each nudge would move the state, were the response linear."""
        visible = _VISIBLE * noise / math.sqrt(self.repeats)
        for node, shift in zip(stencil.nodes, shifts, strict=True):
            moved, expected = norm(shift.mean(0)) / _size(rest), abs(node)
            if expected > visible and not 1 / _NEARLY_LINEAR <= moved / expected <= _NEARLY_LINEAR:
                warnings.warn(
                    f"the nudge {node:+.2g} moved the state by {moved:.1e} of its norm where a linear response would "
                    f"have moved it by {expected:.1e}: the response saturates, or the readings are cut off, and the "
                    "gradient is wrong. Use a smaller beta.",
                    TruncationWarning,
                    stacklevel=2,
                )
                return

    def _standard_errors(
        self, rest: Tensor, scatter: Sequence[tuple[float, Tensor]], metric: Tensor | None
    ) -> tuple[tuple[Any, Any], float]:
        """Those of the gradients, from the scatter of the repeats, and their degrees of freedom.

        The gradient is linear in the state at each node, so its variance is the sum over the nodes of that of the mean.
        """
        if self.repeats < 2:
            return (None, None), math.nan
        theta, x = (
            map_tensors(tree, lambda t: t.detach().requires_grad_(t.requires_grad)) for tree in (self.theta, self.x)
        )
        leaves = [t for t in (*tensors_of(theta), *tensors_of(x)) if t.requires_grad]
        largest = max(abs(weight) for weight, _ in scatter)
        kept = [(weight, shift) for weight, shift in scatter if abs(weight) > 1e-9 * largest]
        variances: dict[int, Tensor] = {}
        if leaves:
            with torch.enable_grad():
                value = self.force(rest.to(self.like.dtype), theta, x)
            for weight, shift in kept:
                for sample in weight * (shift - shift.mean(0)):
                    vector = (sample if metric is None else sample / metric).to(value)
                    parts = torch.autograd.grad(value, leaves, vector, retain_graph=True, allow_unused=True)
                    for leaf, part in zip(leaves, parts, strict=True):
                        if part is not None:
                            square = part.square() / (self.repeats * (self.repeats - 1))
                            variances[id(leaf)] = variances.get(id(leaf), 0) + square
        errors = (
            map_tensors(tree, lambda t: variances[id(t)].sqrt() if id(t) in variances else None) for tree in (theta, x)
        )
        squares = [weight**2 for weight, _ in kept]
        freedom = (self.repeats - 1) * sum(squares) ** 2 / sum(square**2 for square in squares)
        return cast(tuple[Any, Any], tuple(errors)), freedom

    def _versions(self) -> list[int]:
        return [t._version for t in (*tensors_of(self.theta), *tensors_of(self.x))]


def _size(state: Tensor) -> float:
    # A state at zero has no scale of its own: one per entry then stands for it.
    return norm(state) or math.sqrt(state.numel())


def _require_shape(value: object, state: Tensor) -> None:
    if isinstance(value, Tensor) and value.shape == state.shape:
        return
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise MapContractError(
        f"force returned {got} where the state has shape {tuple(state.shape)}: it is the force on each of its entries. "
        "If the solver makes its state in the shape of the current, give shape=."
    )
