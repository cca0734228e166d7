"""Broyden's method for `z = f(z)`, and the estimate of `(I - J)^-1` that it builds on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

_TINY = 1e-12


@dataclass
class InverseEstimate:
    """`H = I + sum_k u_k w_k^T`, an estimate of `(I - J)^-1` for each row of a state.

    Args:
        count: Number of rows, each of which has an estimate of its own.
        left: The vectors `u_k`, of shape `(count, n)` each.
        right: The vectors `w_k`.

    Example:
        >>> estimate = InverseEstimate(1)
        >>> estimate.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]]))  # I - J halves this direction
        >>> estimate.apply(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 1.]])
    """

    count: int
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    @property
    def transposed(self) -> InverseEstimate:
        """`H^T`."""
        return replace(self, left=list(self.right), right=list(self.left))

    def apply(self, vectors: Tensor) -> Tensor:
        """`H r` for every row.

        Args:
            vectors: Of shape `(count, n)`.

        Returns:
            As many vectors.
        """
        result = vectors.clone()
        for u, w in zip(self.left, self.right, strict=True):
            result += u * (w * vectors).sum(1, keepdim=True)
        return result

    def update(self, moved: Tensor, changed: Tensor) -> None:
        """Broyden's update (1965), the good one: the smallest change with which `H changed = moved`.

        Args:
            moved: By how much the state moved.
            changed: By how much its residual `z - f(z)` changed.
        """
        through = self.apply(changed)
        denominator = (moved * through).sum(1, keepdim=True)
        scale = moved.square().sum(1, keepdim=True)
        # A row that does not move any more, or whose update would be singular, keeps what it has.
        sound = denominator.abs() > _TINY * scale.clamp_min(torch.finfo(scale.dtype).tiny)
        weights = torch.where(sound, 1 / torch.where(sound, denominator, 1.0), 0.0)
        right = self.transposed.apply(moved)
        self.left.append((moved - through) * weights)
        self.right.append(right)


@dataclass(frozen=True)
class BroydenRun:
    """Where Broyden's method stopped.

    Args:
        state: The state with the smallest residual, row by row.
        inverse: The estimate.
        sizes: Norm of the residual of each row at each step, of shape `(steps, rows)`.
    """

    state: Tensor
    inverse: InverseEstimate
    sizes: Tensor


def broyden(
    residual: Callable[[Tensor], Tensor],
    start: Tensor,
    inverse: InverseEstimate,
    max_iter: int,
    is_done: Callable[[Tensor, Tensor], bool] = lambda z, sizes: False,
) -> BroydenRun:
    """Solve `residual(z) = 0` for every row of a matrix.

    Args:
        residual: A map of matrices of the shape of `start`; asked `max_iter` times at most.
        start: First guess, of shape `(count, n)`.
        inverse: First estimate of the inverse of its derivative; it is updated.
        max_iter: Largest number of calls.
        is_done: Told a state and the norms of its residuals; says whether that is enough.

    Returns:
        The run.

    Example:
        >>> matrix, ones = torch.tensor([[0.0, 0.9], [0.5, 0.3]]), torch.ones(1, 2)
        >>> run = broyden(lambda z: z - z @ matrix.T - ones, ones, InverseEstimate(1), 10)
        >>> run.state.round(decimals=3)
        tensor([[6.4000, 6.0000]])
    """
    z, r = start, residual(start)
    best, sizes = z, [torch.linalg.vector_norm(r, dim=1)]
    lowest = sizes[0]
    while len(sizes) < max_iter and not is_done(best, lowest):
        step = -inverse.apply(r)
        if not bool(torch.isfinite(step).all()):
            break
        z = z + step
        new = residual(z)
        inverse.update(step, new - r)
        r = new
        sizes.append(torch.linalg.vector_norm(r, dim=1))
        better = sizes[-1] < lowest
        best = torch.where(better.unsqueeze(1), z, best)
        lowest = torch.where(better, sizes[-1], lowest)
    return BroydenRun(best, inverse, torch.stack(sizes))
