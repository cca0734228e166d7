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

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.black_box.containers import map_tensors, of_other_tensors, tensors_of
from torchdeq_ep.black_box.instrument import Instrument, Measurement, Nudge
from torchdeq_ep.black_box.law_check import LawCheck, Phases, rounding_of_a_solve
from torchdeq_ep.black_box.reciprocity import Reciprocity, measure_reciprocity
from torchdeq_ep.black_box.report import EquilibriumReport
from torchdeq_ep.black_box.response import Response, size_of
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
from torchdeq_ep.state import norm

ForceLaw = Callable[[Tensor, Any, Any], Tensor]

_PILOTS = 12
_CLOSE_ENOUGH = 2.0
_VISIBLE = 10.0
_NEARLY_LINEAR = 1.5
_FROM_NOTHING = 1e3
_AFTER_A_FAILURE = 1e-2


@dataclass(frozen=True)
class Nudged:
    """What the nudged phases took: solves, and solves that failed and were repeated."""

    calls: int
    failures: int


@dataclass(frozen=True)
class System:
    """One call of `attach_equilibrium`, as its autograd node remembers it."""

    instrument: Instrument
    force: ForceLaw
    theta: Any
    x: Any
    stencil: Stencil | str
    scale: ForceScale | Literal["response"]
    metric: Tensor | Callable[[Tensor], Tensor] | None
    repeats: int
    noise: float | None
    check: bool | Literal["reciprocity"]
    writer: Callable[[EquilibriumReport], None] | None
    seen: list[tuple[Tensor, int]] = field(init=False)

    def __post_init__(self) -> None:
        chosen = cast(Stencil, EquilibriumPropagation(self.stencil).stencil)
        if not chosen.is_real:
            raise NotHolomorphicError(
                f"the {chosen.name} stencil nudges by complex forces, which a black box cannot be given. Use "
                "Stencil.richardson for a high order."
            )
        if not callable(self.force):
            raise InvalidOptionError(f"force must be a function force(z, theta, x), not {self.force!r}.")
        check_choice("scale", self.scale, ("relative", "absolute", "response"))
        if self.metric is not None and not isinstance(self.metric, Tensor) and not callable(self.metric):
            raise InvalidOptionError(f"metric must be a tensor, a function of the state, or None, not {self.metric!r}.")
        if self.noise is not None and not (isinstance(self.noise, (int, float)) and 0 < self.noise < math.inf):
            raise InvalidOptionError(f"noise must be a positive number or None, not {self.noise!r}.")
        check_count("repeats", self.repeats, 1)
        if not isinstance(self.check, bool):
            check_choice("check", self.check, ("reciprocity",))
        object.__setattr__(self, "stencil", chosen)
        object.__setattr__(self, "seen", self._seen())

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that the caller computes in."""
        tensors = [t for t in (*tensors_of(self.theta), *tensors_of(self.x)) if t.is_floating_point()]
        return tensors[0] if tensors else torch.zeros(())

    def free_phase(self, shape: torch.Size | None) -> Measurement:
        zero = self.like.new_zeros(() if shape is None else shape)
        return self._measure([(0.0, zero)], shape)

    def error_vector(self, free: Measurement, cotangent: Tensor) -> Tensor:
        """What the gradient is the VJP of the law with: `K^-T g`, if the system is reciprocal."""
        self._require_usable(cotangent)
        if norm(cotangent) == 0.0:
            return torch.zeros_like(cotangent)
        metric = self._metric(torch.stack(free.states).mean(0))
        (response,), nudged = self.responses(free, [cotangent if metric is None else metric * cotangent], metric)
        law, named = self._judge(response, free.eps)
        agrees = law is None or not law.is_wrong or named
        mutual = self._reciprocity(response, cotangent) if self.check == "reciprocity" and agrees else None
        if self.writer is not None:
            calls = len(free.states) + nudged.calls + (2 * self.repeats if mutual else 0)
            self.writer(self._report(response, law, mutual, calls, free.failures + nudged.failures))
        if law is not None and not named:
            law.require_agreement()
        if mutual is not None:
            mutual.warn_of_asymmetry()
        displacement = response.displacement
        return (displacement if metric is None else displacement / metric).to(cotangent)

    def tangents(self, free: Measurement, forces: Sequence[Tensor]) -> tuple[list[Response | None], Nudged]:
        """How the state follows forces, `K^-1 h` each: what a change of the parameters does. No symmetry is needed.

        Args:
            free: The free phase.
            forces: What the changes of the parameters would push by.

        Returns:
            A response for each, or `None` if it pushes nothing; and what it took.
        """
        for force in forces:
            self._require_usable(force, "the change of the force, dF/dtheta dtheta,")
        pushing = [force for force in forces if norm(force) > 0.0]
        responses, nudged = self.responses(free, pushing, None) if pushing else ([], Nudged(0, 0))
        for response in responses:
            law, named = self._judge(response, free.eps)
            if law is not None and not named:
                law.require_agreement()
        found = iter(responses)
        return [next(found) if norm(force) > 0.0 else None for force in forces], nudged

    def responses(
        self, free: Measurement, directions: Sequence[Tensor], metric: Tensor | None
    ) -> tuple[list[Response], Nudged]:
        """The nudged phases of several forces, all of them at once."""
        samples = torch.stack(free.states)
        rest = samples.mean(0)
        noise = self._noise(samples, free.eps)
        stencil = cast(Stencil, self.stencil).resolve(noise / self.repeats**0.5)
        amplitudes: list[list[float]] = []
        forces: list[tuple[complex, Tensor]] = []
        calls = 0
        for direction in directions:
            unit, pilots = self._unit(rest, direction.to(rest.dtype), stencil, noise)
            calls += pilots
            amplitudes.append([unit * cast(float, node) for node in stencil.nodes])
            forces += [
                (node, b * direction.to(rest.dtype)) for node, b in zip(stencil.nodes, amplitudes[-1], strict=True)
            ]
        nudged = self._measure(forces, rest.shape)
        states = torch.stack(nudged.states).reshape(len(directions), -1, self.repeats, *rest.shape)
        responses = [
            Response(samples, own, stencil, factors, direction.to(rest.dtype), metric, noise)
            for own, factors, direction in zip(states, amplitudes, directions, strict=True)
        ]
        return responses, Nudged(calls + len(nudged.states), nudged.failures)

    def _judge(self, response: Response, answered: float) -> tuple[LawCheck | None, bool]:
        """The check of the law, if it is wanted, and whether a warning of saturation has said what there is to say."""
        cut_off = self.scale == "response" and self._warn_of_saturation(response)
        law = self._check_law(response, answered) if self.check else None
        return law, cut_off and law is not None and law.may_be_cut_off

    def _require_usable(self, cotangent: Tensor, name: str = "the cotangent dL/dz*") -> None:
        if not bool(torch.isfinite(cotangent).all()):
            raise NonFiniteError(
                f"{name} has {int((~torch.isfinite(cotangent)).sum())} of {cotangent.numel()} entries that are NaN or "
                "infinite, so there is nothing to nudge by. Look for overflow in the loss."
            )
        if not self._is_unchanged():
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
        theta, x = (of_other_tensors(tree, _as_leaf) for tree in (self.theta, self.x))
        leaves = [t for t in (*tensors_of(theta), *tensors_of(x)) if t.requires_grad]
        variances: dict[int, Tensor] = {}
        if leaves:
            with torch.enable_grad():
                value = self.force(response.rest.to(self.like.dtype), theta, x)
            for weight, shift in response.scatter:
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
        return cast(tuple[Any, Any], tuple(errors)), response.degrees_of_freedom

    def _seen(self) -> list[tuple[Tensor, int]]:
        tensors = [*tensors_of(self.theta), *tensors_of(self.x)]
        return [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def _is_unchanged(self) -> bool:
        now = self._seen()
        return len(now) == len(self.seen) and all(
            tensor is before and version == then
            for (tensor, version), (before, then) in zip(now, self.seen, strict=True)
        )


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def require_shape(value: object, state: Tensor) -> None:
    """Raise MapContractError unless a value of the law has the shape of the state."""
    if isinstance(value, Tensor) and value.shape == state.shape:
        return
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise MapContractError(
        f"force returned {got} where the state has shape {tuple(state.shape)}: it is the force on each of its entries. "
        "If the solver makes its state in the shape of the current, give shape=."
    )
