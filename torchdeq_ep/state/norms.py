"""Norms and angles of whole states, as numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_NORM = 1e-30


def norm(tensor: Tensor) -> float:
    """Euclidean norm of all entries, as a number.

    Args:
        tensor: Of any shape, real or complex.

    Returns:
        The norm.

    Example:
        >>> norm(torch.tensor([[3.0, 4.0]]))
        5.0
    """
    return float(torch.linalg.vector_norm(tensor.detach()))


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
    return norm(tensor - reference) / (scale if scale > MIN_NORM else 1.0)


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two tensors as vectors.

    Args:
        one: One.
        other: The other, of the same shape.

    Returns:
        -1 to 1; NaN where one of them is zero.

    Example:
        >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        0.0
    """
    lengths = norm(one) * norm(other)
    return float((one * other).sum()) / lengths if lengths > 0 else math.nan
