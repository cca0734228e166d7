"""Rules of normalisation layers and softmax: means of squares take the place of squared absolute values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.holomorphic.elementwise import exp
from torchdeq_ep.holomorphic.registry import expanded, rule

_GROUP = "normalisation"
_NOTE = r"$(z - \bar z) / \sqrt{\overline{(z - \bar z)^2} + \epsilon}$, without absolute values"
_STATISTICS_NOTE = _NOTE + "; running statistics are read, never written"
_SOFTMAX = "softmax"

Dims = int | Sequence[int] | None
_OverDim = Callable[[Tensor, int], Tensor]


def _standardise(z: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = z - z.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = z if weight is None else z * weight
    return z if bias is None else z + bias


def _per_channel(tensor: Tensor | None, z: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, *(1,) * (z.dim() - 2))


@rule("layer_norm", _GROUP, _NOTE)
def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    return _affine(_standardise(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


@rule("rms_norm", _GROUP, r"$z / \sqrt{\overline{z^2} + \epsilon}$")
def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    square = (input * input).mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    return _affine(input * torch.rsqrt(square + eps), weight, None)


@rule("group_norm", _GROUP, _NOTE)
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    del cudnn_enabled
    grouped = input.reshape(input.shape[0], num_groups, -1)
    normal = _standardise(grouped, (-1,), eps).reshape(input.shape)
    return _affine(normal, _per_channel(weight, input), _per_channel(bias, input))


def _statistics_norm(
    z: Tensor,
    dims: tuple[int, ...],
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input: bool,
    eps: float,
) -> Tensor:
    mean, var, weight, bias = (_per_channel(tensor, z) for tensor in (mean, var, weight, bias))
    if use_input or mean is None or var is None:
        return _affine(_standardise(z, dims, eps), weight, bias)
    return _affine((z - mean) * torch.rsqrt(var + eps), weight, bias)


@rule("nn.functional.batch_norm", _GROUP, _STATISTICS_NOTE)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    del momentum
    dims = (0, *range(2, input.dim()))
    return _statistics_norm(input, dims, running_mean, running_var, weight, bias, training, eps)


@rule("nn.functional.instance_norm", _GROUP, _STATISTICS_NOTE)
def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    del momentum
    dims = tuple(range(2, input.dim()))
    return _statistics_norm(input, dims, running_mean, running_var, weight, bias, use_input_stats, eps)


def _reordered(apply: Any) -> Any:
    """The rule for the function of the same name in `torch`, whose arguments come in another order."""

    def adapted(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        del cudnn_enabled
        value: Tensor = apply(input, running_mean, running_var, weight, bias, use_input, momentum, eps)
        return value

    return adapted


for _name, _apply in (("_VF.batch_norm", _batch_norm), ("_VF.instance_norm", _instance_norm)):
    rule(_name, _GROUP, _STATISTICS_NOTE)(_reordered(_apply))
expanded("local_response_norm", _GROUP, r"$z\,(k + \alpha\,\overline{z^2})^{-\beta}$")


def _var_options(
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    correction: float | None = None,
) -> tuple[Dims, float, bool]:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return dim, correction, keepdim


def _moments(z: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    dim, correction, keepdim = _var_options(*args, **kwargs)
    dims = tuple(range(z.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    mean = z.mean(dims, keepdim=True)
    count = math.prod(z.shape[d] for d in dims)
    centred = z - mean
    var = (centred * centred).sum(dims, keepdim=keepdim) / (count - correction)
    return var, mean if keepdim else mean.reshape(var.shape)


@rule("var", _GROUP, r"$\sum (z - \bar z)^2 / (n - 1)$")
def _var(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _moments(input, *args, **kwargs)[0]


@rule("std", _GROUP, "principal root of `var`")
def _std(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.sqrt(_moments(input, *args, **kwargs)[0])


@rule("var_mean", _GROUP, "`var` and `mean`")
def _var_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _moments(input, *args, **kwargs)


@rule("std_mean", _GROUP, "`std` and `mean`")
def _std_mean(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    var, mean = _moments(input, *args, **kwargs)
    return torch.sqrt(var), mean


def _over_dim(name: str, note: str) -> Callable[[_OverDim], _OverDim]:
    """Decorator: the function of a tensor and a dimension is the rule of a name with the signature of `softmax`."""

    def register(apply: _OverDim) -> _OverDim:
        @rule(name, _SOFTMAX, note)
        def adapted(
            input: Tensor,
            dim: int | None = None,
            _stacklevel: int = 3,
            dtype: torch.dtype | None = None,
        ) -> Tensor:
            # dtype= names a real dtype in a real model.
            z = input if dtype is None else input.to(torch.promote_types(dtype, torch.float32).to_complex())
            implicit = 0 if z.dim() in (0, 1, 3) else 1
            return apply(z, implicit if dim is None else dim)

        return apply

    return register


@_over_dim("softmax", r"$e^{z_i} / \sum_j e^{z_j}$, shifted by the largest real part")
def softmax(z: Tensor, dim: int) -> Tensor:
    """Softmax. The shift is a real number, which the quotient does not depend on."""
    weights = exp(z - z.real.detach().amax(dim, keepdim=True))
    return weights / weights.sum(dim, keepdim=True)


@_over_dim("softmin", "softmax of $-z$")
def _softmin(z: Tensor, dim: int) -> Tensor:
    return softmax(-z, dim)


@_over_dim("log_softmax", r"$z_i - \log \sum_j e^{z_j}$")
def log_softmax(z: Tensor, dim: int) -> Tensor:
    """Logarithm of the softmax."""
    return z - logsumexp(z, dim, keepdim=True)


@rule("logsumexp", _SOFTMAX, r"$\log \sum_j e^{z_j}$, shifted by the largest real part")
def logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """Logarithm of a sum of exponentials, on the branch of the real axis."""
    shift = input.real.detach().amax(dim, keepdim=True)
    total = torch.log(exp(input - shift).sum(dim, keepdim=keepdim))
    return total + (shift if keepdim else shift.amax(dim))
