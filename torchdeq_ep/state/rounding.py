"""The rounding error of a map, measured: its dtype says how values are stored, not how they were computed.

A map may multiply matrices in TF32, compute in bfloat16 and return float32, or be a solver with a tolerance. A second
difference `f(z + h u) - 2 f(z) + f(z - h u)` takes away what is linear in `h`. Of what is left, curvature falls as
`h^2`, kinks as `h^1.5`, and rounding by less than the root of `h`: so the scale at which it ceases to fall is found
(after Moré & Wild 2011, SIAM J. Sci. Comput. 33:1292, who take higher differences at one scale).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchdeq_ep.state.norms import norm

_LARGEST, _SMALLEST_IN_EPS = 3e-3, 8
_FLOOR_IN_EPS = 4
_NEAREST = 0.25
_FARTHEST = 0.3
_NOISE_POWER = 0.75
_STEEP, _NEARLY = 0.1, 3.0
_WIDER, _GROWN = 4.0, 2.5


def measured_rounding(f: Callable[[Tensor], Tensor], z: Tensor, value: Tensor) -> tuple[float, int]:
    """Relative rounding error of one call of a map, at a state.

    Args:
        f: The map.
        z: A state, of any shape.
        value: `f(z)`.

    Returns:
        The norm of the error relative to that of the value, at least a quarter of `torch.finfo(z.dtype).eps`, which is
        that of rounding each entry to the nearest number; and the number of calls of `f` that it took, mostly four.

    Example:
        >>> z = torch.randn(50, generator=torch.Generator().manual_seed(0))
        >>> coarse = lambda z: torch.tanh(z).bfloat16().float()
        >>> measured_rounding(torch.tanh, z, torch.tanh(z))[0] < 1e-6
        True
        >>> 5e-4 < measured_rounding(coarse, z, coarse(z))[0] < 1e-2
        True
    """
    eps = torch.finfo(z.dtype).eps
    difference = _SecondDifference(f, z, value)
    h = max(_LARGEST, _SMALLEST_IN_EPS * eps)
    found = difference(h)
    while found > _FLOOR_IN_EPS * eps and h > _SMALLEST_IN_EPS * eps:
        # To where curvature alone would leave no more than rounding.
        smaller = h * min(max(math.sqrt(2 * eps / found), 1e-3), 0.1)
        below = difference(smaller)
        ratio = h / smaller
        fall = found / below if below > 0 else math.inf
        # So large a difference is one of a steep map, which falls as curvature or as a kink at the state itself does,
        # or of rounding in few entries, which falls anyhow. Beyond a kink it grows; rounding does not.
        is_smooth = 1 / _NEARLY < fall / ratio**2 < _NEARLY or 0.8 < fall / ratio < 1.25
        is_coarse = found > _STEEP * h and not is_smooth and difference(_WIDER * h) < _GROWN * found
        if is_coarse or fall < ratio**_NOISE_POWER:
            found = difference.at_its_own_scale(h, found) if is_coarse or below > smaller else below
            break
        h, found = smaller, below
    return max(found, _NEAREST * eps) if math.isfinite(found) else eps, difference.calls


class _SecondDifference:
    """The second difference of a map along a random direction of the size of the state, relative to the value."""

    def __init__(self, f: Callable[[Tensor], Tensor], z: Tensor, value: Tensor) -> None:
        self._f, self._z = f, z
        self._wide = torch.promote_types(z.dtype, torch.float32)
        self._twice, self._size = 2 * value.to(self._wide), norm(value) or 1.0
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(z.shape, generator=generator, dtype=self._wide).to(z.device)
        self._direction = direction * ((norm(z) or math.sqrt(z.numel())) / math.sqrt(z.numel()))
        self.calls = 0

    def __call__(self, h: float) -> float:
        self.calls += 2
        step, wide = h * self._direction, self._z.to(self._wide)
        above = self._f((wide + step).to(self._z.dtype)).to(self._wide, copy=True)  # f may overwrite its buffer
        below = self._f((wide - step).to(self._z.dtype)).to(self._wide)
        return norm(above + below - self._twice) / (math.sqrt(6) * self._size)

    def at_its_own_scale(self, h: float, found: float) -> float:
        """What it is where the map is moved by as much as it rounds, so that every entry is rounded anew."""
        while found > h and h < _FARTHEST:
            h = min(max(10 * h, found), _FARTHEST)
            found = max(found, min(self(h), h))
        return found


def precision_settings() -> tuple[str, ...]:
    """What PyTorch is told of the precision of products in float32: a map rounds otherwise when it changes.

    Returns:
        The settings that this version has.

    Example:
        >>> len(precision_settings()) > 0
        True
    """
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    try:
        return (torch.get_float32_matmul_precision(), *(str(backend.allow_tf32) for backend in backends))
    except RuntimeError:  # PyTorch refuses the old names once the new ones were used, and the other way round
        return tuple(str(getattr(backend, "fp32_precision", "")) for backend in backends)
