"""Stiffness matrices of a batch of states, dense or sparse: their factors, and whether they are stable.

The matrix is `K = -dF/dz`. A state is stable if all eigenvalues of `K` have positive real parts. Where the system has
an energy, `K` is similar to a symmetric matrix, so a Cholesky factor, or the signs of the pivots of an `L D L^T`
(Sylvester's law of inertia), tell that without an eigenvalue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import ArpackError, SuperLU, eigs, eigsh, splu
from torch import Tensor

_EIGENVALUES_UP_TO = 128  # beyond it inverse iteration estimates the smallest one
_DENSE_UP_TO = 1500
_ROUNDS = 20
_FIRST_SHIFT = 1e-6
_SYMMETRIC: dict[str, Any] = {
    "permc_spec": "MMD_AT_PLUS_A",
    "diag_pivot_thresh": 0.0,
    "options": {"SymmetricMode": True},
}


class Factor(ABC):
    """What a batch of matrices has been factorised into.

    Args:
        definite: Which of them are positive definite, of shape `(batch,)`; all if the matrices are not symmetric.
    """

    definite: Tensor

    @abstractmethod
    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """`K^-1 r`, or `K^-T r`, for `r` of shape `(batch, n)` or `(count, batch, n)`."""


class Matrix(ABC):
    """A batch of stiffness matrices."""

    @abstractmethod
    def factor(self, shift: Tensor) -> Factor:
        """The factors of `K + diag(shift)`, of shape `(batch, n)`."""

    @abstractmethod
    def lowest(self, row: int) -> tuple[float, Tensor]:
        """The smallest real part of an eigenvalue of one matrix, and the direction that belongs to it."""

    @abstractmethod
    def smallest(self, factor: Factor) -> Tensor:
        """The smallest real part of the eigenvalues of each matrix; an estimate from above if they are large."""


@dataclass(frozen=True)
class DenseFactor(Factor):
    """A Cholesky factor of each matrix, or `LU` factors."""

    definite: Tensor
    cholesky: Tensor | None
    lu: tuple[Tensor, Tensor] | None

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        columns = r.unsqueeze(-1) if r.dim() == 2 else r.movedim(0, -1)
        if self.cholesky is not None:
            found = torch.cholesky_solve(columns, self.cholesky)
        else:
            found = torch.linalg.lu_solve(*cast(tuple[Tensor, Tensor], self.lu), columns, adjoint=transposed)
        return found.squeeze(-1) if r.dim() == 2 else found.movedim(-1, 0)


@dataclass(frozen=True)
class DenseMatrix(Matrix):
    """Dense matrices of shape `(batch, n, n)`.

    Args:
        values: `K`.
        symmetric: A symmetric matrix that is similar to `K`, and to `K` plus any shift; `K` itself if that is
            symmetric; `None` if there is none.
    """

    values: Tensor
    symmetric: Tensor | None

    def factor(self, shift: Tensor) -> DenseFactor:
        shifted = self.values + torch.diag_embed(shift)
        if self.symmetric is None:
            lu, pivots, _ = torch.linalg.lu_factor_ex(shifted)
            return DenseFactor(torch.ones_like(shift[:, 0], dtype=torch.bool), None, (lu, pivots))
        if self.symmetric is self.values:
            cholesky, info = torch.linalg.cholesky_ex(shifted)
            return DenseFactor(info == 0, cholesky, None)
        _, info = torch.linalg.cholesky_ex(self.symmetric + torch.diag_embed(shift))
        lu, pivots, _ = torch.linalg.lu_factor_ex(shifted)
        return DenseFactor(info == 0, None, (lu, pivots))

    def lowest(self, row: int) -> tuple[float, Tensor]:
        if self.symmetric is self.values:
            values, vectors = torch.linalg.eigh(self.values[row])
            return float(values[0]), vectors[:, 0]
        found, directions = torch.linalg.eig(self.values[row])
        first = int(found.real.argmin())
        return float(found.real[first]), directions[:, first].real

    def smallest(self, factor: Factor) -> Tensor:
        if self.symmetric is None:
            lowest: Tensor = torch.stack([torch.linalg.eigvals(matrix).real.min() for matrix in self.values])
            return lowest
        if self.values.shape[1] <= _EIGENVALUES_UP_TO:
            found: Tensor = torch.linalg.eigvalsh(self.symmetric)[:, 0]
            return found
        return _by_inverse_iteration(factor, self.values[:, 0])


@dataclass(frozen=True)
class Pattern:
    """Where the entries of a sparse matrix are, and what is added up in each.

    Args:
        size: Rows and columns.
        slots: The entry that each contribution is added to.
        indices: Row of each entry, column by column.
        pointers: Where each column begins.
        is_symmetric: Whether the matrices are.
    """

    size: int
    slots: Tensor
    indices: Any
    pointers: Any
    is_symmetric: bool

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, size: int, is_symmetric: bool) -> Pattern:
        """The pattern of contributions to entries; the diagonal is always in it, last."""
        diagonal = torch.arange(size)
        rows, columns = torch.cat([rows, diagonal]), torch.cat([columns, diagonal])
        keys, slots = torch.unique(columns * size + rows, return_inverse=True)
        pointers = np.searchsorted((keys // size).numpy(), np.arange(size + 1))
        return cls(size, slots, (keys % size).numpy().astype(np.int32), pointers.astype(np.int32), is_symmetric)

    @property
    def entries(self) -> int:
        """Number of entries that are not zero."""
        return len(self.indices)

    def matrix(self, contributions: Tensor) -> SparseMatrix:
        """The matrices of contributions of shape `(batch, m)`, without those of the diagonal."""
        values = contributions.new_zeros(len(contributions), self.entries)
        return SparseMatrix(self, values.index_add(1, self.slots[: contributions.shape[1]], contributions))


@dataclass(frozen=True)
class SparseFactor(Factor):
    """`LU` factors of each matrix, by SuperLU."""

    definite: Tensor
    parts: Sequence[SuperLU]

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        found = torch.empty_like(r)
        for row, part in enumerate(self.parts):
            columns = r[..., row, :].double().numpy().T
            found[..., row, :] = torch.from_numpy(part.solve(columns, "T" if transposed else "N").T)
        return found


@dataclass(frozen=True)
class SparseMatrix(Matrix):
    """Sparse matrices of one pattern.

    Args:
        pattern: Theirs.
        values: Of the entries, of shape `(batch, entries)`.
    """

    pattern: Pattern
    values: Tensor

    def factor(self, shift: Tensor) -> SparseFactor:
        diagonal = self.pattern.slots[-self.pattern.size :]
        shifted = self.values.index_add(1, diagonal, shift).double()
        definite: list[bool] = []
        parts: list[Any] = []
        for values in shifted:
            try:
                part = splu(self._of(values), **(_SYMMETRIC if self.pattern.is_symmetric else {}))
            except RuntimeError:  # exactly singular
                part = None
                definite.append(False)
                parts.append(part)
                continue
            # Pivots on the diagonal have the signs of the eigenvalues; one that is not there is a zero.
            on_diagonal = not self.pattern.is_symmetric or bool((part.perm_r == part.perm_c).all())
            definite.append(on_diagonal and (not self.pattern.is_symmetric or bool((part.U.diagonal() > 0).all())))
            parts.append(part)
        return SparseFactor(torch.tensor(definite), parts)

    def lowest(self, row: int) -> tuple[float, Tensor]:
        matrix = self._of(self.values[row].double())
        if self.pattern.size <= _DENSE_UP_TO:
            dense = torch.from_numpy(matrix.toarray()).unsqueeze(0)
            value, direction = DenseMatrix(dense, dense if self.pattern.is_symmetric else None).lowest(0)
            return value, direction.to(self.values)
        if self.pattern.is_symmetric:
            values, vectors = eigsh(matrix, k=1, which="SA", tol=1e-6)
        else:
            try:
                values, vectors = eigs(matrix, k=1, which="SR", tol=1e-6)
            except ArpackError:
                values, vectors = eigs(matrix, k=1, sigma=0.0)
        return float(values[0].real), torch.from_numpy(vectors[:, 0].real).to(self.values)

    def smallest(self, factor: Factor) -> Tensor:
        if self.pattern.is_symmetric:
            return _by_inverse_iteration(factor, self.values[:, : self.pattern.size])
        return torch.tensor([self.lowest(row)[0] for row in range(len(self.values))]).to(self.values)

    def _of(self, values: Tensor) -> Any:
        pattern, shape = self.pattern, (self.pattern.size, self.pattern.size)
        return scipy.sparse.csc_matrix((values.numpy(), pattern.indices, pattern.pointers), shape=shape)


def definite_factor(matrix: Matrix, shift: Tensor, scale: Tensor) -> tuple[Factor, Tensor]:
    """The factors of matrices plus shifts that are just as large as it takes to make them positive definite.

    Args:
        matrix: The matrices.
        shift: A first guess, of shape `(batch,)`, in units of `scale`.
        scale: Positive diagonals, of shape `(batch, n)`.

    Returns:
        The factors, and the shifts.
    """
    for _ in range(_ROUNDS):
        factor = matrix.factor(shift.unsqueeze(1) * scale)
        if bool(factor.definite.all()):
            break
        shift = torch.where(factor.definite, shift, (10 * shift).clamp_min(_FIRST_SHIFT))
    return factor, shift


def _by_inverse_iteration(factor: Factor, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    n = factor.parts[0].shape[0] if isinstance(factor, SparseFactor) else like.shape[1]
    vector = torch.randn(len(like), n, generator=generator, dtype=torch.float64).to(like)
    for _ in range(_ROUNDS):
        vector = vector / vector.norm(dim=1, keepdim=True)
        following = factor.solve(vector)
        value, vector = (vector * following).sum(1), following
    return torch.reciprocal(value)
