"""What a backward mode is: from a free equilibrium and a cotangent to an error vector.

A mode is an immutable value: it can be compared, pickled and shared between threads. This module has what all modes
share: the checks, the choice of a solver, and the judgement on where it stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.errors import FallbackWarning, InvalidOptionError, NonFiniteError, NudgeDivergedError
from torchdeq_ep.jacobian import OperatorMetric
from torchdeq_ep.modes.judgement import UNCONVERGED_STATE, require_repeatable, speak_up, speak_up_of_free_phase
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.relaxation import Run, Solver, check_solver, relax
from torchdeq_ep.relaxation.kept import Need
from torchdeq_ep.state import (
    Equilibrium,
    Packing,
    State,
    undisturbed,
)

Correction = Literal["asymmetric"]
Derivative = Literal["values", "autograd", "both"]
OnDivergence = Literal["shrink", "raise", "accept", "ift"]
DEFAULT_MAX_ITER = 100


@dataclass(frozen=True)
class Mode(ABC):
    """Base class of the backward modes that come with the package.

    A mode is called as `mode(f, z_star, cotangent)` and returns the error vector. Any callable of that form can take
    the place of a mode; deriving from this class adds the checks, and a report of each solve.

    Example:
        >>> import torch
        >>> from torchdeq_ep import ImplicitDifferentiation
        >>> mode = ImplicitDifferentiation(tol=1e-6)
        >>> isinstance(mode, Mode)
        True
        >>> mode(lambda z: 0.5 * z, torch.zeros(2), torch.ones(2))
        tensor([2., 2.])
    """

    at_equilibrium: ClassVar[bool] = True
    """Whether its gradient presumes that the state is an equilibrium, so that one that is not is worth a warning."""

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
        equilibrium = Equilibrium(packed, z, value, g, torch.finfo(z.dtype).eps, guard.withheld, rows=packing.rows)
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
        equilibrium.memory.passes += 1
        equilibrium.used.assumed_symmetry = self.assumes_symmetry
        equilibrium.require_finite()
        if self.at_equilibrium and equilibrium.residual > UNCONVERGED_STATE:
            with undisturbed(equilibrium.records):
                speak_up_of_free_phase(equilibrium)
        if equilibrium.cotangent_size == 0.0:
            return torch.zeros_like(equilibrium.z), NudgeReport(repr(self), calls=0)
        with undisturbed(equilibrium.records):
            vector, report = self._solve(equilibrium)
        return vector, replace(report, rows_lost=equilibrium.rows_below(max(report.residual, report.nudge_error)))

    @property
    def derivative(self) -> Derivative | None:
        """Whose derivative of `f` stands in the equation that the mode solves: that of its values, autograd's, or both.

        `None` if it solves neither `v = J v + g` nor `v = J^T v + g`: then there is nothing to be consistent with.
        """
        return None

    @property
    def assumes_symmetry(self) -> bool:
        """Whether the limit of the mode is the exact error vector only where `J` (or `J M`) is symmetric."""
        return False

    @property
    def needs(self) -> Need | None:
        """What the mode takes from the forward pass beside `f` and `z*`: it is `Equilibrium.history` then."""
        return None

    @abstractmethod
    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        """The error vector for a finite, non-zero cotangent; called where calls of `f` leave no trace."""


@dataclass(frozen=True)
class RelaxedMode(Mode):
    """A mode whose error vector is the fixed point of a map, and the choice of what solves it.

    Args:
        solver: Name of a torchdeq solver or a callable; `None` for the package's own.
        max_iter: Largest number of steps of one relaxation, by default 100.
        tol: Relative residual at which to stop; by default what rounding leaves, but no less than a tenth of the
            residual of the free phase.
        on_divergence: What happens to an estimate that is none: one that diverged, or whose residual is above 0.1.
            `"shrink"` tries smaller nudges, and then takes the best estimate with a warning; `"accept"` takes it at
            once; `"ift"` falls back to implicit differentiation, with a warning; `"raise"` raises. Unasked, an error is
            raised only if there is no finite estimate.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> from torchdeq_ep import ImplicitDifferentiation
        >>> issubclass(ImplicitDifferentiation, RelaxedMode)
        True
    """

    solver: str | Solver | None = field(default=None, kw_only=True)
    max_iter: int | None = field(default=None, kw_only=True)
    tol: float | None = field(default=None, kw_only=True)
    on_divergence: OnDivergence = field(default="shrink", kw_only=True)

    linear: ClassVar[bool] = False
    """Whether its equation is linear in the error vector."""
    worth_saying: ClassVar[float] = 0.01
    """A smaller residual is reported and not warned about, unless a `tol` was asked for and missed."""

    def __post_init__(self) -> None:
        if self.max_iter is not None:
            check_count("max_iter", self.max_iter)
        if self.tol is not None and (not isinstance(self.tol, (int, float)) or not 0 < self.tol < 1):
            raise InvalidOptionError(
                f"tol must lie between 0 and 1, not be {self.tol!r}: it is relative to the norm of the cotangent."
            )
        check_solver(self.solver, self.linear)
        check_choice("on_divergence", self.on_divergence, get_args(OnDivergence))

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        try:
            return super().solve(equilibrium)
        except NonFiniteError as error:
            if self.on_divergence != "ift":
                raise
            text = f"passed on as it is: {error.args[0]}"
            equilibrium.memory.warn(FallbackWarning, "not finite", text, lambda: "A GradScaler skips such steps.")
            return torch.full_like(equilibrium.z, torch.nan), NudgeReport(repr(self), converged=False)

    def run(self, equilibrium: Equilibrium, tol: float, floor: float) -> Run:
        """The relaxation that this mode uses, at a tolerance.

        Args:
            equilibrium: It knows which rows are independent.
            tol: Relative residual at which to stop.
            floor: Relative residual that rounding may leave.

        Returns:
            [`relax`][torchdeq_ep.relaxation.relax] with the options of this mode.
        """
        max_iter = self.max_iter or DEFAULT_MAX_ITER
        rows = equilibrium.independent_rows
        return partial(relax, tol=tol, floor=floor, max_iter=max_iter, solver=self.solver, rows=rows)

    def finish(self, equilibrium: Equilibrium, what: str, vector: Tensor, report: NudgeReport) -> None:
        """Say what there is to say of an estimate that is to be returned.

        Args:
            equilibrium: The free equilibrium.
            what: What was relaxed, for messages.
            vector: The estimate.
            report: Of the solve.

        Raises:
            StochasticMapError: If `f` gives different answers for the same state.
            NudgeDivergedError: If the estimate is not finite, or is none and `on_divergence="raise"`.
        """
        if report.converged:
            return
        require_repeatable(equilibrium)
        if (
            self.tol is None
            and report.is_usable
            and report.residual <= self.worth_saying
            and self.on_divergence != "raise"
        ):
            return
        if not bool(torch.isfinite(vector).all()) or (self.on_divergence == "raise" and not report.is_usable):
            finite = bool(torch.isfinite(vector).all())
            found = f"relative residual {report.residual:.1e}" if finite else "the estimate is not finite"
            raise NudgeDivergedError(
                f"{what} diverged: {found} after {report.iterations} steps. "
                "The map may not be contractive at the fixed point (its Jacobian has an eigenvalue near or beyond 1): "
                "try solver='broyden', on_divergence='ift', a smaller beta, or weight norms that keep f contractive."
            )
        speak_up(equilibrium, what, report, vector)


def check_correction(correction: object, metric: object) -> None:
    """Raises InvalidOptionError unless it is one that the nudged modes accept, beside that metric."""
    if correction not in (None, "asymmetric"):
        raise InvalidOptionError(f"correction must be None or 'asymmetric', not {correction!r}.")
    if correction is not None and isinstance(metric, OperatorMetric):  # with either of which the limit is exact
        raise InvalidOptionError("the asymmetric correction takes diagonal metrics: leave out one of the two.")
