"""Equilibrium propagation: nudged phases at the nodes of a stencil, combined to an error vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from torch import Tensor

from torchdeq_ep._options import check_choice, check_metric
from torchdeq_ep.errors import InvalidOptionError, PrecisionWarning, TruncationWarning, unknown_name
from torchdeq_ep.holomorphic.context import Piecewise
from torchdeq_ep.jacobian import Metric
from torchdeq_ep.modes.amplitude import Amplitude, ForceScale
from torchdeq_ep.modes.base import Correction, RelaxedMode, check_correction
from torchdeq_ep.modes.force import NudgedProblem
from torchdeq_ep.modes.judgement import FreeLimit, accepted_residual, default_tolerance
from torchdeq_ep.modes.linear import fall_back
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.modes.schedules import NudgedPhases, Online
from torchdeq_ep.modes.stencils import Stencil
from torchdeq_ep.relaxation import relax_linear
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
_MUCH_LARGER = 3.0
_COARSE = 0.02
_LARGEST_TRUNCATION = 0.05
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stencil, str):
            if self.stencil not in _STENCILS:
                raise InvalidOptionError(unknown_name("stencil", self.stencil, _STENCILS))
            object.__setattr__(self, "stencil", _STENCILS[self.stencil]())
        elif not isinstance(self.stencil, Stencil):
            raise InvalidOptionError(f"stencil must be a tep.Stencil or the name of one, not {self.stencil!r}.")
        check_metric(self.metric)
        check_correction(self.correction)
        check_choice("scale", self.scale, ("relative", "absolute"))
        check_choice("batching", self.batching, ("auto", "vmap", "loop"))
        if self.piecewise is not None:
            check_choice("piecewise", self.piecewise, ("real-part",))
        if not isinstance(self.schedule, Online):
            check_choice("schedule", self.schedule, ("parallel", "online"))

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        stencil = self._resolved_stencil(equilibrium)
        advance = equilibrium.residual > max(stencil.expected_error(equilibrium.eps), self.tol or 0.0)
        returned = equilibrium.value
        measuring = equilibrium.memory.calls
        if advance:  # one call of f, so that an early stop of the free phase costs no more than it costs the adjoint
            equilibrium = equilibrium.advanced()
        problem = NudgedProblem.pose(equilibrium, returned, self.metric, self.correction, self.piecewise)
        amplitude = Amplitude(stencil, self.scale, problem.unit, equilibrium.eps)
        start, limit = self._first_guess(problem, amplitude)
        if self._chooses_amplitude:
            growth = norm(start) / problem.force_size if self.correction else equilibrium.memory.growth
            amplitude = amplitude.for_displacement(growth)
        amplitude.require_visible()
        displacement, report = self._solve_from(problem, amplitude, start)
        report = limit + report
        if self._chooses_amplitude and self.correction is None:
            displacement, report = self._at_the_amplitude_of_the_way(problem, amplitude, displacement, report)
        what = f"the {stencil.name} nudge (beta = {report.beta:.2g})"
        if self.on_divergence == "ift" and not report.is_usable:
            return fall_back(self, equilibrium, what, report)
        v = displacement if problem.metric is None else displacement / problem.metric
        report = replace(
            report, calls=report.calls + advance + problem.metric_calls + equilibrium.memory.calls - measuring
        )
        self.finish(equilibrium, what, v, report)
        _warn_of_truncation(equilibrium, amplitude, report)
        if self._chooses_amplitude:
            _warn_of_the_way(equilibrium, stencil, report, norm(displacement) / problem.force_size)
        return v.to(equilibrium.z.dtype), report

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
        memory.growth = _MUCH_LARGER ** max(0, int(math.log(growth, _MUCH_LARGER))) if growth > 0 else 1.0
        if not report.is_usable or memory.growth <= expected:
            return displacement, report
        smaller = amplitude.for_displacement(memory.growth / expected)
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
        enough = FreeLimit(equilibrium, problem.force) if self.tol is None else None
        run = self.run(equilibrium, tol, amplitude.floor)
        limit = relax_linear(run, problem.correction.limit, problem.force, enough)
        report = NudgeReport("", calls=limit.steps, iterations=limit.steps, trace=limit.trace)
        return (problem.force if limit.diverged else limit.value[0]), report

    def _solve_from(self, problem: NudgedProblem, amplitude: Amplitude, start: Tensor) -> tuple[Tensor, NudgeReport]:
        """At an amplitude, or at the best of smaller ones where that yields no estimate."""
        best, report = self._solve_at(problem, amplitude, start)
        attempt = report
        for _ in range(_RETRIES if self.on_divergence == "shrink" else 0):
            # A nudge that begins at its limit was not driven too far, unless it diverged.
            if attempt.is_usable or (self._starts_at_limit and not attempt.diverged):
                break
            before, amplitude = attempt, amplitude.halved()
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

    def _resolved_stencil(self, equilibrium: Equilibrium) -> Stencil:
        chosen = cast(Stencil, self.stencil)
        stencil = chosen.resolve(equilibrium.eps)
        expected = stencil.expected_error(equilibrium.eps)
        if chosen.beta == "auto" and expected > _COARSE:
            finding = (
                f"with rounding errors of {equilibrium.eps:.0e} in f, the {stencil.name} stencil is good to about "
                f"{expected:.0%}"
            )
            advice = "Keep the state in float32 (torch.autocast does), or use 'ep-infinitesimal' or 'ift'."
            equilibrium.memory.warn(PrecisionWarning, "dtype", finding, lambda: advice, expected)
        return stencil

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


def _warn_of_the_way(equilibrium: Equilibrium, stencil: Stencil, report: NudgeReport, growth: float) -> None:
    moved = report.beta * growth
    if stencil.is_real and report.converged and moved**stencil.order > _COARSE:
        finding = f"the {stencil.name} nudge moved the state by {moved:.0%} of its norm, which is no small nudge"
        advice = (
            f"Its error is of the order of {moved**stencil.order:.0%}. The dtype of f is too coarse for a smaller one: "
            "keep the state in float32, or use 'ift', 'ep-infinitesimal' or a stencil of higher order."
        )
        equilibrium.memory.warn(PrecisionWarning, "displacement", finding, lambda: advice, moved)


def _warn_of_truncation(equilibrium: Equilibrium, amplitude: Amplitude, report: NudgeReport) -> None:
    if report.truncation > _LARGEST_TRUNCATION:
        finding = (
            f"the {amplitude.stencil.name} stencil of relative amplitude {report.beta:.2g} is too large: its "
            f"estimated error is {report.truncation:.0%}, because the displacement is analytic only up to about "
            f"{report.radius:.2g}"
        )
        advice = f"Use beta={0.3 * report.radius:.1g} or less, or more points."
        equilibrium.memory.warn(TruncationWarning, "contour", finding, lambda: advice, report.truncation)
