"""How the loop finds its next point: plain steps, extrapolation in every second one, or mixing of many values.

A phase is shown each value of the map with the point it was taken at, and asked for the next point. Which phase it is
that is asked, the loop decides.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from torchdeq_ep.relaxation.progress import Progress

_UNSEEN = 4


class Phase(ABC):
    """A way to the next point."""

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
        size = float(torch.linalg.vector_norm(residual))
        self._last = value, residual, size
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
        previous, previous_size = self._first
        self._first = None
        product = float(torch.dot(residual.flatten(), previous.flatten()))
        change = size**2 - 2 * product + previous_size**2
        if change <= 100 * torch.finfo(value.dtype).eps * size * previous_size:
            return value  # two residuals that are equal but for rounding tell nothing
        return torch.add(value, residual, alpha=(product - size**2) / change, out=residual)


class Mixing(Phase):
    """Type-II Anderson mixing: the affine combination of the last values of the map that has the smallest residual.

    One set of weights for the whole stack (Walker & Ni 2011, SINUM 49:1715, algorithm AA). The weights come from the
    inner products of the residuals alone, so a step costs one product with them, and one transfer of a few numbers.
    """

    def __init__(self, memory: int, origin: Tensor) -> None:
        # Values are combined as seen from the first one: with large weights of both signs, rounding grows with the
        # size of what is combined.
        self._origin = origin.flatten()
        self._shape = origin.shape
        self._values = origin.new_empty(memory, origin.numel())
        self._residuals = torch.empty_like(self._values)
        self._gram = [[0.0] * memory for _ in range(memory)]
        self._ridge = 10 * torch.finfo(origin.dtype).eps
        self._slot, self._known = -1, 0

    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float]:
        memory = len(self._gram)
        slot = self._slot = (self._slot + 1) % memory
        self._known = min(self._known + 1, memory)
        residual = self._residuals[slot]
        torch.sub(value.flatten(), self._origin, out=self._values[slot])
        torch.sub(value.flatten(), point.flatten(), out=residual)
        products = torch.mv(self._residuals[: self._known], residual).tolist()
        for other, product in enumerate(products):
            self._gram[slot][other] = self._gram[other][slot] = product
        return residual.view(self._shape), math.sqrt(products[slot])

    def next(self, progress: Progress) -> Tensor:
        if progress.has_grown:  # the values so far belong to another region
            self._slot, self._known = -1, 0
            return progress.lowest_value
        known = self._known
        weights = affine_weights([row[:known] for row in self._gram[:known]], self._ridge)
        values = self._values[:known]
        return torch.addmv(self._origin, values.T, values.new_tensor(weights)).view(self._shape)


def _steps_unseen(trace: list[float], gap: int, tol: float) -> int:
    """How many steps of plain iteration need not be looked at: one less than are left at the present rate."""
    if len(trace) < 2 or not 0 < trace[-1] < trace[-2] or tol <= 0:
        return 0
    left = gap * math.log(tol / trace[-1]) / math.log(trace[-1] / trace[-2])
    return min(int(left), _UNSEEN)


def affine_weights(gram: list[list[float]], ridge: float) -> list[float]:
    """The weights `w` with `sum w = 1` for which `|sum_i w_i r_i|` is smallest, from the products `r_i . r_j`.

    Args:
        gram: Products of the residuals, positive on the diagonal.
        ridge: Added to the diagonal of the correlation matrix, so that nearly parallel residuals do no harm.

    Returns:
        The weights. Equal residuals get equal weights.

    Example:
        >>> [round(w, 6) for w in affine_weights([[4.0, 2.0], [2.0, 1.0]], 1e-12)]
        [-1.0, 2.0]
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    # Elimination without pivoting, for a positive definite matrix; the last column is the right-hand side.
    rows = [
        [product / (norm * other) for product, other in zip(line, norms, strict=True)] + [norms[-1] / norm]
        for line, norm in zip(gram, norms, strict=True)
    ]
    for i, pivot in enumerate(rows):
        pivot[i] += ridge
    for i, pivot in enumerate(rows):
        for k in range(i + 1, len(rows)):
            factor = rows[k][i] / pivot[i]
            rows[k] = [entry - factor * above for entry, above in zip(rows[k], pivot, strict=True)]
    weights: list[float] = []
    for i in reversed(range(len(rows))):
        solved = sum(entry * weight for entry, weight in zip(rows[i][i + 1 : -1], weights, strict=True))
        weights.insert(0, (rows[i][-1] - solved) / rows[i][i])
    weights = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    total = sum(weights)
    return [weight / total for weight in weights]
