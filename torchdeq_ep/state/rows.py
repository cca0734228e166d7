"""The samples of a batch: where they lie in a packed state, and whether each has its value to itself.

Rows of a state are samples where the map treats them apart, as convolutional and dense networks do. Graph networks,
batch norm, attention over the batch, or a state whose first dimension is none of samples couple them. Nothing tells the
two apart from outside, so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.state.norms import norm

_MOVED, _ROUNDINGS = 1e-2, 10
_TRIALS = 2


@dataclass(frozen=True)
class Rows:
    """Where the samples of a batch lie in a packed state.

    Args:
        count: Number of samples.
        parts: Entries of one sample in each tensor of the state; the tensors are packed one after the other.

    Example:
        >>> rows = Rows(2, (1, 2))  # a state of two tensors, of shapes (2, 1) and (2, 2)
        >>> rows.split(torch.tensor([[1.0, 2.0, 10.0, 11.0, 20.0, 21.0]]))
        tensor([[ 1., 10., 11.],
                [ 2., 20., 21.]])
    """

    count: int
    parts: tuple[int, ...]

    def split(self, stack: Tensor) -> Tensor:
        """One row for each sample of each state in a stack.

        Args:
            stack: Packed states, or pairs of their real and imaginary parts: `(K, *shape)` or `(K, *shape, 2)`.

        Returns:
            A matrix of `K * count` rows; a view where the state is one tensor.
        """
        height = len(stack) * self.count
        if len(self.parts) == 1:
            return stack.reshape(height, -1)
        pieces = torch.split(stack.reshape(len(stack), -1), self._widths(stack), dim=1)
        return torch.cat([piece.reshape(height, -1) for piece in pieces], dim=1)

    def join(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The stack that was split.

        Args:
            matrix: As `split` returns it.
            like: A stack of the shape wanted.

        Returns:
            A stack of that shape.
        """
        if len(self.parts) == 1:
            return matrix.reshape(like.shape)
        pieces = torch.split(matrix, [width // self.count for width in self._widths(like)], dim=1)
        return torch.cat([piece.reshape(len(like), -1) for piece in pieces], dim=1).reshape(like.shape)

    def _widths(self, stack: Tensor) -> list[int]:
        pair = stack.numel() // (len(stack) * self.count * sum(self.parts))
        return [self.count * part * pair for part in self.parts]


def split_rows(stack: Tensor, rows: Rows | None) -> Tensor:
    """One row for each sample of each state in a stack, or one for all of it where there are no samples.

    Args:
        stack: As for `Rows.split`.
        rows: Where the samples lie, if there are any.

    Returns:
        A matrix.

    Example:
        >>> split_rows(torch.zeros(1, 2, 3), None).shape, split_rows(torch.zeros(1, 2, 3), Rows(2, (3,))).shape
        (torch.Size([1, 6]), torch.Size([2, 3]))
    """
    return stack.reshape(1, -1) if rows is None else rows.split(stack)


def join_rows(matrix: Tensor, rows: Rows | None, like: Tensor) -> Tensor:
    """The stack that was split, in the shape of `like`."""
    return matrix.reshape(like.shape) if rows is None else rows.join(matrix, like)


def are_independent(f: Callable[[Tensor], Tensor], z: Tensor, value: Tensor, rows: Rows) -> bool:
    """Whether a random half of the rows can be moved without any effect on the other half, tried twice.

    The half is moved by a hundredth of the state's size, or by what is visible in its dtype, each entry by a random
    part and all by a common one, which means and variances over the batch see too. The same input is rounded to the
    same value, so what counts as an effect is the change of one last digit.

    Args:
        f: The map, on packed states.
        z: A packed state.
        value: `f(z)`.
        rows: Where the samples lie.

    Returns:
        Whether they are independent. It takes one call of `f` if they are not, and two if they are.

    Example:
        >>> z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> are_independent(torch.tanh, z, torch.tanh(z), Rows(4, (3,)))
        True
        >>> centred = lambda z: z - z.mean(0)
        >>> are_independent(centred, z, centred(z), Rows(4, (3,)))
        False
    """
    generator = torch.Generator().manual_seed(0)
    before = rows.split(value.unsqueeze(0)).to(torch.promote_types(value.dtype, torch.float32))
    size = norm(z) / z.numel() ** 0.5 or 1.0
    eps = torch.finfo(value.dtype).eps
    distance = size * max(_MOVED, _ROUNDINGS * eps)
    for _ in range(_TRIALS):
        order = torch.randperm(rows.count, generator=generator).to(z.device)
        moved, still = order[: rows.count // 2], order[rows.count // 2 :]
        matrix = rows.split(z.unsqueeze(0)).clone()
        noise = torch.randn(len(moved), matrix.shape[1], generator=generator).to(matrix)
        matrix[moved] += distance * (1 + noise)
        after = rows.split(f(rows.join(matrix, z.unsqueeze(0))[0]).unsqueeze(0)).to(before.dtype)
        if not norm(after[still] - before[still]) <= eps * norm(before[still]):
            return False
    return True
