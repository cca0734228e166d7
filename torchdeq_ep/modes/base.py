"""What a backward mode is: from a free equilibrium and a cotangent to an error vector.

A mode is an immutable value: it can be compared, pickled and shared between threads. This module has what all modes
share: the checks, the choice of a solver, and the judgement on where it stopped.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from torchdeq_ep._options import check_count
from torchdeq_ep.errors import ConvergenceWarning, InvalidOptionError, NudgeDivergedError, StochasticMapError
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.relaxation import Relaxation, Run, Solver, check_solver, relax
from torchdeq_ep.state import (
    STATEFUL,
    Equilibrium,
    Packing,
    State,
    change_tolerance,
    relative_difference,
    undisturbed,
)

Correction = Literal["asymmetric"]
DEFAULT_MAX_ITER = 100
UNCONVERGED_STATE = 1e-2
"""A free state with a larger relative residual than this is warned about: its gradient is off by about as much."""
MEANINGLESS = 0.1
"""A relaxation that stops with a larger relative residual than this has found no estimate at all."""


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
class RelaxedMode(Mode):
    """A mode whose error vector is the fixed point of a map, and the choice of what solves it.

    Args:
        solver: Name of a torchdeq solver or a callable; `None` for the package's own.
        max_iter: Largest number of steps of one relaxation, by default 100.
        tol: Relative residual at which to stop; by default what rounding leaves.

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

    def __post_init__(self) -> None:
        if self.max_iter is not None:
            check_count("max_iter", self.max_iter)
        if self.tol is not None and (not isinstance(self.tol, (int, float)) or not 0 < self.tol < 1):
            raise InvalidOptionError(
                f"tol must lie between 0 and 1, not be {self.tol!r}: it is relative to the norm of the cotangent."
            )
        check_solver(self.solver)

    def run(self, tol: float, floor: float) -> Run:
        """The relaxation that this mode uses, at a tolerance.

        Args:
            tol: Relative residual at which to stop.
            floor: Relative residual that rounding may leave.

        Returns:
            [`relax`][torchdeq_ep.relaxation.relax] with the options of this mode.
        """
        max_iter = self.max_iter or DEFAULT_MAX_ITER
        return partial(relax, tol=tol, floor=floor, max_iter=max_iter, solver=self.solver)


def judge(relaxation: Relaxation, equilibrium: Equilibrium, tol: float, floor: float, what: str) -> bool:
    """Whether a relaxation converged; speaks up if not.

    Args:
        relaxation: The result.
        equilibrium: Whose map it was made with: asked once more, since a random map converges to nothing.
        tol: Residual that was to be reached.
        floor: Residual that rounding may leave.
        what: What was relaxed, for messages.

    Returns:
        Whether it converged.

    Raises:
        StochasticMapError: If `f` gives different answers for the same state.
        NudgeDivergedError: If there is no estimate at all.
    """
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


def check_correction(correction: object) -> None:
    """Raises InvalidOptionError unless it is one that the nudged modes accept."""
    if correction not in (None, "asymmetric"):
        raise InvalidOptionError(f"correction must be None or 'asymmetric', not {correction!r}.")
