"""Where a loop stopped, and whether an equilibrium is near."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

NEAR = 0.1
"""A loop that stopped within a tenth of its size of its equilibrium has the gradient of that to about as much."""


@dataclass(frozen=True)
class LoopReport:
    """Where a loop stopped.

    Args:
        steps: Steps made.
        residual: Size of the last step relative to the state, over the whole state; NaN under transforms of
            `torch.func`, where it is not measured.
        contraction: Size of the last step relative to the one before; NaN after one step or a solver.
        row_steps: With halting, the number of steps of each sample.
        trace: Size of every step relative to the state.

    Example:
        >>> report = LoopReport(steps=6, residual=0.34, contraction=0.9)
        >>> report.is_equilibrium, round(report.distance, 1)
        (False, 3.1)
        >>> str(report)[:80]
        'after 6 steps the residual is 3.4e-01 and shrinks by 0.90 a step: the equilibriu'
    """

    steps: int
    residual: float
    contraction: float = math.nan
    row_steps: Tensor | None = None
    trace: tuple[float, ...] = ()

    @property
    def distance(self) -> float:
        """How far away the equilibrium is, relative to the size of the state: `residual c / (1 - c)`, of contraction c.

        The residual itself where the contraction is not known; infinite where steps do not shrink.
        """
        if self.residual == 0 or math.isnan(self.contraction):
            return self.residual
        return self.residual * self.contraction / (1 - self.contraction) if self.contraction < 1 else math.inf

    @property
    def is_equilibrium(self) -> bool:
        """Whether an equilibrium is near enough for its gradient to mean anything: at a distance of 0.1 at most."""
        return self.distance <= NEAR

    def __str__(self) -> str:
        made = f"after {self.steps} step{'' if self.steps == 1 else 's'} the residual is {self.residual:.1e}"
        rate = "" if math.isnan(self.contraction) else f" and shrinks by {self.contraction:.2f} a step"
        if self.is_equilibrium:
            return f"{made}{rate}: the loop is near its equilibrium, and the gradient of that is meaningful"
        where = (
            "there is no equilibrium in sight"
            if math.isinf(self.distance)
            else f"the equilibrium is about {self.distance:.2g} times the size of the state away"
        )
        return (
            f"{made}{rate}: {where}, so its gradient says little of this loop; 'unrolled' is the gradient of what was "
            "computed"
        )
