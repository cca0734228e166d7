"""Rules of piecewise analytic operations: the real part chooses the piece.

Each piece is analytic, and so is the whole as long as no unit crosses from one to another while the contour is run
through. The rules report the units that may have: at a node `x = x_0 + r e^{i t}` of the contour around a unit `x_0`,
those whose distance to the kink has a real part smaller than its imaginary part. At `t = pi/2` that is exactly
`|x_0| < r`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.holomorphic.registry import CannotContinueError, gated

Kink = Callable[[Tensor], None]

_RECTIFIERS = "rectifiers"
_ORDER = "order"
_POOLING = "max pooling"
_COMPARISONS = "comparisons"


def _inplace(z: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return z.copy_(value) if inplace else value


def _above(kink: Kink, z: Tensor, threshold: float = 0) -> Tensor:
    kink(z - threshold)
    return z.real > threshold


@gated("relu", _RECTIFIERS, r"$z$ where $\mathrm{Re}\,z > 0$, else 0")
def _relu(kink: Kink, input: Tensor, inplace: bool = False) -> Tensor:
    return _inplace(input, torch.where(_above(kink, input), input, 0), inplace)


@gated("leaky_relu", _RECTIFIERS, "slope by the sign of the real part")
def _leaky_relu(kink: Kink, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return _inplace(input, torch.where(_above(kink, input), input, negative_slope * input), inplace)


@gated("prelu", _RECTIFIERS, "slope by the sign of the real part")
def _prelu(kink: Kink, input: Tensor, weight: Tensor) -> Tensor:
    slope = weight.reshape(-1, *(1,) * (input.dim() - 2)) if weight.numel() > 1 and input.dim() > 1 else weight
    return torch.where(_above(kink, input), input, slope * input)


@gated("threshold", _RECTIFIERS, "piece by the real part")
def _threshold(kink: Kink, input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    return _inplace(input, torch.where(_above(kink, input, threshold), input, value), inplace)


@gated("elu", _RECTIFIERS, r"$z$ or $\alpha (e^z - 1)$, by the sign of the real part")
def _elu(
    kink: Kink,
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    scale: float = 1.0,
    input_scale: float = 1.0,
) -> Tensor:
    positive = _above(kink, input)
    exponential = alpha * torch.expm1(input_scale * torch.where(positive, 0, input))
    return _inplace(input, scale * torch.where(positive, input, exponential), inplace)


@gated("celu", _RECTIFIERS, r"$z$ or $\alpha (e^{z / \alpha} - 1)$, by the sign of the real part")
def _celu(kink: Kink, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return _elu(kink, input, alpha, inplace, input_scale=1 / alpha)


@gated("selu", _RECTIFIERS, "scaled `elu`")
def _selu(kink: Kink, input: Tensor, inplace: bool = False) -> Tensor:
    return _elu(kink, input, _SELU_ALPHA, inplace, _SELU_SCALE)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _clamp_between(kink: Kink, z: Tensor, low: Any, high: Any) -> Tensor:
    for bound, is_upper in ((low, False), (high, True)):
        if bound is None:
            continue
        distance = z - bound
        kink(distance)
        outside = distance.real > 0 if is_upper else distance.real < 0
        z = torch.where(outside, bound, z)
    return z


@gated("clamp clip", _RECTIFIERS, "the bound where the real part is beyond it")
def _clamp(kink: Kink, input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return _clamp_between(kink, input, min, max)


@gated("clamp_min", _RECTIFIERS, "the bound where the real part is beyond it")
def _clamp_min(kink: Kink, input: Tensor, min: Any) -> Tensor:
    return _clamp_between(kink, input, min, None)


@gated("clamp_max", _RECTIFIERS, "the bound where the real part is beyond it")
def _clamp_max(kink: Kink, input: Tensor, max: Any) -> Tensor:
    return _clamp_between(kink, input, None, max)


@gated("hardtanh", _RECTIFIERS, "`clamp`")
def _hardtanh(
    kink: Kink,
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    return _inplace(input, _clamp_between(kink, input, min_val, max_val), inplace)


@gated("relu6", _RECTIFIERS, "`clamp`")
def _relu6(kink: Kink, input: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(kink, input, 0.0, 6.0, inplace)


@gated("hardsigmoid", _RECTIFIERS, "`clamp`")
def _hardsigmoid(kink: Kink, input: Tensor, inplace: bool = False) -> Tensor:
    return _inplace(input, _clamp_between(kink, input, -3.0, 3.0) / 6 + 0.5, inplace)


@gated("hardswish", _RECTIFIERS, "`clamp`")
def _hardswish(kink: Kink, input: Tensor, inplace: bool = False) -> Tensor:
    return _inplace(input, input * (_clamp_between(kink, input, -3.0, 3.0) / 6 + 0.5), inplace)


@gated("hardshrink", _RECTIFIERS, "piece by the real part")
def _hardshrink(kink: Kink, input: Tensor, lambd: float = 0.5) -> Tensor:
    kink(input - lambd)
    kink(input + lambd)
    return torch.where(input.real.abs() > lambd, input, 0)


@gated("softshrink", _RECTIFIERS, "piece by the real part")
def _softshrink(kink: Kink, input: Tensor, lambd: float = 0.5) -> Tensor:
    return input - _clamp_between(kink, input, -lambd, lambd)


def _absolute(kink: Kink, z: Tensor) -> Tensor:
    return torch.where(_above(kink, z), z, -z)


@gated("abs absolute", _RECTIFIERS, r"$\mathrm{sign}(\mathrm{Re}\,z)\,z$")
def _abs(kink: Kink, input: Tensor) -> Tensor:
    return _absolute(kink, input)


@gated("sign", _COMPARISONS, "sign of the real part")
def _sign(kink: Kink, input: Tensor) -> Tensor:
    kink(input)
    return torch.sign(input.real).to(input.dtype)


@gated("softsign", _RECTIFIERS, r"$z / (1 \pm z)$, by the sign of the real part")
def _softsign(kink: Kink, input: Tensor) -> Tensor:
    return input / (1 + _absolute(kink, input))


@gated("l1_loss", _RECTIFIERS, "`abs`")
def _l1_loss(
    kink: Kink,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None or weight is not None:
        raise CannotContinueError("size_average, reduce and weight are not supported here")
    loss = _absolute(kink, input - target)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _compared(name: str) -> Callable[..., Tensor]:
    def apply(kink: Kink, input: Any, other: Any) -> Tensor:
        difference = input - other
        kink(difference)
        result: Tensor = getattr(torch, name)(difference.real, 0)
        return result

    return apply


for _name in ("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"):
    gated(_name, _COMPARISONS, "of real parts")(_compared(_name))


def _pairwise(larger: bool) -> Callable[..., Tensor]:
    def apply(kink: Kink, input: Tensor, other: Tensor) -> Tensor:
        difference = input - other
        kink(difference)
        return torch.where((difference.real > 0) == larger, input, other)

    return apply


gated("maximum fmax", _ORDER, "by the real part")(_pairwise(True))
gated("minimum fmin", _ORDER, "by the real part")(_pairwise(False))


def _winner(kink: Kink, z: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries at `index`, which has one entry along `dim`; counted once if any other entry is too near."""
    best = z.gather(dim, index)
    gap = best - z
    rival = gap.real.abs() < gap.imag.abs()
    kink(torch.where(rival.any(dim), torch.full_like(best.squeeze(dim), 1j), 1))
    return best


def _extreme(kink: Kink, z: Tensor, dim: int, keepdim: bool, largest: bool) -> tuple[Tensor, Tensor]:
    index = z.real.argmax(dim, keepdim=True) if largest else z.real.argmin(dim, keepdim=True)
    best = _winner(kink, z, index, dim)
    return (best, index) if keepdim else (best.squeeze(dim), index.squeeze(dim))


def _max_or_min(largest: bool) -> Callable[..., Any]:
    result_type = torch.return_types.max if largest else torch.return_types.min
    pairwise = _pairwise(largest)

    def apply(kink: Kink, input: Tensor, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
        other = dim if isinstance(dim, Tensor) else other
        if other is not None:
            return pairwise(kink, input, other)
        if dim is None:
            return _extreme(kink, input.reshape(-1), 0, False, largest)[0]
        return result_type(_extreme(kink, input, dim, keepdim, largest))

    return apply


gated("max", _ORDER, "entry of the largest real part")(_max_or_min(True))
gated("min", _ORDER, "entry of the smallest real part")(_max_or_min(False))


def _arg_extreme(largest: bool) -> Callable[..., Tensor]:
    def apply(kink: Kink, input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        z, dim = (input.reshape(-1), 0) if dim is None else (input, dim)
        return _extreme(kink, z, dim, keepdim, largest)[1]

    return apply


gated("argmax", _ORDER, "of the real part")(_arg_extreme(True))
gated("argmin", _ORDER, "of the real part")(_arg_extreme(False))


def _a_extreme(largest: bool) -> Callable[..., Tensor]:
    def apply(kink: Kink, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        dims = [dim] if isinstance(dim, int) else list(dim) or list(range(input.dim()))
        dims = sorted((d % input.dim() for d in dims), reverse=True)
        for d in dims:
            input, _ = _extreme(kink, input, d, True, largest)
        if not keepdim:
            for d in dims:
                input = input.squeeze(d)
        return input

    return apply


gated("amax", _ORDER, "entry of the largest real part")(_a_extreme(True))
gated("amin", _ORDER, "entry of the smallest real part")(_a_extreme(False))


def _count_neighbours(kink: Kink, ordered: Tensor, dim: int) -> None:
    kink(ordered.narrow(dim, 1, ordered.shape[dim] - 1) - ordered.narrow(dim, 0, ordered.shape[dim] - 1))


@gated("sort", _ORDER, "by the real part")
def _sort(kink: Kink, input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    index = torch.sort(input.real, dim=dim, descending=descending, stable=stable).indices
    ordered = input.gather(dim, index)
    _count_neighbours(kink, ordered, dim)
    return torch.return_types.sort((ordered, index))


@gated("argsort", _ORDER, "by the real part")
def _argsort(kink: Kink, input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Tensor:
    index: Tensor = _sort(kink, input, dim, descending, stable).indices
    return index


@gated("topk", _ORDER, "by the real part")
def _topk(kink: Kink, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    del sorted
    ordered, index = _sort(kink, input, dim, largest)
    return torch.return_types.topk((ordered.narrow(dim, 0, k), index.narrow(dim, 0, k)))


def _max_pool(n_dims: int, adaptive: bool, with_indices: bool) -> Callable[..., Any]:
    pool = getattr(functional, f"{'adaptive_' if adaptive else ''}max_pool{n_dims}d_with_indices")

    def apply(kink: Kink, input: Tensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        positional = args if adaptive else args[:5]
        _, index = pool(input.real, *positional, **kwargs)
        flat = input.flatten(-n_dims)
        best = flat.gather(-1, index.flatten(-n_dims)).reshape(index.shape)
        # A rival would win if the imaginary part were turned into the real direction, either way.
        rotated = [pool(input.real + sign * input.imag, *positional, **kwargs)[1] for sign in (1, -1)]
        rival = (rotated[0] != index) | (rotated[1] != index)
        kink(torch.where(rival, torch.full_like(best, 1j), 1))
        return (best, index) if with_indices or return_indices else best

    return apply


for _n in (1, 2, 3):
    for _prefix in ("", "adaptive_"):
        for _suffix in ("", "_with_indices"):
            gated(f"nn.functional.{_prefix}max_pool{_n}d{_suffix}", _POOLING, "entry of the largest real part")(
                _max_pool(_n, bool(_prefix), bool(_suffix))
            )
for _n, _name in ((1, "max_pool1d"), (2, "max_pool2d"), (3, "max_pool3d"), (1, "max_pool1d_with_indices")):
    gated(f"_VF.{_name}", _POOLING, "entry of the largest real part")(_max_pool(_n, False, "indices" in _name))
