"""The error vector of a system whose solver is a black box, measured: amplitude, nudged phases, noise, standard errors.

The equations are those of `black_box.attach`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from torchdeq_ep.black_box.containers import map_tensors, tensors_of
from torchdeq_ep.black_box.instrument import Instrument, Measurement, Nudge
from torchdeq_ep.black_box.law_check import LawCheck, Phases, rounding_of_a_solve
from torchdeq_ep.black_box.reciprocity import Reciprocity, measure_reciprocity
from torchdeq_ep.black_box.report import EquilibriumReport
from torchdeq_ep.black_box.response import Response, size_of
from torchdeq_ep.errors import InvalidOptionError, MapChangedError, NonFiniteError, SolverError, TruncationWarning
from torchdeq_ep.modes import ForceScale, Stencil
from torchdeq_ep.state import norm

ForceLaw = Callable[[Tensor, Any, Any], Tensor]

_PILOTS = 12
_CLOSE_ENOUGH = 2.0
_VISIBLE = 10.0
_NEARLY_LINEAR = 1.5
_FROM_NOTHING = 1e3
_AFTER_A_FAILURE = 1e-2


@dataclass(frozen=True)
class System:
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
    check: bool | Literal["reciprocity"]
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
        self._require_usable(cotangent)
        if norm(cotangent) == 0.0:
            return torch.zeros_like(cotangent)
        samples = torch.stack(free.states)
        rest = samples.mean(0)
        noise = self._noise(samples, free.eps)
        stencil = self.stencil.resolve(noise / self.repeats**0.5)
        metric = self._metric(rest)
        direction = (cotangent if metric is None else metric * cotangent).to(rest.dtype)
        unit, pilots = self._unit(rest, direction, stencil, noise)
        amplitudes = [unit * cast(float, node) for node in stencil.nodes]
        forces = [(node, b * direction) for node, b in zip(stencil.nodes, amplitudes, strict=True)]
        nudged = self._measure(forces, rest.shape)
        states = torch.stack(nudged.states).reshape(-1, self.repeats, *rest.shape)
        response = Response(samples, states, stencil, amplitudes, direction, metric, noise)
        cut_off = self.scale == "response" and self._warn_of_saturation(response)
        law = self._check_law(response, free.eps) if self.check else None
        named = cut_off and law is not None and law.may_be_cut_off  # the warning says so
        agrees = law is None or not law.is_wrong or named
        mutual = self._reciprocity(response, cotangent) if self.check == "reciprocity" and agrees else None
        if self.writer is not None:
            calls = len(samples) + pilots + len(nudged.states) + (2 * self.repeats if mutual else 0)
            self.writer(self._report(response, law, mutual, calls, free.failures + nudged.failures))
        if law is not None and not named:
            law.require_agreement()
        if mutual is not None:
            mutual.warn_of_asymmetry()
        displacement = response.displacement
        return (displacement if metric is None else displacement / metric).to(cotangent)

    def _require_usable(self, cotangent: Tensor) -> None:
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

    def _check_law(self, response: Response, answered: float) -> LawCheck:
        wide = torch.promote_types(response.rest.dtype, torch.float32)

        @torch.no_grad()
        def law(state: Tensor) -> Tensor:
            value = self.force(state.to(self.like.dtype), self.theta, self.x)
            return value.detach().to(wide)

        phases = Phases(
            law, response.free, response.nudged, response.amplitudes, response.direction, size_of(response.rest)
        )
        error = max(response.noise, rounding_of_a_solve(self._eps(answered)))
        return phases.check(error, systematic=self.noise is not None)

    def _reciprocity(self, response: Response, cotangent: Tensor) -> Reciprocity:
        def measure(forces: Sequence[tuple[float, Tensor]]) -> list[Tensor]:
            states = torch.stack(self._measure(forces, response.rest.shape).states)
            return list(states.reshape(-1, self.repeats, *response.rest.shape).mean(1))

        return measure_reciprocity(measure, response, cotangent, systematic=self.noise is not None)

    def _report(
        self, response: Response, law: LawCheck | None, mutual: Reciprocity | None, calls: int, failures: int
    ) -> EquilibriumReport:
        beta, size = float(response.stencil.beta), size_of(response.rest)
        (errors, errors_x), freedom = self._standard_errors(response)
        return EquilibriumReport(
            response.stencil.name,
            beta=beta,
            nudge=beta * abs(response.amplitudes[0] / cast(float, response.stencil.nodes[0])),
            noise=response.noise,
            signal_to_noise=response.moved / (response.noise * size),
            calls=calls,
            failures=failures,
            standard_error=errors,
            standard_error_x=errors_x,
            degrees_of_freedom=freedom,
            law_residual=math.nan if law is None else law.residual,
            law_noise=math.nan if law is None else law.residual_noise,
            free_residual=math.nan if law is None else law.free_residual,
            reciprocity=math.nan if mutual is None else mutual.difference,
        )

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
        return replace(done, states=[state.to(like.device, dtype) for state in done.states])

    def _rows(self, shape: torch.Size | None) -> int:
        inputs = tensors_of(self.x)
        if shape is None and not (inputs and inputs[0].dim()):
            raise InvalidOptionError("batched=False needs to know the number of rows: give shape=, or x with a batch.")
        return len(inputs[0]) if shape is None else shape[0]

    def _eps(self, answered: float) -> float:
        """Rounding of a solve: an answer in float64 may have been computed from a force in float32, and in it."""
        return max(answered, float(torch.finfo(self.like.dtype).eps))

    def _noise(self, samples: Tensor, answered: float) -> float:
        """Relative error of one solve."""
        if self.noise is not None:
            return max(self.noise, answered)
        rest = samples.mean(0)
        if len(samples) < 2:
            return self._eps(answered)
        return max(norm(samples - rest) / math.sqrt(len(samples) - 1) / size_of(rest), self._eps(answered))

    def _metric(self, rest: Tensor) -> Tensor | None:
        if self.metric is None:
            return None
        metric = self.metric if isinstance(self.metric, Tensor) else self.metric(rest.to(self.like.dtype))
        if not isinstance(metric, Tensor) or not bool(((metric > 0) & torch.isfinite(metric)).all()):
            raise InvalidOptionError("the metric must be a positive and finite tensor: it is the diagonal of M.")
        return metric.detach().to(rest).expand(rest.shape)

    def _unit(self, rest: Tensor, direction: Tensor, stencil: Stencil, noise: float) -> tuple[float, int]:
        """What the nodes of the stencil are multiplied by, and the solves it took to find out."""
        unit = 1.0 if self.scale == "absolute" else size_of(rest) / norm(direction)
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
            moved = norm(torch.stack(state).mean(0) - rest) / size_of(rest)
            unit *= target / moved if moved > 0 else _FROM_NOTHING
            if moved > 0 and 1 / _CLOSE_ENOUGH <= target / moved <= _CLOSE_ENOUGH:
                return unit, pilot * self.repeats
        if failure is not None:
            raise failure
        raise InvalidOptionError(
            f"scale='response' found no force that moves the state by {target:.1e} of its norm in {_PILOTS} "
            "solves. If solve ignores the current, add it to the forces that balance. If the state cannot move in the "
            "direction of the cotangent there is no gradient; else give scale='absolute'."
        )

    def _warn_of_saturation(self, response: Response) -> bool:
        """The pilot said how far each nudge would move the state, were the response linear."""
        visible = _VISIBLE * response.noise / math.sqrt(self.repeats)
        size = size_of(response.rest)
        for node, shift in zip(response.stencil.nodes, response.shifts, strict=True):
            moved, expected = norm(shift.mean(0)) / size, abs(node)
            if expected > visible and not 1 / _NEARLY_LINEAR <= moved / expected <= _NEARLY_LINEAR:
                warnings.warn(
                    f"the nudge {node:+.2g} moved the state by {moved:.1e} of its norm where a linear response would "
                    f"have moved it by {expected:.1e}: the response saturates, or the readings are cut off, and the "
                    "gradient is wrong. Use a smaller beta.",
                    TruncationWarning,
                    stacklevel=2,
                )
                return True
        return False

    def _standard_errors(self, response: Response) -> tuple[tuple[Any, Any], float]:
        """Those of the gradients, from the scatter of the repeats, and their degrees of freedom.

        The gradient is linear in the state at each node, so its variance is the sum over the nodes of that of the mean.
        """
        if self.repeats < 2:
            return (None, None), math.nan
        theta, x = (
            map_tensors(tree, lambda t: t.detach().requires_grad_(t.requires_grad)) for tree in (self.theta, self.x)
        )
        leaves = [t for t in (*tensors_of(theta), *tensors_of(x)) if t.requires_grad]
        # The free state is subtracted from each; in stencils that are symmetric about it, it cancels.
        weights = response.weights
        scatter = [*zip(weights, response.shifts, strict=True), (sum(weights), response.free - response.rest)]
        largest = max(abs(weight) for weight, _ in scatter)
        kept = [(weight, shift) for weight, shift in scatter if abs(weight) > 1e-9 * largest]
        variances: dict[int, Tensor] = {}
        if leaves:
            with torch.enable_grad():
                value = self.force(response.rest.to(self.like.dtype), theta, x)
            for weight, shift in kept:
                for sample in weight * (shift - shift.mean(0)):
                    vector = (sample if response.metric is None else sample / response.metric).to(value)
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
