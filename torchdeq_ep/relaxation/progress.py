"""What the loop knows of its way so far: residuals, the best value, and whether it gets anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from torchdeq_ep.state import largest_row_norm, norm, row_norms

RowScale = Callable[[Tensor], Tensor]
"""From a value of the map to what the residual of each row is relative to."""

DIVERGED = 1e4
"""A residual this many times the first one (or not finite) counts as divergence."""

_STALL = 12
_PLAIN = 24
_PATIENCE = 15
_WINDOW = 4
_GROWN = 10.0
_NEAR_FLOOR = 0.3


class Progress:
    """The residuals so far, the best value, and those of the present stretch: since the loop last began anew."""

    def __init__(self, start: Tensor, tol: float, floor: float) -> None:
        self.tol, self.floor = tol, floor
        self.trace: list[float] = []
        self.best, self.smallest = start, math.inf
        self.left_residual, self.rows_left = 0.0, 0
        self.plain_steps = _PLAIN
        self.begin(0, start)

    def begin(self, k: int, value: Tensor, residual: float = math.inf) -> None:
        """A new stretch."""
        self.began_at = self.lowest_at = k
        self.lowest_value, self.lowest = value, residual

    def measure(self, k: int, value: Tensor, residual: float, left_residual: float = 0.0, rows_left: int = 0) -> None:
        """Take in the residual of a step, and what rows that were left have beside it."""
        self.k = k
        self.trace.append(residual)
        if self.has_diverged:
            return
        if residual < 0.9 * self.lowest:
            self.lowest_at = k
        if residual < self.lowest:
            self.lowest, self.lowest_value = residual, value
        if residual < self.smallest:
            self.smallest, self.best = residual, value
            self.left_residual, self.rows_left = left_residual, rows_left

    @property
    def has_diverged(self) -> bool:
        """Whether the residual grew beyond all bounds, or is not finite."""
        last = self.trace[-1]
        return not math.isfinite(last) or last > DIVERGED * max(self.trace[0], self.tol)

    @property
    def is_over(self) -> bool:
        """Whether the tolerance is reached, or the floor and nothing falls any more."""
        return self.trace[-1] <= self.tol or (self.smallest <= self.floor and self.steps_without_progress >= _STALL)

    @property
    def steps_without_progress(self) -> int:
        """Steps since the residual last fell by a tenth."""
        return self.k - self.lowest_at

    @property
    def has_grown(self) -> bool:
        """Whether the last residual is far above the lowest of the stretch."""
        return self.trace[-1] > _GROWN * self.lowest

    @property
    def is_at_floor(self) -> bool:
        """Whether the residual is of the size of what rounding leaves, where no more is to be gained by memory."""
        return self.smallest <= _NEAR_FLOOR * self.floor

    @property
    def is_slow(self) -> bool:
        """Whether more than `_PATIENCE` steps are left at the rate of the last `_WINDOW`."""
        return self.has_more_left_than(_PATIENCE)

    def has_more_left_than(self, steps: int) -> bool:
        """Whether more steps than that are left at the rate of the last `_WINDOW`; not before there is a rate."""
        if self.k < self.began_at + _WINDOW:
            return False
        if self.tol <= 0 or self.trace[-1] <= 0:
            return True
        gained = math.log(self.trace[-1 - _WINDOW] / self.trace[-1])
        return math.log(self.trace[-1] / self.tol) * _WINDOW > steps * gained


def largest_row(residual: Tensor, size: float | None, scale: float | RowScale, value: Tensor) -> float:
    """The largest residual of a node, relative; `size` is the norm of the whole residual where it is known."""
    if callable(scale):
        return float((row_norms(residual.flatten(1)) / scale(value)).max())
    if residual.shape[0] == 1:
        return (norm(residual) if size is None else size) / scale
    return largest_row_norm(residual) / scale
