"""What a backward mode is: from a free equilibrium and a cotangent to an error vector; and the two linear modes.

With `J = df/dz` at `z*` and `g = dL/dz*`, implicit differentiation solves `v = J^T v + g`, eq. (3) of the theory page;
every nudged mode solves `d = D_b(d)`, eq. (6), and so tends to `(I - J)^-1 g`, eq. (4), which is the same vector when
`J` is symmetric, or with a metric or a correction that makes up for it. A mode is an immutable value: it can be
compared, pickled and shared between threads.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchdeq_ep.displacement import diagonal_metric, scaled_adjoint
from torchdeq_ep.equilibrium import Equilibrium, Packing, State, norm, relative_difference
from torchdeq_ep.errors import (
    ConvergenceWarning,
    InvalidOptionError,
    NudgeDivergedError,
    StochasticMapError,
)
from torchdeq_ep.evaluation import STATEFUL, change_tolerance, undisturbed
from torchdeq_ep.holomorphic.mode import Crossing
from torchdeq_ep.jacobian import Product, jvp, vjp
from torchdeq_ep.metric import Metric
from torchdeq_ep.relaxation import Relaxation, Solver, Step, check_solver, relax

Correction = Literal["asymmetric"]

DEFAULT_MAX_ITER = 100
UNCONVERGED_STATE = 1e-2
"""A free state with a larger relative residual than this is warned about: its gradient is off by about as much."""
MEANINGLESS = 0.1
"""A relaxation that stops with a larger relative residual than this has found no estimate at all."""


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
        converged: Whether it did, up to the rounding error of a finite nudge.
        batching: `"vmap"` or `"loop"`: how stacked nodes were evaluated.
        retries: How often the amplitude was halved.
        crossings: What piecewise analytic operations did at complex nodes (`piecewise="real-part"`).
        truncation: Estimate of the relative error of a contour, from the decay of the displacement's Fourier
            coefficients over its nodes; NaN for other stencils.
        radius: Estimate of the relative amplitude at which they would cease to decay, the radius of convergence of
            [eq. (15)][eq-15]; NaN likewise.
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
    batching: str = "loop"
    retries: int = 0
    crossings: tuple[Crossing, ...] = ()
    truncation: float = math.nan
    radius: float = math.nan
    trace: tuple[float, ...] = ()


@dataclass(frozen=True)
class Backward(ABC):
    """Base class of the backward modes that come with the package.

    A mode is called as `mode(f, z_star, cotangent)` and returns the error vector. Any callable of that form can take
    the place of a mode; deriving from this class adds the checks, and a report of each solve.

    Example:
        >>> mode = ImplicitDifferentiation(tol=1e-6)
        >>> isinstance(mode, Backward)
        True
        >>> mode(lambda z: 0.5 * z, torch.zeros(2), torch.ones(2))
        tensor([2., 2.])
    """

    def __call__(self, f: Callable[..., Any], z_star: State, cotangent: State) -> State:
        """The error vector at a fixed point.

        Args:
            f: The map: a tensor to a tensor of the same shape, or several to several.
            z_star: Fixed point of `f`: a tensor of any shape, or a tuple or list of tensors.
            cotangent: `dL/dz*`, of the same form.

        Returns:
            The error vector, of the same form; detached.

        Raises:
            MapContractError: If `f` changes shape or dtype.
            NonFiniteError: If the cotangent or `f(z_star)` is not finite.
            NudgeDivergedError: If the relaxation diverges.
        """
        packing = Packing.of(z_star)
        z = packing.pack(z_star, "z_star").detach()
        g = packing.pack(cotangent, "the cotangent").detach()
        packed = packing.map(f)
        with undisturbed() as guard:
            value = packed(z).clone()  # f may return a buffer that its next call overwrites
        equilibrium = Equilibrium(packed, z, value, g, torch.finfo(z.dtype).eps, guard.withheld)
        return packing.unpack(self.solve(equilibrium)[0])

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        """The error vector of a packed equilibrium, and a report of how it was found.

        Args:
            equilibrium: The free state and its cotangent.

        Returns:
            A tensor of the shape of the packed state, and the report.

        Raises:
            NonFiniteError: If the cotangent or `f(z*)` is not finite.
            NudgeDivergedError: If the relaxation diverges.
        """
        equilibrium.require_finite()
        residual = equilibrium.residual
        if residual > UNCONVERGED_STATE:
            warnings.warn(
                f"the free phase stopped at a relative residual |f(z*) - z*| / |z*| of {residual:.1e}, so the gradient "
                "is taken at a state that is not an equilibrium. Raise f_max_iter, or use a solver that converges "
                "(f_solver='anderson' or 'broyden').",
                ConvergenceWarning,
                stacklevel=2,
            )
        if equilibrium.cotangent_size == 0.0:
            return torch.zeros_like(equilibrium.z), NudgeReport(repr(self), calls=0)
        with undisturbed(equilibrium.records):
            return self._solve(equilibrium)

    @abstractmethod
    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        """The error vector for a finite, non-zero cotangent; called where calls of `f` leave no trace."""


@dataclass(frozen=True)
class RelaxedBackward(Backward):
    """A mode whose error vector is the fixed point of a map: its solver, and what it does if that fails."""

    solver: str | Solver | None = field(default=None, kw_only=True)
    max_iter: int | None = field(default=None, kw_only=True)
    tol: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_iter is not None and (not isinstance(self.max_iter, int) or self.max_iter < 1):
            raise InvalidOptionError(f"max_iter must be a whole number of at least 1, not {self.max_iter!r}.")
        if self.tol is not None and (not isinstance(self.tol, (int, float)) or not 0 < self.tol < 1):
            raise InvalidOptionError(
                f"tol must lie between 0 and 1, not be {self.tol!r}: it is relative to the norm of the cotangent."
            )
        check_solver(self.solver)

    def run(self, step: Step, start: Tensor, scale: float, tol: float, floor: float) -> Relaxation:
        """Relax a stack of nodes with the options of this mode."""
        max_iter = self.max_iter or DEFAULT_MAX_ITER
        return relax(step, start, scale=scale, tol=tol, max_iter=max_iter, floor=floor, solver=self.solver)

    def run_linear(self, product: Product, force: Tensor, tol: float, floor: float) -> Relaxation:
        """Relax `v = product(v) + force`, as a stack of one, in single precision at least."""
        wide = force.to(torch.promote_types(force.dtype, torch.float32))  # squares of float16 underflow

        def step(v: Tensor) -> Tensor:
            return (product(v[0].to(force.dtype)) + wide).unsqueeze(0)

        size = norm(wide)
        relaxation = self.run(step, wide.unsqueeze(0), size, tol, floor)
        return relaxation.after(norm(relaxation.value), size)

    def judge(self, relaxation: Relaxation, equilibrium: Equilibrium, tol: float, floor: float, what: str) -> bool:
        """Whether a relaxation converged; speaks up if not, and raises if it is no estimate at all."""
        converged = relaxation.residual <= max(tol, floor)
        if converged and not relaxation.diverged:
            return True
        again = equilibrium.f(equilibrium.z)
        if relative_difference(again, equilibrium.value) > change_tolerance(equilibrium.eps):
            raise StochasticMapError(
                f"f gives different answers for the same state, so it has no fixed point to nudge. {STATEFUL}"
            )
        if relaxation.diverged or relaxation.residual > MEANINGLESS:
            raise NudgeDivergedError(
                f"{what} diverged: relative residual {relaxation.residual:.1e} after {relaxation.steps} steps. "
                "The map may not be contractive at the fixed point (its Jacobian has an eigenvalue near or beyond 1): "
                "try solver='broyden', on_divergence='ift', a smaller beta, or weight norms that keep f contractive."
            )
        warnings.warn(
            f"{what} stopped at a relative residual of {relaxation.residual:.1e} after {relaxation.steps} steps "
            f"(tolerance {tol:.1e}), and the error vector is about as wrong as that. Raise max_iter, loosen tol, or "
            "try another solver ('anderson', 'broyden').",
            ConvergenceWarning,
            stacklevel=2,
        )
        return False


@dataclass(frozen=True)
class _LinearBackward(RelaxedBackward):
    """A mode whose map is affine in the error vector, so that one relaxation of one vector solves it."""

    def _solve_linear(
        self, equilibrium: Equilibrium, product: Product, force: Tensor, what: str
    ) -> tuple[Tensor, NudgeReport]:
        """Solve `v = product(v) + force`."""
        tol = self.tol or 10 * equilibrium.eps
        floor = 100 * equilibrium.eps
        relaxation = self.run_linear(product, force, tol, floor)
        converged = self.judge(relaxation, equilibrium, tol, floor, what)
        steps = relaxation.steps
        return relaxation.value[0].to(force.dtype), NudgeReport(
            repr(self),
            calls=steps + 1,
            iterations=steps,
            residual=relaxation.residual,
            tol=tol,
            converged=converged,
            trace=relaxation.trace,
        )


@dataclass(frozen=True)
class ImplicitDifferentiation(_LinearBackward):
    """Implicit differentiation: `v = J^T v + g`, by VJPs. What torchdeq calls IFT; exact for every map.

    It solves [eq. (3)][eq-3] of the theory page.

    Args:
        solver: Name of a torchdeq solver or a callable; `None` for the package's own.
        max_iter: Largest number of VJPs, by default 100.
        tol: Residual relative to the cotangent at which to stop; by default 10 times the rounding error of the dtype.

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
        force = equilibrium.cotangent
        return self._solve_linear(equilibrium, product, force, "the adjoint iteration")


@dataclass(frozen=True)
class InfinitesimalEP(_LinearBackward):
    """The limit of vanishing nudges, `d = J d + g`, by forward-mode JVPs: the reference value of every EP mode.

    It solves [eq. (4)][eq-4] of the theory page; with a metric [eq. (12)][eq-12], with the correction [eq. (3)][eq-3].

    Args:
        metric: Positive diagonal `M` as a function of the state, e.g. an
            [`ActivityMetric`][torchdeq_ep.metric.ActivityMetric]; the result is `M^-1 (I - J)^-1 M g`. `"auto"` fits
            one to the Jacobian, see [`automatic_metric`][torchdeq_ep.metric.automatic_metric].
        correction: `"asymmetric"` replaces `J` by its adjoint, which makes the result exact.
        solver: Name of a torchdeq solver or a callable; `None` for the package's own.
        max_iter: Largest number of JVPs, by default 100.
        tol: Residual relative to the force at which to stop; by default 10 times the rounding error of the dtype.

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
        check_metric_and_correction(self.metric, self.correction)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        metric, metric_calls = diagonal_metric(self.metric, equilibrium.f, equilibrium.z)
        force = equilibrium.cotangent if metric is None else metric * equilibrium.cotangent
        f, z = equilibrium.f, equilibrium.z
        product = scaled_adjoint(vjp(f, z), metric) if self.correction else jvp(f, z)
        displacement, report = self._solve_linear(equilibrium, product, force, "the infinitesimal nudge")
        report = replace(report, calls=report.calls + metric_calls)
        return displacement if metric is None else displacement / metric, report


def check_metric_and_correction(metric: object, correction: object) -> None:
    """Raises InvalidOptionError unless both are what the nudged modes accept."""
    if metric not in (None, "auto") and not callable(metric):
        raise InvalidOptionError(
            f"metric must be a function from the state to the positive diagonal of M, 'auto' or None, not {metric!r}."
        )
    if correction not in (None, "asymmetric"):
        raise InvalidOptionError(f"correction must be None or 'asymmetric', not {correction!r}.")
