"""Equilibrium propagation: nudged phases at the nodes of a stencil, combined to an error vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from torchdeq_ep._options import check_choice, check_metric
from torchdeq_ep.errors import InvalidOptionError, PrecisionWarning, TruncationWarning, unknown_name
from torchdeq_ep.holomorphic.context import Piecewise
from torchdeq_ep.jacobian import Metric, OperatorMetric
from torchdeq_ep.modes.accuracy import FACTOR, measured_nudge_error, smaller_factor
from torchdeq_ep.modes.amplitude import Amplitude, ForceScale
from torchdeq_ep.modes.base import Correction, Derivative, RelaxedMode, check_correction
from torchdeq_ep.modes.force import NudgedProblem
from torchdeq_ep.modes.judgement import (
    accepted_residual,
    default_tolerance,
    is_converged,
    require_repeatable,
)
from torchdeq_ep.modes.linear import fall_back, solve_by_operator, solve_linear
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.modes.schedules import NudgedPhases, Online
from torchdeq_ep.modes.stencils import Stencil
from torchdeq_ep.state import Equilibrium, norm

Batching = Literal["auto", "loop", "vmap"]
_STENCILS: dict[str, Callable[[], Stencil]] = {
    "one-sided": Stencil.one_sided,
    "symmetric": Stencil.symmetric,
    "richardson": Stencil.richardson,
    "contour": Stencil.contour,
}
_RETRIES = 4
_GAIN = 0.5
_LARGEST_NUDGE_ERROR, _LARGEST_ROUNDING = 0.03, 0.0145
_SPOILT = 0.01
_MOST = 0.5
_ONLINE_FLOOR = 1e-2


@dataclass(frozen=True)
class EquilibriumPropagation(RelaxedMode):
    """Equilibrium propagation: the error vector is read off nudged equilibria of the map itself.

    The estimate is `Re sum_k c_k d_k`, with `d_k` the displacement per unit of nudge at node `b_k` of the stencil
    (Scellier & Bengio 2017; Laborieux & Zenke, arXiv 2309.02214, eq. 8). It tends to `(I - J)^-1 g`, and needs no
    reverse-mode pass through `f` in the state.

    Args:
        stencil: A [`Stencil`][torchdeq_ep.Stencil], or the name of one with `beta="auto"`: `"one-sided"`,
            `"symmetric"`, `"richardson"` or `"contour"`.
        metric: Positive diagonal `M` as a function of the state, e.g. an
            [`ActivityMetric`][torchdeq_ep.ActivityMetric]; the estimate is `M^-1 (I - J)^-1 M g`, which is exact when
            `J M` is symmetric. `"auto"` fits one to the Jacobian, see
            [`automatic_metric`][torchdeq_ep.jacobian.automatic_metric].
        correction: `"asymmetric"` adds `J^T d - J d` to the map; the limit is then exact for every `J` (arXiv
            2602.03670).
        scale: `"relative"` multiplies the amplitude by `|z*| / |M g|`, one number for the whole batch; `"absolute"`
            takes it as it is.
        schedule: `"parallel"` solves every node to the tolerance; `"online"`, or an
            [`Online`][torchdeq_ep.Online] with its numbers, visits them in turn.
        solver: Name of a torchdeq solver or a callable of the same signature; `None` for the package's own.
        max_iter: Largest number of steps of one relaxation, by default 100.
        tol: Residual of the displacement relative to the force at which to stop; by default the rounding error of the
            stencil.
        batching: `"auto"` and `"loop"` solve one node after the other, each from the polynomial through those before
            it, which takes the fewest calls of `f`. `"vmap"` solves the real nodes in one stack and then the
            complex ones in another: more calls, but fewer launches, which small models on a GPU may prefer.
        piecewise: `"real-part"` lets complex nodes pass piecewise analytic operations such as ReLU, choosing the piece
            by the real part; the report counts the units that may have crossed a kink. `None` refuses them.
        on_divergence: What happens to an estimate that is none: one that diverged, or whose residual is above 0.1.
            `"shrink"` halves the amplitude, up to four times and as long as that helps, and then takes the best
            estimate with a warning; `"accept"` takes it at once; `"ift"` falls back to implicit differentiation, with a
            warning; `"raise"` raises. Unasked, an error is raised only if there is no finite estimate.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
        >>> mode = EquilibriumPropagation("symmetric")
        >>> z_star, cotangent = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> mode(lambda z: torch.tanh(matrix @ z), z_star, cotangent)
        tensor([1.3333, 0.6667], dtype=torch.float64)
    """

    stencil: Stencil | str = "symmetric"
    metric: Metric | None = field(default=None, kw_only=True)
    correction: Correction | None = field(default=None, kw_only=True)
    scale: ForceScale = field(default="relative", kw_only=True)
    schedule: Literal["parallel", "online"] | Online = field(default="parallel", kw_only=True)
    batching: Batching = field(default="auto", kw_only=True)
    piecewise: Piecewise | None = field(default=None, kw_only=True)

    worth_saying: ClassVar[float] = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stencil, str):
            if self.stencil not in _STENCILS:
                raise InvalidOptionError(unknown_name("stencil", self.stencil, _STENCILS))
            object.__setattr__(self, "stencil", _STENCILS[self.stencil]())
        elif not isinstance(self.stencil, Stencil):
            raise InvalidOptionError(f"stencil must be a tep.Stencil or the name of one, not {self.stencil!r}.")
        check_metric(self.metric)
        check_correction(self.correction, self.metric)
        check_choice("scale", self.scale, ("relative", "absolute"))
        check_choice("batching", self.batching, ("auto", "vmap", "loop"))
        if self.piecewise is not None:
            check_choice("piecewise", self.piecewise, ("real-part",))
        if not isinstance(self.schedule, Online):
            check_choice("schedule", self.schedule, ("parallel", "online"))

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        if isinstance(self.metric, OperatorMetric):
            return solve_by_operator(self, self.metric, equilibrium)
        memory, measuring = equilibrium.memory, equilibrium.memory.calls
        stencil = cast(Stencil, self.stencil).resolve(equilibrium.resolution)
        problem = NudgedProblem.pose(equilibrium, self.metric, self.correction, self.piecewise)
        equilibrium.used.metric = problem.metric
        amplitude = Amplitude(stencil, self.scale, problem.unit, equilibrium.resolution, equilibrium.rounding)
        start, limit = self._first_guess(problem, amplitude)
        if self._chooses_amplitude:
            growth = norm(start) / problem.force_size if self.correction else memory.growth
            amplitude = amplitude.for_displacement(growth).divided(memory.refinement).made_visible()
        amplitude.require_visible()
        if memory.prefers_limit and self._starts_at_limit and not memory.is_due(memory.beta) and limit.is_usable:
            displacement, report = start, limit
        else:
            displacement, report = self._nudged(problem, amplitude, start, limit)
        what = f"the {stencil.name} nudge (beta = {report.beta:.2g})" if report.beta else "the limit of the nudges"
        if self.on_divergence == "ift" and not report.is_usable:
            return fall_back(self, equilibrium, what, report)
        v = displacement if problem.metric is None else displacement / problem.metric
        calls = report.calls + problem.metric_calls + memory.calls - measuring
        report = replace(report, calls=calls, rounding=equilibrium.rounding)
        self.finish(equilibrium, what, v, report)
        if report.beta:
            growth = norm(displacement) / problem.force_size
            _warn_of_nudge_error(equilibrium, amplitude.at(report.beta), report, growth)
        return v.to(equilibrium.z.dtype), report

    def _nudged(
        self, problem: NudgedProblem, amplitude: Amplitude, start: Tensor, limit: NudgeReport
    ) -> tuple[Tensor, NudgeReport]:
        """What the nudges give, or the limit that they started from where they only spoil it."""
        displacement, report = self._solve_from(problem, amplitude, start)
        report = NudgeReport("", calls=limit.calls, iterations=limit.iterations, trace=limit.trace) + report
        if self._chooses_amplitude and self.correction is None:
            displacement, report = self._at_the_amplitude_of_the_way(problem, amplitude, displacement, report)
        if report.is_usable:
            displacement, report = self._checked(problem, amplitude, displacement, report)
        else:
            report = replace(report, nudge_error=math.nan)
        if not self._starts_at_limit or (report.is_usable and not limit.is_usable):
            return displacement, report
        spoilt = report.nudge_error > max(_SPOILT, limit.residual)
        problem.equilibrium.memory.prefers_limit = spoilt or not report.is_usable
        if not problem.equilibrium.memory.prefers_limit or limit.residual > report.residual:
            return displacement, report
        return start, replace(limit, calls=report.calls, iterations=report.iterations, trace=report.trace)

    def _checked(
        self, problem: NudgedProblem, amplitude: Amplitude, displacement: Tensor, report: NudgeReport
    ) -> tuple[Tensor, NudgeReport]:
        """With the error of the finite amplitude, measured when it is due; at a smaller one if that is too large."""
        memory, used = problem.equilibrium.memory, amplitude.at(report.beta)
        if memory.is_due(report.beta) or report.truncation > max(_LARGEST_NUDGE_ERROR, memory.nudge_error):
            found = measured_nudge_error(problem, used, displacement, report.residual, report.spread)
            report = replace(report, calls=report.calls + found.calls)
            # A nudge that began at its limit has that to fall back on.
            gains = self._chooses_amplitude and not self._starts_at_limit and found.size > report.residual
            factor = smaller_factor(found.size, used, report.tol) if gains else 1.0
            if factor > 1:
                smaller = used.divided(factor).made_visible()
                other, again = self._solve_from(problem, smaller, displacement.to(problem.force.dtype))
                closer = measured_nudge_error(problem, smaller.at(again.beta), other, again.residual, again.spread)
                report = replace(report, calls=report.calls + again.calls + closer.calls)
                if again.is_usable and closer.size < found.size:
                    memory.refinement *= factor
                    displacement, found = other, closer
                    report = replace(report + again, calls=report.calls, residual=again.residual, solved=again.solved)
            memory.measured(report.beta, found.size)
        return displacement, replace(report, nudge_error=memory.nudge_error)

    @property
    def derivative(self) -> Derivative:
        return "values" if self.correction is None else "both"

    @property
    def assumes_symmetry(self) -> bool:
        return self.correction is None

    @property
    def _chooses_amplitude(self) -> bool:
        return cast(Stencil, self.stencil).beta == "auto" and self.scale == "relative"

    def _at_the_amplitude_of_the_way(
        self, problem: NudgedProblem, amplitude: Amplitude, displacement: Tensor, report: NudgeReport
    ) -> tuple[Tensor, NudgeReport]:
        """Solved again at a smaller amplitude, if the displacement is much larger than what that was chosen for."""
        memory, growth = problem.equilibrium.memory, norm(displacement) / problem.force_size
        expected = memory.growth
        # In powers of three, so that an amplitude stays as it is from one pass to the next.
        memory.growth = FACTOR ** max(0, int(math.log(growth, FACTOR))) if growth > 0 else 1.0
        if not report.is_usable or memory.growth <= expected:
            return displacement, report
        smaller = amplitude.divided(memory.growth / expected).made_visible()
        displacement, again = self._solve_from(problem, smaller, displacement.to(problem.force.dtype))
        return displacement, replace(report + again, residual=again.residual, solved=again.solved)

    @property
    def _starts_at_limit(self) -> bool:
        return self.correction is not None and self._chooses_amplitude

    def _first_guess(self, problem: NudgedProblem, amplitude: Amplitude) -> tuple[Tensor, NudgeReport]:
        """With the asymmetric correction, the limit of vanishing nudges: it takes VJPs alone."""
        if problem.correction is None:
            return problem.force, NudgeReport("")
        equilibrium = problem.equilibrium
        tol = self.tol or default_tolerance(amplitude.tol, equilibrium.residual)
        limit = solve_linear(self, equilibrium, problem.correction.limit, problem.force, tol, amplitude.floor)
        report = NudgeReport(
            repr(self),
            calls=limit.steps,
            iterations=limit.steps,
            residual=limit.residual,
            tol=tol,
            converged=is_converged(limit, accepted_residual(self.tol, tol, amplitude.floor)),
            diverged=limit.diverged,
            rows_left=limit.left,
            solved=limit.solved,
            trace=limit.trace,
        )
        return limit.value[0], report

    def _solve_from(self, problem: NudgedProblem, amplitude: Amplitude, start: Tensor) -> tuple[Tensor, NudgeReport]:
        """At an amplitude, or at the best of smaller ones where that yields no estimate."""
        best, report = self._solve_at(problem, amplitude, start)
        attempt = report
        for _ in range(_RETRIES if self.on_divergence == "shrink" else 0):
            # A nudge that begins at its limit was not driven too far, unless it diverged.
            if attempt.is_usable or (self._starts_at_limit and not attempt.diverged):
                break
            before, amplitude = attempt, amplitude.divided(2)
            displacement, attempt = self._solve_at(problem, amplitude, start)
            calls, iterations = report.calls + attempt.calls, report.iterations + attempt.iterations
            tried = report.retries + 1
            if (attempt.diverged, attempt.solved) < (report.diverged, report.solved):
                best, report = displacement, attempt
            report = replace(report, calls=calls, iterations=iterations, retries=tried)
            # Half the nudge helps where the state was driven too far, and not where the steps did not suffice.
            if not before.diverged and attempt.solved > _GAIN * before.solved:
                break
        return best, report

    def _solve_at(self, problem: NudgedProblem, amplitude: Amplitude, start: Tensor) -> tuple[Tensor, NudgeReport]:
        tol = self.tol or default_tolerance(amplitude.tol, problem.equilibrium.residual)
        floor = amplitude.floor if self.schedule == "parallel" else _ONLINE_FLOOR
        accepted = accepted_residual(self.tol, tol, floor)
        run = self.run(problem.equilibrium, tol, floor)
        limited = self.tol is None
        phases = NudgedPhases(
            problem, amplitude, start, run, tol, accepted, limited, limited and self._starts_at_limit, self.piecewise
        )
        if self.schedule == "parallel":
            displacement, report = phases.parallel(stacked=self.batching == "vmap")
        else:
            displacement, report = phases.online(self.schedule if isinstance(self.schedule, Online) else Online())
        return displacement, replace(
            report, backward=repr(self), beta=amplitude.relative, nudge=amplitude.absolute, tol=tol
        )


def _finer(equilibrium: Equilibrium) -> str:
    if equilibrium.rounding > 2 * torch.finfo(equilibrium.z.dtype).eps:
        return (
            f"f rounds more coarsely than {equilibrium.z.dtype} does: compute in full precision inside "
            "(torch.set_float32_matmul_precision('highest'), no cast to a half precision)"
        )
    if equilibrium.z.dtype in (torch.float16, torch.bfloat16):
        return "Keep the state in float32 (torch.autocast does)"
    return "Compute in float64"


def _warn_of_nudge_error(equilibrium: Equilibrium, amplitude: Amplitude, report: NudgeReport, growth: float) -> None:
    """Say so if the finite amplitude spoils the vector: what was measured, or where rounding hides it, expected."""
    is_expected = amplitude.expected_rounding > _MOST * report.nudge_error
    largest = _LARGEST_ROUNDING if is_expected else _LARGEST_NUDGE_ERROR
    if not report.is_usable or report.nudge_error <= max(largest, report.residual):
        return
    if is_expected or amplitude.rounding > _MOST * report.nudge_error:
        require_repeatable(equilibrium)
        finding = (
            f"rounding of f ({amplitude.noise:.0e}) leaves an error of about {report.nudge_error:.0%} in what "
            f"a nudge of relative amplitude {report.beta:.2g} measures"
        )
        advice = f"Nudge further (beta, or 'auto'), or use 'ep-infinitesimal' or 'ift'. {_finer(equilibrium)}."
        equilibrium.memory.warn(PrecisionWarning, "rounding", finding, lambda: advice, report.nudge_error)
        return
    finding = (
        f"the {amplitude.stencil.name} nudge of relative amplitude {report.beta:.2g}, which moved the state by "
        f"{report.beta * growth:.1%} of its norm, is too large: it leaves {report.nudge_error:.0%} of the force in the "
        "equation of its limit"
    )
    bounds = [0.3 * report.radius] if report.radius == report.radius else []
    smaller = min([*bounds, report.beta / 10])
    advice = (
        f"Use beta={smaller:.1g} or less or 'auto', or a stencil of higher order. Where kinks of f (ReLU) are the "
        "cause, the error falls only slowly; 'ift' has none."
    )
    equilibrium.memory.warn(TruncationWarning, "amplitude", finding, lambda: advice, report.nudge_error)
