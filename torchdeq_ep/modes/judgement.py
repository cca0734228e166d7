"""What is said of a relaxation that stopped early, and the likeliest cause of it.

Unconverged is not diverged: a relaxation that ran out of steps has an estimate and a measured residual, and is
returned. The causes below are looked for only if a warning is issued, which is rare: they may cost some calls of `f`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchdeq_ep.errors import ConvergenceWarning, StochasticMapError
from torchdeq_ep.jacobian.spectrum import rough_spectral_radius
from torchdeq_ep.modes.report import MEANINGLESS, NudgeReport
from torchdeq_ep.relaxation import Relaxation
from torchdeq_ep.state import (
    STATEFUL,
    Equilibrium,
    change_tolerance,
    norm,
    relative_difference,
    row_norms,
    split_rows,
)

UNCONVERGED_STATE = 1e-2
"""A free state with a larger relative residual than this is warned about: its gradient is off by about as much."""
NEAR_ONE = 0.95
"""A Jacobian with a larger spectral radius makes `I - J` nearly singular."""

_CERTAIN = 3e-3
_SHARE = 0.1
_BEYOND_ONE = 1.1
_AMPLIFIED = 10.0
_LONGEST_CYCLE = 6
_RETURNED = 0.1
_FEW, _MOST = 3, 0.9


def default_tolerance(rounding: float, free_residual: float) -> float:
    """The residual to which an error vector is solved unless the user says otherwise.

    Args:
        rounding: What rounding leaves of it.
        free_residual: Relative residual of the free phase, which limits the gradient anyway: a tenth of it will do.

    Returns:
        At most 0.003, which counts as converged.
    """
    return min(max(rounding, _SHARE * free_residual), _CERTAIN)


def is_converged(relaxation: Relaxation, accepted: float) -> bool:
    """Whether a relaxation has converged: by its residual, over the whole state.

    Args:
        relaxation: The result.
        accepted: The largest residual with which it has, but for rows that were left: then it is 0.003 at least.

    Returns:
        Whether it has.
    """
    return not relaxation.diverged and relaxation.residual <= max(accepted, _CERTAIN if relaxation.left else 0.0)


def accepted_residual(asked: float | None, tol: float, floor: float) -> float:
    """The largest residual with which a relaxation counts as converged.

    What rounding leaves is an estimate, and never claims more than a residual of 0.003.

    Args:
        asked: The tolerance that the user gave, or `None`.
        tol: The tolerance in force.
        floor: What rounding may leave.

    Returns:
        At most 0.1.
    """
    certain = min(max(tol, floor), _CERTAIN)
    return min(max(asked or 0.0, certain), MEANINGLESS)


@dataclass(frozen=True)
class FreeLimit:
    """Which rows need not be solved further, because their free phase does not warrant it.

    A row whose free phase stopped at a relative residual `rho` is about `rho |v| / |g|` of its size away from its
    equilibrium, if `|v| / |g|` is how much the inverse of `I - J` amplifies. Its Jacobian is off by about as much, and
    so the residual of `v` means nothing below `rho |v|^2 / |g|`. Solving further fits `v` to another equation, and
    where `I - J` is nearly singular makes it as large as one likes: Morozov's discrepancy principle says to stop.

    Args:
        equilibrium: The free equilibrium.
        force: `M g`.
        origin: What points are displacements from, in the form of the stack that is relaxed; 0 for a linear mode.
        unit: What displacements and residuals are multiples of.
    """

    equilibrium: Equilibrium
    force: Tensor
    origin: Tensor | None = None
    unit: float = 1.0
    _warranted: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, points: Tensor, residuals: Tensor) -> Tensor:
        if len(points) not in self._warranted:
            free = self._sizes(self.equilibrium.value - self.equilibrium.z, len(points))
            state, force = self._sizes(self.equilibrium.z, len(points)), self._sizes(self.force, len(points))
            self._warranted[len(points)] = free / (state * force * self.unit), force * self.unit
        if self.origin is not None:
            points = points - self._split(self.origin, len(points))
        warranted, force = self._warranted[len(points)]
        moved = torch.linalg.vector_norm(points, dim=1)
        # A residual as large as the force is that of no estimate at all.
        enough: Tensor = residuals < torch.minimum(warranted * moved.square(), force)
        return enough

    def _sizes(self, tensor: Tensor, height: int) -> Tensor:
        return row_norms(self._split(tensor.unsqueeze(0), height))

    def _split(self, stack: Tensor, height: int) -> Tensor:
        return split_rows(stack, None if height == 1 else self.equilibrium.rows)


def require_repeatable(equilibrium: Equilibrium) -> None:
    """Refuse a map that gives different answers for the same state.

    Args:
        equilibrium: Whose map is asked once more.

    Raises:
        StochasticMapError: If so.
    """
    again = equilibrium.f(equilibrium.z)
    if relative_difference(again, equilibrium.value) > change_tolerance(equilibrium.eps):
        raise StochasticMapError(
            f"f gives different answers for the same state, so it has no fixed point to nudge. {STATEFUL}"
        )


def speak_up(equilibrium: Equilibrium, what: str, report: NudgeReport, vector: Tensor) -> None:
    """Warn of a nudged or adjoint phase that stopped early.

    Args:
        equilibrium: The free equilibrium.
        what: What was relaxed.
        report: Of the solve.
        vector: The estimate.
    """
    finding = (
        f"{what} stopped at a relative residual of {report.residual:.1e} after {report.iterations} steps (tolerance "
        f"{report.tol:.1e})"
    )
    if report.rows_left:
        samples = f"{report.rows_left} sample{'s' if report.rows_left > 1 else ''}"
        held = samples if equilibrium.independent_rows() else "the batch as a whole"
        finding += f", held by {held} whose free phase stopped too early to solve for more"
    amplified = norm(vector) / equilibrium.cotangent_size

    def advice() -> str:
        causes = [
            *_of_free_phase(equilibrium),
            *_of_spectrum(equilibrium, amplified),
            *_of_few_rows(equilibrium, vector),
        ]
        return " ".join([*causes, "Raise max_iter, loosen tol, or try another solver ('anderson', 'broyden')."])

    equilibrium.memory.warn(ConvergenceWarning, "nudge", finding, advice, report.residual)


def speak_up_of_free_phase(equilibrium: Equilibrium) -> None:
    """Warn of a state that is no equilibrium.

    Args:
        equilibrium: The free equilibrium.
    """
    finding = (
        f"the free phase stopped at a relative residual |f(z*) - z*| / |z*| of {equilibrium.residual:.1e}, so the "
        "gradient is taken at a state that is not an equilibrium"
    )
    residual = equilibrium.residual
    equilibrium.memory.warn(ConvergenceWarning, "free phase", finding, lambda: _of_cycle(equilibrium), residual)


def _of_free_phase(equilibrium: Equilibrium) -> list[str]:
    if equilibrium.residual <= UNCONVERGED_STATE:
        return []
    return [f"The likeliest cause is the free phase, at a relative residual of {equilibrium.residual:.1e}."]


def _of_cycle(equilibrium: Equilibrium) -> str:
    """Whether the map goes round in a cycle, which no number of steps ends, or is slow."""
    start = equilibrium.value
    state = equilibrium.f(start)
    step = norm(state - start)
    for length in range(2, _LONGEST_CYCLE + 1):
        state = equilibrium.f(state)
        if step > 0 and norm(state - start) < _RETURNED * step:
            return (
                f"The map goes round in a cycle of {length} states, which no number of steps ends: damp it (f_tau "
                "below 1), or use a solver, such as f_solver='anderson', 'broyden' or 'relaxation'."
            )
    return (
        "Raise f_max_iter, or the steps of a loop written by hand, or use a solver that converges "
        "(f_solver='anderson', 'broyden' or 'relaxation')."
    )


def _of_spectrum(equilibrium: Equilibrium, amplified: float) -> list[str]:
    radius = rough_spectral_radius(equilibrium.f, equilibrium.z)
    if radius > _BEYOND_ONE and amplified <= _AMPLIFIED:
        return [
            f"The spectral radius of the Jacobian is about {radius:.2f}: f does not contract at the fixed point, which "
            "a solver may find all the same. Weight norms or homeostasis bring it below 1."
        ]
    if not (radius > NEAR_ONE or amplified > _AMPLIFIED):
        return []
    measured = f"the spectral radius of the Jacobian is about {radius:.2f}, and " if radius == radius else ""
    return [
        f"I - J is nearly singular: {measured}|v| is {amplified:.0f} times |g|, so small errors are amplified. Weight "
        "norms, homeostasis or a norm at the end of f keep the radius below 1; kinks of f (ReLU) limit what a finite "
        "nudge can reach there, and 'ift' has no such limit."
    ]


def _of_few_rows(equilibrium: Equilibrium, vector: Tensor) -> list[str]:
    rows = equilibrium.independent_rows()
    if rows is None or rows.count <= 2 * _FEW:
        return []
    squares = rows.split(vector.float().unsqueeze(0)).square().sum(1)
    most = squares.topk(_FEW)
    if not float(most.values.sum()) > _MOST * float(squares.sum()):
        return []
    return [f"Samples {', '.join(str(k) for k in sorted(most.indices.tolist()))} of the batch hold most of the vector."]
