"""What one backward solve did, phase by phase: reports of phases add up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torchdeq_ep._display import html_fields
from torchdeq_ep.holomorphic.context import Crossing

MEANINGLESS = 0.1
"""An estimate with a larger relative residual than this may be no estimate at all."""


@dataclass(frozen=True)
class NudgeReport:
    """What one backward solve did.

    Args:
        backward: Description of the mode.
        beta: Relative amplitude used (after `"auto"` and any shrinking); 0 for modes without a nudge.
        nudge: Absolute amplitude used: `beta * |z*| / |M g|` for relative scaling ([eq. (9)][eq-9]).
        calls: States at which `f` was evaluated, plus products with its Jacobian.
        iterations: Steps of all relaxations together; one step may evaluate several stacked nodes.
        residual: Largest relative residual `|D(d) - d| / |M g|` of a node, over the whole state.
        tol: The tolerance it was to reach.
        converged: Whether it did, up to the rounding error of a finite nudge, but to 0.003 at least.
        rows_left: Largest number of samples in a phase that were left before their tolerance, because their free phase
            stopped too early to solve for more.
        solved: As `residual`, without these samples.
        rows_lost: Number of samples whose own cotangent is smaller than what the solve leaves of that of the batch:
            their error vectors are noise, which the gradient of the batch does not feel.
        diverged: Whether the residual grew beyond all bounds, or the way was so long that it means nothing.
        batching: `"vmap"` or `"loop"`: how stacked nodes were evaluated.
        retries: How often the amplitude was halved.
        crossings: What piecewise analytic operations did at complex nodes (`piecewise="real-part"`).
        truncation: Estimate of the relative error of a contour, from the decay of the displacement's Fourier
            coefficients over its nodes; NaN for other stencils.
        radius: Estimate of the relative amplitude at which they would cease to decay, the radius of convergence of
            [eq. (15)][eq-15]; NaN likewise.
        nudge_error: What the finite amplitude adds to the error vector, relative to the force: its residual in the
            equation of vanishing nudges, as it was last measured, and rounding; 0 for modes without a nudge, NaN for
            an estimate that is not usable, of which it is not measured.
        rounding: Relative rounding error of one call of `f`, as measured; NaN for a mode that did not need it.
        adjoint_residual: `|v - J^T v - g| / |g|`, the residual of the error vector in the exact equation: asymmetry and
            all other errors together. NaN where the backward pass did not reach the state.
        inconsistency: `|<v, M (v - g)> - <J^T v, M v>| / (|v| |M (v - g)|)`, near 0 unless autograd's derivative of `f`
            is not that of its values; NaN likewise.
        spread: Half the difference of the displacements at two opposite nodes, relative to their mean: how much the
            response bends within the nudge; NaN for stencils without such nodes.
        trace: Relative residual at every step at which it was measured, one relaxation after the other.

    Example:
        >>> report = NudgeReport("ep", beta=0.01, calls=30, residual=2e-4, tol=1e-4, converged=False)
        >>> report.residual <= report.tol
        False
    """

    backward: str
    beta: float = 0.0
    nudge: float = 0.0
    calls: int = 0
    iterations: int = 0
    residual: float = 0.0
    tol: float = 0.0
    converged: bool = True
    diverged: bool = False
    rows_left: int = 0
    solved: float = 0.0
    rows_lost: int = 0
    batching: str = "loop"
    retries: int = 0
    crossings: tuple[Crossing, ...] = ()
    truncation: float = math.nan
    radius: float = math.nan
    nudge_error: float = 0.0
    spread: float = math.nan
    rounding: float = math.nan
    adjoint_residual: float = math.nan
    inconsistency: float = math.nan
    trace: tuple[float, ...] = ()

    def _repr_html_(self) -> str:
        return html_fields(self)

    @property
    def is_usable(self) -> bool:
        """Whether the estimate is one: not diverged, with a residual of 0.1 at most but for samples that were left."""
        return not self.diverged and self.solved <= MEANINGLESS

    @property
    def inexactness(self) -> float:
        """What the solve and the finite nudge leave in the equation of the mode; infinite where it is not usable."""
        return self.residual + self.nudge_error if self.is_usable else math.inf

    def __add__(self, later: NudgeReport) -> NudgeReport:
        """Two phases of one solve together: counts add up, the worse residual counts, the rest is the later's."""
        return replace(
            later,
            calls=self.calls + later.calls,
            iterations=self.iterations + later.iterations,
            residual=max(self.residual, later.residual),
            converged=self.converged and later.converged,
            diverged=self.diverged or later.diverged,
            rows_left=max(self.rows_left, later.rows_left),
            solved=max(self.solved, later.solved),
            rows_lost=max(self.rows_lost, later.rows_lost),
            batching=later.batching if self.batching == "loop" else self.batching,
            retries=self.retries + later.retries,
            crossings=self.crossings + later.crossings,
            trace=self.trace + later.trace,
        )
