"""Modes that take products with the Jacobian, so that their equation is linear in the error vector.

With `J = df/dz` at `z*` and `g = dL/dz*`, implicit differentiation solves `v = J^T v + g`, eq. (3) of the theory page;
the infinitesimal nudge `d = J d + g`, eq. (4), the limit of every finite one. The two are the same vector when `J` is
symmetric, or with a metric or a correction that makes up for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from torchdeq_ep._options import check_metric
from torchdeq_ep.errors import FallbackWarning
from torchdeq_ep.jacobian import Metric, OperatorMetric, Product, jvp, vjp
from torchdeq_ep.jacobian.metric import diagonal_metric, scaled_adjoint
from torchdeq_ep.modes.base import (
    DEFAULT_MAX_ITER,
    Correction,
    Derivative,
    RelaxedMode,
    check_correction,
)
from torchdeq_ep.modes.judgement import FreeLimit, accepted_residual, default_tolerance, is_converged
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.relaxation import GMRES, Relaxation, gmres, relax_linear
from torchdeq_ep.state import Equilibrium


@dataclass(frozen=True)
class LinearMode(RelaxedMode):
    """A mode whose map is affine in the error vector, so that one relaxation of one vector solves it."""

    linear: ClassVar[bool] = True

    @property
    def derivative(self) -> Derivative:
        return "autograd"

    def _solve_linear(self, equilibrium: Equilibrium, product: Product, force: Tensor) -> tuple[Tensor, NudgeReport]:
        """Solve `v = product(v) + force`."""
        measuring = equilibrium.memory.calls
        tol = self.tol or default_tolerance(10 * equilibrium.resolution, equilibrium.residual)
        floor = 100 * equilibrium.resolution
        relaxation = solve_linear(self, equilibrium, product, force, tol, floor)
        vector = relaxation.value[0].to(force.dtype)
        report = NudgeReport(
            repr(self),
            calls=relaxation.steps + 1 + equilibrium.memory.calls - measuring,
            iterations=relaxation.steps,
            residual=relaxation.residual,
            tol=tol,
            converged=is_converged(relaxation, accepted_residual(self.tol, tol, floor)),
            diverged=relaxation.diverged,
            rows_left=relaxation.left,
            rounding=equilibrium.rounding,
            solved=relaxation.solved,
            trace=relaxation.trace,
        )
        return vector, report


@dataclass(frozen=True)
class ImplicitDifferentiation(LinearMode):
    """Implicit differentiation: `v = J^T v + g`, by VJPs. What torchdeq calls IFT; exact for every map.

    It solves [eq. (3)][eq-3] of the theory page.

    Args:
        solver: Name of a torchdeq solver or a callable; `"gmres"` for a Krylov space of each sample; `None` for the
            package's own loop, and GMRES where that does not converge.
        max_iter: Largest number of VJPs, by default 100, and as many by GMRES. One that is given leaves GMRES out.
        tol: Residual relative to the cotangent at which to stop; by default 10 times the rounding error of the dtype,
            or a tenth of the residual of the free phase if that is more.
        on_divergence: `"raise"` raises if the residual is above 0.1; otherwise the best estimate is returned, with a
            warning.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> ImplicitDifferentiation()(lambda z: matrix @ z, torch.zeros(2), torch.ones(2))
        tensor([1.0000, 1.5000])
    """

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        product = vjp(equilibrium.f, equilibrium.z)
        vector, report = self._solve_linear(equilibrium, product, equilibrium.cotangent)
        self.finish(equilibrium, "the adjoint iteration", vector, report)
        return vector, report


@dataclass(frozen=True)
class InfinitesimalEP(LinearMode):
    """The limit of vanishing nudges, `d = J d + g`, by forward-mode JVPs: the reference value of every EP mode.

    It solves [eq. (4)][eq-4] of the theory page; with a metric [eq. (12)][eq-12], with the correction [eq. (3)][eq-3].

    Args:
        metric: Positive diagonal `M` as a function of the state, e.g. an
            [`ActivityMetric`][torchdeq_ep.jacobian.ActivityMetric]; the result is `M^-1 (I - J)^-1 M g`. `"auto"` fits
            one to the Jacobian, see [`automatic_metric`][torchdeq_ep.jacobian.automatic_metric]. An
            [`OperatorMetric`][torchdeq_ep.jacobian.OperatorMetric] is any symmetric positive operator.
        correction: `"asymmetric"` replaces `J` by its adjoint, which makes the result exact.
        solver: Name of a torchdeq solver or a callable; `"gmres"` for a Krylov space of each sample; `None` for the
            package's own loop, and GMRES where that does not converge.
        max_iter: Largest number of JVPs, by default 100, and as many by GMRES. One that is given leaves GMRES out.
        tol: Residual relative to the force at which to stop; by default 10 times the rounding error of the dtype, or a
            tenth of the residual of the free phase if that is more.
        on_divergence: As for [`EquilibriumPropagation`][torchdeq_ep.EquilibriumPropagation]; `"shrink"` has nothing to
            shrink, and means `"accept"`.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> InfinitesimalEP()(lambda z: matrix @ z, torch.zeros(2), torch.ones(2))
        tensor([1.5000, 1.0000])
    """

    metric: Metric | None = field(default=None, kw_only=True)
    correction: Correction | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric)
        check_correction(self.correction, self.metric)

    @property
    def assumes_symmetry(self) -> bool:
        return self.correction is None

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        if isinstance(self.metric, OperatorMetric):
            return solve_by_operator(self, self.metric, equilibrium)
        metric, metric_calls = diagonal_metric(self.metric, equilibrium.f, equilibrium.z)
        equilibrium.used.metric = metric
        force = equilibrium.cotangent if metric is None else metric * equilibrium.cotangent
        f, z = equilibrium.f, equilibrium.z
        product = scaled_adjoint(vjp(f, z), metric) if self.correction else jvp(f, z)
        displacement, report = self._solve_linear(equilibrium, product, force)
        report = replace(report, calls=report.calls + metric_calls)
        if self.on_divergence == "ift" and not report.is_usable:
            return fall_back(self, equilibrium, "the infinitesimal nudge", report)
        vector = displacement if metric is None else displacement / metric
        self.finish(equilibrium, "the infinitesimal nudge", vector, report)
        return vector, report


def solve_linear(
    mode: RelaxedMode, equilibrium: Equilibrium, product: Product, force: Tensor, tol: float, floor: float
) -> Relaxation:
    """Solve `v = product(v) + force` by the solver of a mode.

    Where that is left to the package, and its loop does not converge, GMRES takes over: it has the smallest residual
    for every product it takes, whatever the spectral radius, and is not misled by residuals that grow before they fall,
    as those of a Jacobian far from normal do. A layer in which it did better begins with it from then on.

    Args:
        mode: The mode.
        equilibrium: The free equilibrium.
        product: A linear map of one vector.
        force: The term that does not depend on `v`.
        tol: Relative residual at which to stop.
        floor: Relative residual that rounding may leave.

    Returns:
        The estimate, as a stack of one; with the steps of all that were taken.
    """
    memory = equilibrium.memory
    enough = FreeLimit(equilibrium, force) if mode.tol is None else None
    is_ours = mode.solver is None and mode.max_iter is None

    def by_krylov() -> Relaxation:
        budget, rows = mode.max_iter or DEFAULT_MAX_ITER, equilibrium.independent_rows
        return gmres(product, force, tol=tol, max_iter=budget, floor=floor, rows=rows, enough=enough)

    if mode.solver == GMRES or (is_ours and memory.krylov_gains):
        return by_krylov()
    relaxation = relax_linear(mode.run(equilibrium, tol, floor), product, force, enough)
    has_converged = is_converged(relaxation, accepted_residual(mode.tol, tol, floor))
    if has_converged or not is_ours or memory.krylov_gains is False:
        return relaxation
    other = by_krylov()
    memory.krylov_gains = (other.diverged, other.solved) < (relaxation.diverged, relaxation.solved)
    best = other if memory.krylov_gains else relaxation
    return replace(best, steps=relaxation.steps + other.steps, trace=relaxation.trace + other.trace)


def solve_by_operator(
    mode: RelaxedMode, metric: OperatorMetric, equilibrium: Equilibrium
) -> tuple[Tensor, NudgeReport]:
    """The error vector with a metric that is an operator: that of `M g` without a metric, and `M^-1` of it.

    Args:
        mode: The mode; its field `metric` is replaced.
        metric: The metric.
        equilibrium: The free equilibrium. The cotangent is frozen, whatever its loss.

    Returns:
        An error vector, and its report.
    """
    plain: Any = mode
    kind = "accept" if mode.on_divergence == "ift" else mode.on_divergence
    force = metric.apply(equilibrium.cotangent)
    posed = replace(equilibrium, cotangent=force, loss_of_state=None)
    displacement, report = replace(plain, metric=None, on_divergence=kind)._solve(posed)
    if mode.on_divergence == "ift" and not report.is_usable:
        return fall_back(mode, equilibrium, "the nudge", report)
    equilibrium.used.metric = metric
    return metric.inverse(displacement), replace(report, backward=repr(mode))


def fall_back(
    mode: RelaxedMode, equilibrium: Equilibrium, what: str, report: NudgeReport
) -> tuple[Tensor, NudgeReport]:
    """The answer of implicit differentiation, whatever it is, in place of an estimate that is none.

    Args:
        mode: Whose estimate it would have been.
        equilibrium: The free equilibrium.
        what: What was relaxed.
        report: Of the solve.

    Returns:
        An error vector, and its report.
    """
    finding = f"implicit differentiation took over, because {what} stopped at a residual of {report.residual:.1e}"
    advice = "The gradient is that of 'ift', and as good as its own residual."
    equilibrium.memory.warn(FallbackWarning, "nudge", finding, lambda: advice, report.residual)
    equilibrium.used.assumed_symmetry = False
    adjoint = ImplicitDifferentiation(max_iter=mode.max_iter, tol=mode.tol, on_divergence="accept")
    return adjoint._solve(equilibrium)
