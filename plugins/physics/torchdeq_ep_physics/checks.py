"""Is it an equilibrium, and a stable one? What is measured of every state, and what is said."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchdeq_ep.errors import EPError, EPWarning
from torchdeq_ep_physics.newton import Search, Settled

OnFailure = Literal["raise", "warn"]

NO_EQUILIBRIUM = 1e-3
"""A net force of this share of the largest term is that of no equilibrium."""

_UNCONVERGED = {torch.float64: 1e-6, torch.float32: 1e-4}
_SHOWN = 5


class NoEquilibriumError(EPError, RuntimeError):
    """The search for an equilibrium of a physical network did not converge."""


class UnconvergedStateWarning(EPWarning):
    """A state of a physical network was returned that is not quite an equilibrium, or none."""


class UnstableStateWarning(EPWarning):
    """An equilibrium of a physical network was returned that is not stable: a saddle, or a maximum."""


@dataclass(frozen=True)
class StateReport:
    """What was measured of the states of one batch.

    Args:
        force: The largest net force of each row, relative to the largest term that makes it up; of shape `(batch,)`.
        smallest_eigenvalue: The smallest real part of the eigenvalues of `-dF/dz` for each row: negative where the
            state is unstable. In networks of more than 128 units it is an estimate from above; its sign is none. Shape
            `(batch,)`.
        is_stable: Whether each row is stable, of shape `(batch,)`.
        steps: Steps of Newton's method, of the slowest row; 0 for another solver.
        escapes: How often a saddle was left.

    Example:
        >>> report = StateReport(torch.tensor([1e-15, 0.2]), torch.ones(2), torch.tensor([True, True]), 7, 0)
        >>> report.is_equilibrium
        tensor([ True, False])
    """

    force: Tensor
    smallest_eigenvalue: Tensor
    is_stable: Tensor
    steps: int
    escapes: int

    @property
    def is_equilibrium(self) -> Tensor:
        """Whether the net force of each row is below a thousandth of the largest term."""
        return self.force <= NO_EQUILIBRIUM


def measured(problem: Search, found: Settled) -> StateReport:
    """The report of states.

    Args:
        problem: What they are to be equilibria of.
        found: The states, with their stability.

    Returns:
        The report.
    """
    force = torch.nan_to_num(problem.imbalance(found.z), nan=torch.inf)
    return StateReport(force, found.stability.smallest, found.stability.is_stable, found.steps, found.escapes)


def speak_up(report: StateReport, name: str, advice: str, on_failure: OnFailure) -> None:
    """Raise or warn where a state is none.

    Args:
        report: Of the states that are to be returned.
        name: Of the network.
        advice: What is likely to be wrong, and what to do.
        on_failure: Whether a state that is no equilibrium is an error or a warning.

    Raises:
        NoEquilibriumError: If one is none, and `on_failure="raise"`.
    """
    lost = ~report.is_equilibrium
    if bool(lost.any()):
        text = (
            f"no equilibrium of {name} was found for {_rows(lost)}: a net force of "
            f"{float(report.force[lost].max()):.1e} of the largest term is left. {advice}"
        )
        if on_failure == "raise":
            raise NoEquilibriumError(f"{text} on_failure='warn' returns the states as they are.")
        warnings.warn(UnconvergedStateWarning(f"{text} A gradient at such a state means nothing."), stacklevel=3)
    near = (report.force > _UNCONVERGED.get(report.force.dtype, NO_EQUILIBRIUM)) & ~lost
    if bool(near.any()):
        warnings.warn(
            UnconvergedStateWarning(
                f"the solver of {name} stopped early for {_rows(near)}: a net force of "
                f"{float(report.force[near].max()):.1e} of the largest term is left. Use solver='newton', or raise "
                "max_iter."
            ),
            stacklevel=3,
        )
    unstable = ~report.is_stable & ~lost
    if bool(unstable.any()):
        warnings.warn(
            UnstableStateWarning(
                f"the equilibrium of {name} is unstable for {_rows(unstable)} (smallest eigenvalue "
                f"{float(report.smallest_eigenvalue[unstable].min()):.1e}): no such network stays there, and no nudge "
                "measures its gradient. Use solver='newton', another start, or annealing; without an energy there may "
                "be no stable one."
            ),
            stacklevel=3,
        )


def _rows(mask: Tensor) -> str:
    rows = mask.nonzero().squeeze(1).tolist()
    shown = ", ".join(str(row) for row in rows[:_SHOWN])
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', ...' if len(rows) > _SHOWN else ''} of {len(mask)}"
