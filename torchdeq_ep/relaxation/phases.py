"""How the loop finds its next point: plain steps, extrapolation in every second one, or mixing of many values.

A phase is shown each value of the map with the point it was taken at, and asked for the next point. Which phase it is
that is asked, the loop decides.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdeq_ep.relaxation.progress import Progress
from torchdeq_ep.state import Rows, join_rows, norm, norm_and, row_norms, split_rows

Enough = Callable[[Tensor, Tensor], Tensor]

_UNSEEN = 4
_NOTABLE = 0.1
_FEW = 4
_SMALLEST = 1e-300


class Phase(ABC):
    """A way to the next point."""

    left_residual = 0.0
    """Norm of the residual of rows that are left as they are, which is no part of what is measured."""
    rows_left = 0
    """Number of those that hold it, which are within a tenth of the largest."""

    def passes_over(self, k: int) -> bool:
        """Whether the residual of step `k` need not be measured, and the value is the next point."""
        return False

    @abstractmethod
    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float | None]:
        """Take in a value of the map; its residual, and the norm of that where it is known."""

    @abstractmethod
    def next(self, progress: Progress) -> Tensor:
        """The next point. One whose residual has grown far is given up for the best of the present stretch."""


class Plain(Phase):
    """The map itself: each value is the next point. Residuals are measured in some of its steps only.

    Args:
        start: Where it goes on.
        until: The step at which it ends.
        since: The step at which it begins.
    """

    def __init__(self, start: Tensor, until: int, since: int = 0) -> None:
        self.until = until
        self._value, self._measured_at, self._next_at = start, since, since

    def passes_over(self, k: int) -> bool:
        return k < self._next_at

    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float | None]:
        self._value = value
        return value - point, None

    def next(self, progress: Progress) -> Tensor:
        k = progress.k
        if k > self._measured_at:
            self._next_at = k + 1 + _steps_unseen(progress.trace, k - self._measured_at, progress.tol)
            self._measured_at = k
        return self._value


class Extrapolation(Phase):
    """Every second step goes on along its residual, to where that of a linear map would be smallest.

    Let `p` and `r` be the residuals of two steps in a row, and `value` the end of the second. The next point is
    `value + t r` with the `t` for which `|r + t (r - p)|` is smallest: Anderson mixing of two values, in every second
    step (Banerjee, Suryanarayana & Pask 2016, Chem. Phys. Lett. 647:31). Nothing but `p` is held, for the length of a
    step.
    """

    def __init__(self) -> None:
        self._first: tuple[Tensor, float] | None = None

    @property
    def is_between(self) -> bool:
        """Whether no residual waits for the one that it would be combined with."""
        return self._first is None

    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float]:
        residual = value - point
        products = [] if self._first is None else [torch.dot(residual.flatten(), self._first[0].flatten())]
        size, found = norm_and(residual, *products)
        self._last, self._products = (value, residual, size), found
        return residual, size

    def next(self, progress: Progress) -> Tensor:
        value, residual, size = self._last
        del self._last
        if progress.has_grown:
            self._first = None
            return progress.lowest_value
        if self._first is None:
            self._first = residual, size
            return value
        _, previous_size = self._first
        self._first = None
        product, square = float(self._products[0]), size * size
        change = square - 2 * product + previous_size * previous_size
        if not 100 * torch.finfo(value.dtype).eps * size * previous_size < change < math.inf:
            return value  # two residuals that are equal but for rounding tell nothing
        return torch.add(value, residual, alpha=(product - square) / change, out=residual)


class Mixing(Phase):
    """Type-II Anderson mixing: the combination of the last values of the map that has the smallest residual.

    One set of weights for the whole stack, or one for each row: samples have spectra of their own, and one set has to
    serve them all at once (Walker & Ni 2011, SINUM 49:1715, algorithm AA, by differences of successive values). The
    weights come from inner products of residuals alone, so a step costs two passes over those, and one transfer of a
    few numbers. On a linear map, and with memory enough, these are the iterates of GMRES.

    Args:
        memory: Number of differences that are combined.
        longest: Number that may be combined once `memory` of them have proved too few.
        rows: Where the rows lie, or `None` for one set of weights.
        enough: Which rows are to be left as they are, from their points and the norms of their residuals.
    """

    def __init__(self, memory: int, longest: int, rows: Rows | None, enough: Enough | None = None) -> None:
        self._rows, self._longest, self._capacity, self._enough = rows, max(memory, longest), memory, enough
        self._left: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._slot, self._known, self._steps = -1, 0, 0

    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float]:
        stack = value - point
        values, residuals = self._split(value), self._split(stack)
        self._steps += 1
        if self._enough is not None and (self._left is not None or self._steps % 2 == 0):
            residuals = self._leave_rows(self._split(point), residuals)
            stack = self._join(residuals, stack)
        if self._last is None:
            self._last = values, residuals
            self._shape_like(values)
            return stack, norm(residuals)
        slot = self._slot = (self._slot + 1) % self._capacity
        self._known = min(self._known + 1, self._capacity)
        torch.sub(values, self._last[0], out=self._values[:, slot])
        torch.sub(residuals, self._last[1], out=self._residuals[:, slot])
        self._last = values, residuals
        pair = torch.stack([self._residuals[:, slot], residuals], dim=2)
        products = self._residuals[:, : self._known] @ pair
        size, entries = norm_and(residuals, products)
        found = entries.reshape(products.shape)
        self._gram[:, slot, : self._known] = self._gram[:, : self._known, slot] = found[:, :, 0]
        self._pull = found[:, :, 1]
        return stack, size

    def next(self, progress: Progress) -> Tensor:
        values, _ = cast(tuple[Tensor, Tensor], self._last)
        like = progress.lowest_value
        if progress.has_grown:  # the values so far belong to another region
            self._forget()
            return like
        known = self._known
        if known == 0:
            return self._join(self._with_rows_left(values), like)
        weights = least_residual(self._gram[:, :known, :known], self._pull, 10 * torch.finfo(values.dtype).eps)
        shift = torch.as_tensor(weights, dtype=values.dtype, device=values.device).unsqueeze(1)
        point = torch.baddbmm(values.unsqueeze(1), shift, self._values[:, :known], alpha=-1).squeeze(1)
        if known == self._capacity < self._longest and not progress.is_at_floor and progress.has_more_left_than(_FEW):
            self._lengthen()
        return self._join(self._with_rows_left(point), like)

    def _leave_rows(self, points: Tensor, residuals: Tensor) -> Tensor:
        """The residuals without those of rows that are left as they are, at the points where that was decided."""
        norms = row_norms(residuals)
        enough = cast(Enough, self._enough)(points, norms)
        if self._left is not None:
            enough = enough | self._left[0]
        if not bool(enough.any()):
            return residuals
        kept = points if self._left is None else torch.where(self._left[0].unsqueeze(1), self._left[1], points)
        self._left = enough, kept
        left = norms[enough]
        self.left_residual = norm(left)
        self.rows_left = count_notable(left)
        return residuals.masked_fill(enough.unsqueeze(1), 0.0)

    def _with_rows_left(self, point: Tensor) -> Tensor:
        return point if self._left is None else torch.where(self._left[0].unsqueeze(1), self._left[1], point)

    def _split(self, stack: Tensor) -> Tensor:
        return split_rows(stack, self._rows)

    def _join(self, matrix: Tensor, like: Tensor) -> Tensor:
        return join_rows(matrix, self._rows, like)

    def _shape_like(self, values: Tensor) -> None:
        height, width = values.shape
        self._values = values.new_empty(height, self._capacity, width)
        self._residuals = torch.empty_like(self._values)
        self._gram = np.zeros((height, self._capacity, self._capacity))

    def _lengthen(self) -> None:
        # What was a ring goes on as a line, the oldest first.
        known, self._capacity = self._capacity, self._longest
        order = [(self._slot + 1 + k) % known for k in range(known)]
        self._values = self._lengthened(self._values, order)
        self._residuals = self._lengthened(self._residuals, order)
        gram = np.zeros((len(self._gram), self._capacity, self._capacity))
        gram[:, :known, :known] = self._gram[:, order][:, :, order]
        self._gram, self._slot = gram, known - 1

    def _lengthened(self, ring: Tensor, order: list[int]) -> Tensor:
        longer = ring.new_empty(ring.shape[0], self._capacity, ring.shape[2])
        for place, slot in enumerate(order):
            longer[:, place] = ring[:, slot]
        return longer

    def _forget(self) -> None:
        self._last, self._slot, self._known = None, -1, 0


def count_notable(norms: Tensor) -> int:
    """How many residuals of rows are within a tenth of the largest: those that hold what is left.

    Example:
        >>> count_notable(torch.tensor([1.0, 0.5, 0.01])), count_notable(torch.zeros(0))
        (2, 0)
    """
    return int((norms >= _NOTABLE * norms.max()).sum()) if len(norms) else 0


def _steps_unseen(trace: list[float], gap: int, tol: float) -> int:
    """How many steps of plain iteration need not be looked at: one less than are left at the present rate."""
    if len(trace) < 2 or not 0 < trace[-1] < trace[-2] or tol <= 0:
        return 0
    left = gap * math.log(tol / trace[-1]) / math.log(trace[-1] / trace[-2])
    return min(int(left), _UNSEEN)


def least_residual(gram: NDArray[np.float64], pull: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """The weights `w` for which `|r - sum_i w_i d_i|` is smallest, row by row, from inner products.

    Args:
        gram: Products `d_i . d_j`, of shape `(R, m, m)`.
        pull: Products `d_i . r`, of shape `(R, m)`.
        ridge: Added to the diagonal of the correlation matrix, so that nearly parallel directions do no harm.

    Returns:
        The weights, of shape `(R, m)`; zero for directions that are zero, and in rows whose products are no numbers.

    Example:
        >>> least_residual(np.array([[[4.0]]]), np.array([[2.0]]), 0.0)
        array([[0.5]])
    """
    sizes = np.sqrt(np.maximum(np.einsum("rii->ri", gram), _SMALLEST))
    with np.errstate(invalid="ignore"):
        correlation = gram / sizes[:, :, None] / sizes[:, None, :] + ridge * np.eye(gram.shape[1])
        pull = pull / sizes
    unknown = ~(np.isfinite(correlation).all(axis=(1, 2)) & np.isfinite(pull).all(axis=1))
    correlation[unknown], pull[unknown] = np.eye(gram.shape[1]), 0.0
    weights: NDArray[np.float64] = np.linalg.solve(correlation, pull[:, :, None])[:, :, 0] / sizes
    return weights
