"""GMRES with a Krylov space for each sample, for equations that are linear.

`v = P v + b` is solved in the space of `b, P b, P^2 b, ..`: after `k` products each sample has the smallest residual
that a polynomial of degree `k` can leave it (Saad & Schultz 1986, SIAM J. Sci. Stat. Comput. 7:856). Samples that the
map treats apart have spectra of their own, and each has the polynomial that suits it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torchdeq_ep.relaxation.loop import FindRows, Relaxation
from torchdeq_ep.relaxation.phases import Enough, count_notable
from torchdeq_ep.relaxation.solvers import Product, in_units
from torchdeq_ep.state import fetch, in_the_middle, join_rows, norm, row_norms, split_rows

LONGEST = 50
"""How many vectors are kept; then it begins anew from where it stands."""

_GAIN = 0.5
_ASKED_EVERY = 2


def gmres(
    product: Product,
    force: Tensor,
    *,
    tol: float,
    max_iter: int,
    floor: float = 0.0,
    rows: FindRows | None = None,
    enough: Enough | None = None,
) -> Relaxation:
    """Solve `v = product(v) + force`, in single precision at least.

    Args:
        product: A linear map of one vector, in the dtype of the force.
        force: The term that does not depend on `v`, of any shape.
        tol: Residual relative to the force at which to stop.
        max_iter: Largest number of products, but two at least.
        floor: Relative residual that rounding may leave: below it, it does not begin anew.
        rows: Asked once: where rows lie that the map treats apart, or `None`.
        enough: Which rows are left as they are: from a matrix of their points and the norms of their residuals to a
            mask. It ends when the others have converged.

    Returns:
        The estimate, as a stack of one, with the residual that was measured there.

    Example:
        >>> gmres(lambda v: 0.5 * v, torch.ones(2), tol=1e-6, max_iter=50).value.round(decimals=3)
        tensor([[2., 2.]])
    """
    found = None if rows is None else rows()
    wide, unit = in_the_middle(force)
    if enough is not None:
        enough = in_units(enough, unit)

    def split(vector: Tensor) -> Tensor:
        return split_rows(vector.unsqueeze(0), found)

    def join(matrix: Tensor) -> Tensor:
        return join_rows(matrix, found, wide.unsqueeze(0))[0]

    def pushed(matrix: Tensor) -> Tensor:
        return split(product(join(matrix).to(force.dtype)).to(wide.dtype))

    b = split(wide)
    size = norm(b)
    point, residual, left = torch.zeros_like(b), b, torch.zeros(len(b), dtype=torch.bool, device=b.device)
    best, smallest, best_left, at_best = point, math.inf, left, b
    trace: list[float] = []
    while not trace or len(trace) < max_iter - 1:
        space, kept, estimate = _Space(residual, max(min(LONGEST, max_iter - len(trace) - 1), 1)), point, math.inf
        while space.known < space.longest and estimate > tol:
            norms = space.add(pushed(space.last))
            if enough is not None and space.known % _ASKED_EVERY == 0:
                candidates = torch.where(left.unsqueeze(1), kept, point + space.solution())
                left, kept = left | enough(candidates, norms), candidates
            estimate = norm(norms.masked_fill(left, 0.0)) / size
            trace.append(estimate)
        point = torch.where(left.unsqueeze(1), kept, point + space.solution())
        residual = b + pushed(point) - point
        measured = norm(residual.masked_fill(left.unsqueeze(1), 0.0)) / size
        trace.append(measured)
        gains = measured < _GAIN * smallest
        if measured < smallest:
            best, smallest, best_left, at_best = point, measured, left, residual
        if smallest <= max(tol, floor) or not gains:
            break
    of_left = row_norms(at_best)[best_left]
    result = Relaxation(
        value=join(best).unsqueeze(0) * unit,
        residual=math.hypot(smallest, norm(of_left) / size),
        trace=tuple(trace),
        steps=len(trace),
        diverged=not math.isfinite(smallest),
        left=count_notable(of_left),
        solved=smallest,
    )
    return result.after(norm(best), size)


class _Space:
    """The Krylov space of each row: an orthonormal basis, and the least squares problem in it by plane rotations."""

    def __init__(self, residual: Tensor, longest: int) -> None:
        height, width = residual.shape
        sizes = row_norms(residual)
        self.longest, self.known = longest, 0
        self._basis = residual.new_empty(height, longest + 1, width)
        self._basis[:, 0] = residual * _inverse(sizes)
        self._triangle = np.zeros((height, longest, longest))
        self._turns = np.zeros((longest, 2, height))
        self._right = np.zeros((height, longest + 1))
        self._right[:, 0] = fetch(sizes)

    @property
    def last(self) -> Tensor:
        """The vector whose product comes next."""
        return self._basis[:, self.known]

    def add(self, image: Tensor) -> Tensor:
        """Take in its product; the norm of the residual that is left to each row."""
        k = self.known
        basis = self._basis[:, : k + 1]
        parts = torch.zeros_like(basis[:, :, :1])
        for _ in range(2):  # once is not enough where they nearly cancel
            part = basis @ image.unsqueeze(2)
            image = torch.baddbmm(image.unsqueeze(1), part.mT, basis, alpha=-1).squeeze(1)
            parts = parts + part
        sizes = row_norms(image)
        torch.mul(image, _inverse(sizes), out=self._basis[:, k + 1])
        numbers = fetch(torch.cat([parts[:, :, 0], sizes.unsqueeze(1).to(parts)], dim=1)).reshape(len(sizes), k + 2)
        column = -numbers.T  # of I - P
        column[k] += 1.0
        for j in range(k):
            c, s = self._turns[j]
            column[j], column[j + 1] = c * column[j] + s * column[j + 1], c * column[j + 1] - s * column[j]
        length = np.hypot(column[k], column[k + 1])
        safe = np.where(length > 0, length, 1.0)
        c, s = self._turns[k] = column[k] / safe, column[k + 1] / safe
        self._triangle[:, : k + 1, k] = column[: k + 1].T
        self._triangle[:, k, k] = length
        self._right[:, k + 1] = -s * self._right[:, k]
        self._right[:, k] *= c
        self.known += 1
        return torch.as_tensor(np.abs(self._right[:, k + 1]), dtype=sizes.dtype, device=sizes.device)

    def solution(self) -> Tensor:
        """What is to be added to the point."""
        k = self.known
        diagonal = np.einsum("rii->ri", self._triangle[:, :k, :k])
        is_spent = diagonal <= 0  # the space of that row has ended, or its equation has no solution
        triangle = self._triangle[:, :k, :k] + is_spent[:, :, None] * np.eye(k)
        right = np.where(is_spent, 0.0, self._right[:, :k])
        weights = np.linalg.solve(triangle, right[:, :, None])[:, :, 0]
        combination = torch.as_tensor(weights, dtype=self._basis.dtype, device=self._basis.device)
        moved: Tensor = (combination.unsqueeze(1) @ self._basis[:, :k]).squeeze(1)
        return moved


def _inverse(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, 1 / sizes, 0.0).unsqueeze(1)
