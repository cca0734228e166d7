"""Norms and angles of whole states, as numbers.

A norm is a sum of squares, and squares leave the range of a dtype long before the entries do: in half precision above
256, in single precision above 2e19 and below 1e-19. So squares of half precision are summed in single precision, and a
sum that left the range is taken again of entries that are scaled by a power of two, which rounds nothing. Only where
every square is zero, in single precision below 3e-23, the norm is zero too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_NORM = 1e-30


def norm(tensor: Tensor) -> float:
    """Euclidean norm of all entries, as a number; of entries however large.

    Args:
        tensor: Of any shape, real or complex.

    Returns:
        The norm.

    Example:
        >>> norm(torch.tensor([[3.0, 4.0]]))
        5.0
        >>> norm(torch.tensor([30000.0, 40000.0], dtype=torch.float16))
        50000.0
    """
    return _in_range(tensor.detach(), torch.linalg.vector_norm)


def largest_row_norm(stack: Tensor) -> float:
    """The largest norm of a row, as a number; of entries however large.

    Args:
        stack: Of shape `(K, *shape)`.

    Returns:
        The largest of `K` norms; 0 if there is none.

    Example:
        >>> largest_row_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        5.0
    """
    if not stack.numel():  # an empty batch
        return 0.0
    return _in_range(stack.detach().flatten(1), lambda wide: torch.linalg.vector_norm(wide, dim=1).max())


def row_norms(matrix: Tensor) -> Tensor:
    """The norm of each row, in single precision at least; of entries of any size that the norm itself is not beyond.

    Args:
        matrix: Real, of shape `(R, D)`.

    Returns:
        Tensor of shape `(R,)`.

    Example:
        >>> row_norms(torch.tensor([[3e30, 4e30], [3e-30, 4e-30]]))
        tensor([5.0000e+30, 5.0000e-30])
    """
    wide = _widened(matrix)
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1)
    if matrix.numel() == 0:
        return norms
    if wide.device.type == "cpu":  # elsewhere to look takes longer than to scale
        least, largest = fetch(*norms.aminmax())
        if least > _smallest(wide) and largest < math.inf:  # neither of which NaN is
            return norms
    return torch.where((norms > _smallest(wide)) & norms.isfinite(), norms, _scaled_row_norms(wide))


def _scaled_row_norms(wide: Tensor) -> Tensor:
    sizes = wide.abs().amax(1, keepdim=True)
    sizes = torch.where((sizes > 0) & sizes.isfinite(), sizes, 1.0)
    scaled: Tensor = torch.linalg.vector_norm(wide / sizes, dim=1) * sizes[:, 0]
    return scaled


def fetch(*tensors: Tensor) -> NDArray[np.float64]:
    """The entries of some tensors on the host, in one transfer: each makes an accelerator wait.

    Args:
        tensors: Real, of any shapes, on one device.

    Returns:
        All entries one after the other, of shape `(n,)`.

    Example:
        >>> fetch(torch.tensor(1.0), torch.tensor([[2.0, 3.0]]))
        array([1., 2., 3.])
    """
    entries = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    return entries.cpu().double().numpy()  # widened there: not every device has double precision


def norm_and(tensor: Tensor, *others: Tensor) -> tuple[float, NDArray[np.float64]]:
    """The norm of a tensor, and the entries of some others, in one transfer.

    Args:
        tensor: Of any shape, real.
        others: As for `fetch`.

    Returns:
        What `norm` has, and what `fetch` has.

    Example:
        >>> norm_and(torch.tensor([3.0, 4.0]), torch.tensor(2.0))
        (5.0, array([2.]))
    """
    if not others:
        return norm(tensor), np.empty(0)
    wide = _widened(tensor.detach())
    found = fetch(torch.linalg.vector_norm(wide), *others)
    return _checked(float(found[0]), wide, torch.linalg.vector_norm), found[1:]


def row_dots(stack: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row of a stack with that of another, in single precision at least.

    Args:
        stack: Real, of shape `(R, *shape)`.
        other: Of the same shape, or of one that is broadcast to it.

    Returns:
        Tensor of shape `(R,)`.

    Example:
        >>> row_dots(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0]))
        tensor([11.,  2.])
    """
    return (_widened(stack) * _widened(other)).reshape(len(stack), math.prod(stack.shape[1:])).sum(1)


def in_the_middle(tensor: Tensor) -> tuple[Tensor, float]:
    """A tensor scaled by a power of two, so that sums of squares of its entries stay within range.

    Args:
        tensor: Of any shape, real or complex.

    Returns:
        The scaled tensor, in single precision at least, with entries of about 1 at most, and the factor that was taken
        out. The factor is 1 for a tensor of zeros, and for one that is not finite.

    Example:
        >>> in_the_middle(torch.tensor([2.0**100, 2.0**99]))
        (tensor([0.5000, 0.2500]), 2.535301200456459e+30)
    """
    wide = _widened(tensor)
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    if not 0 < largest < math.inf:
        return wide, 1.0
    bound = math.frexp(torch.finfo(wide.dtype).max)[1] - 2  # the factor and its inverse are numbers of that dtype
    factor = 2.0 ** min(max(math.frexp(largest)[1], -bound), bound)
    return wide * (1 / factor), factor


def relative_difference(tensor: Tensor, reference: Tensor) -> float:
    """`|tensor - reference| / |reference|` over all entries; absolute where the reference is zero.

    Args:
        tensor: What is compared.
        reference: What it is compared with, of the same shape.

    Returns:
        The ratio of the norms.

    Example:
        >>> relative_difference(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 0.0]))
        1.5
    """
    scale = norm(reference)
    return norm(_widened(tensor) - _widened(reference)) / (scale if scale > MIN_NORM else 1.0)


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two tensors as vectors.

    Args:
        one: One, real.
        other: The other, of the same shape.

    Returns:
        -1 to 1; NaN where one of them is zero.

    Example:
        >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        0.0
    """
    one, other = in_the_middle(one.detach())[0], in_the_middle(other.detach())[0]
    lengths = norm(one) * norm(other)
    return float((one * other).sum()) / lengths if lengths > 0 else math.nan


def _in_range(tensor: Tensor, measure: Callable[[Tensor], Tensor]) -> float:
    wide = _widened(tensor)
    return _checked(float(measure(wide)), wide, measure)


def _checked(size: float, wide: Tensor, measure: Callable[[Tensor], Tensor]) -> float:
    """The measured size, or that of scaled entries where squares have left the range."""
    if size == 0.0 or _smallest(wide) < size < math.inf or math.isnan(size):
        return size  # zero also where every square was too small to be a number: such a force counts as none
    scaled, factor = in_the_middle(wide)
    return float(measure(scaled)) * factor


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _smallest(wide: Tensor) -> float:
    """Norms below it may have lost entries of their size, whose squares are too small to be numbers."""
    limits = torch.finfo(wide.dtype)
    return math.sqrt(limits.tiny / limits.eps)
