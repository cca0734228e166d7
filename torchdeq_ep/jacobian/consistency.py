"""Whether the derivative that autograd has of a map is that of its values.

A map hides a part of its derivative where it detaches a tensor, computes without gradients or in NumPy, or has a custom
backward, as straight-through tricks have. Values tell: a difference quotient along a direction sees all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.jacobian.linearization import products
from torchdeq_ep.state import Map, norm

_NEARER, _LEAST = 16.0, 4.0
_VISIBLE = 20.0
_FALLS = 0.6
_NOTHING = 1e-3


@dataclass(frozen=True)
class DerivativeMismatch:
    """How far the derivative of a map's values along a direction is from autograd's.

    Args:
        size: Norm of the difference, relative to the larger of the two; 0 where kinks or curvature explain it, NaN
            where rounding hides it.
        calls: Calls of the map and products with its Jacobian that finding out took.

    Example:
        >>> DerivativeMismatch(0.4, 7).size > 0.05
        True
    """

    size: float
    calls: int


def derivative_mismatch(f: Map, z: Tensor, direction: Tensor, rounding: float) -> DerivativeMismatch:
    """The difference of the two derivatives along a direction.

    Difference quotients are taken over two distances. What kinks and curvature do to them becomes less at the nearer
    one, by a factor of 4 and more; what is hidden from autograd does not. What rounding does to them, which may be more
    than was measured of it, becomes more there: the smaller of the two differences counts.

    Args:
        f: The map, on packed states.
        z: The state.
        direction: A vector of the shape of the state; not zero.
        rounding: Relative rounding error of one call of `f`.

    Returns:
        The mismatch.

    Raises:
        JacobianProductError: If `f` offers no product with its Jacobian.

    Example:
        >>> z = torch.linspace(-1, 1, 8)
        >>> u = torch.ones(8)
        >>> round(derivative_mismatch(lambda z: z.tanh() + z.detach(), z, u, 1e-7).size, 1)
        0.6
        >>> derivative_mismatch(torch.relu, z, u, 1e-7).size
        0.0
    """
    far = min(rounding ** (1 / 3), 0.1)
    near = max(far / _NEARER, _VISIBLE * rounding)
    if near > far / _LEAST:
        return DerivativeMismatch(math.nan, 0)
    wide = torch.promote_types(z.dtype, torch.float32)
    unit = (norm(z) or math.sqrt(z.numel())) / norm(direction)
    derivative = products(f, z)[0](direction.to(z.dtype)).to(wide)
    gaps = []
    for distance in (far, near):
        step = (distance * unit * direction).to(wide)
        above = f((z.to(wide) + step).to(z.dtype)).to(wide, copy=True)  # f may overwrite its buffer
        quotient = (above - f((z.to(wide) - step).to(z.dtype)).to(wide)) / (2 * distance * unit)
        gaps.append(norm(quotient - derivative))
    size = max(norm(quotient), norm(derivative))
    noise = rounding * norm(above) / (near * unit)
    if size <= max(_NOTHING * norm(direction), noise) or gaps[1] <= max(_FALLS * gaps[0], noise):
        return DerivativeMismatch(0.0, 8)
    return DerivativeMismatch(min(gaps) / size, 8)
