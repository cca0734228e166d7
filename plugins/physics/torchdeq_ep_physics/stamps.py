"""How branches add up to the matrix of a network: each brings a few entries, in proportion to its own value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep_physics.matrices import DenseMatrix, Matrix, Pattern

Branch = tuple[int, int]

_DENSE_UP_TO = 256
_FULL = 0.1


@dataclass(frozen=True)
class Branches:
    """Pairs of terminals as two tensors.

    Args:
        first: The first terminal of each pair.
        second: The second.
    """

    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, pairs: Sequence[Branch]) -> Branches:
        """Those of a list of pairs."""
        ends = torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2)
        return cls(ends[:, 0].contiguous(), ends[:, 1].contiguous())

    def pick(self, numbers: Tensor) -> Branches:
        """Some of the branches."""
        return Branches(self.first[numbers], self.second[numbers])

    def across(self, u: Tensor) -> Tensor:
        """The voltage of the first end against the second, for voltages of shape `(batch, terminals)`."""
        return u.index_select(1, self.first.to(u.device)) - u.index_select(1, self.second.to(u.device))

    def at_ends(self, values: Tensor, terminals: int, sign: float = 1.0) -> Tensor:
        """What branches add up to at each terminal: their values at the first end, and times a sign at the second."""
        total = values.new_zeros(len(values), terminals)
        total = total.index_add(1, self.first.to(values.device), values)
        return total.index_add(1, self.second.to(values.device), sign * values)

    def least_at_ends(self, values: Tensor, terminals: int) -> Tensor:
        """The smallest value of the branches at each terminal, of shape `(batch, terminals)`; at most 1."""
        least = values.new_ones(len(values), terminals)
        for ends in (self.first, self.second):
            least = least.scatter_reduce(1, ends.to(values.device).expand_as(values), values, "amin")
        return least


@dataclass(frozen=True)
class Stamps:
    """Entries `(row, column)` that branches add to.

    Args:
        rows: Of each entry.
        columns: Likewise.
        signs: Of the branch's value in it.
        branch: The branch that it belongs to.
    """

    rows: Tensor
    columns: Tensor
    signs: Tensor
    branch: Tensor

    @classmethod
    def of_currents(cls, outputs: Branches, controls: Branches, size: int) -> Stamps:
        """Those of currents from the first to the second output in proportion to the voltage between the controls.

        Args:
            outputs: Terminals that the current of each branch flows out of, and into.
            controls: Terminals whose voltage it is proportional to. Those of a resistor are its outputs.
            size: Number of free nodes, which come first: rows of others are left out.

        Returns:
            The stamps; columns are terminals.
        """
        count = len(outputs.first)
        rows = torch.cat([outputs.first, outputs.first, outputs.second, outputs.second])
        columns = torch.cat([controls.first, controls.second]).repeat(2)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat_interleave(count)
        branch = torch.arange(count).repeat(4)
        kept = rows < size
        return cls(rows[kept], columns[kept], signs[kept], branch[kept])

    def among(self, size: int) -> Stamps:
        """Those in the first columns."""
        kept = self.columns < size
        return Stamps(self.rows[kept], self.columns[kept], self.signs[kept], self.branch[kept])

    def values(self, of_branches: Tensor) -> Tensor:
        """What is added to each entry, of shape `(..., entries)`, for values of shape `(..., branches)`."""
        return self.signs.to(of_branches) * of_branches[..., self.branch.to(of_branches.device)]

    def dense(self, of_branches: Tensor, height: int, width: int) -> Tensor:
        """The matrix, of shape `(..., height, width)`."""
        values = self.values(of_branches)
        matrix = values.new_zeros(*values.shape[:-1], height * width)
        places = (self.rows * width + self.columns).to(values.device)
        return matrix.index_add(-1, places, values).reshape(*values.shape[:-1], height, width)


class Assembly:
    """The stiffness matrix of a network from the stamps of its branches.

    Args:
        stamps: Of one kind of branch after another.
        size: Rows and columns of the matrix.
        is_symmetric: Whether it is symmetric.
    """

    def __init__(self, stamps: Sequence[Stamps], size: int, is_symmetric: bool) -> None:
        self.stamps = [kind.among(size) for kind in stamps]
        self.size, self.is_symmetric = size, is_symmetric
        rows = torch.cat([kind.rows for kind in self.stamps])
        columns = torch.cat([kind.columns for kind in self.stamps])
        self.pattern = Pattern.of(rows, columns, size, is_symmetric)
        self.is_dense = size <= _DENSE_UP_TO or self.pattern.entries > _FULL * size**2

    def matrix(self, of_branches: Sequence[Tensor]) -> Matrix:
        """The matrices of a batch.

        Args:
            of_branches: Values for each kind of branch, of shape `(batch, branches)`, or `(branches,)` where all rows
                of the batch have the same.

        Returns:
            The matrices.
        """
        batch = max(len(values) for values in of_branches if values.dim() > 1)
        if self.is_dense:
            total = of_branches[0].new_zeros(batch, self.size, self.size)
            for kind, values in zip(self.stamps, of_branches, strict=True):
                total = total + kind.dense(values, self.size, self.size)
            return DenseMatrix(total, total if self.is_symmetric else None)
        parts = [kind.values(values).expand(batch, -1) for kind, values in zip(self.stamps, of_branches, strict=True)]
        return self.pattern.matrix(torch.cat(parts, 1))
