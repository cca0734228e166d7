"""Softmax pooling: an analytic stand-in for max pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.holomorphic.normalization import softmax as complex_softmax
from torchdeq_ep.holomorphic.registry import continued

Size = int | Sequence[int]


@continued("torchdeq_ep.nn", r"$\sum_i z_i e^{z_i / T} / \sum_i e^{z_i / T}$ over each window")
def softmax_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    temperature: float = 1.0,
    n_dims: int = 2,
) -> Tensor:
    """Mean of each window, weighted by the softmax of its entries: `sum_i x_i exp(x_i / T) / sum_i exp(x_i / T)`.

    The pooling of Laborieux & Zenke, arXiv 2209.00530. It tends to max pooling as the temperature `T` falls to 0, and
    to average pooling as it grows. The padding has no weight.

    Args:
        x: Real or complex tensor of shape `(..., *spatial)`, with `n_dims` spatial dimensions.
        kernel_size: Size of the window, one number or one for each spatial dimension.
        stride: Step between windows; `None` for the size of the window.
        padding: Entries added on both sides, at most half of the window.
        temperature: `T`, positive.
        n_dims: Number of spatial dimensions.

    Returns:
        A tensor of shape `(..., *pooled)`, of the shape that max pooling of these options gives.

    Raises:
        InvalidOptionError: If an option is out of range.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> softmax_pool(x, 2), softmax_pool(x, 2, temperature=0.01)
        (tensor([[2.4927]]), tensor([[3.]]))
    """
    if has_torch_function_unary(x):
        return handle_torch_function(softmax_pool, (x,), x, kernel_size, stride, padding, temperature, n_dims)
    kernel = _per_dim("kernel_size", kernel_size, n_dims, 1)
    steps = _per_dim("stride", kernel_size if stride is None else stride, n_dims, 1)
    pads = _per_dim("padding", padding, n_dims, 0)
    if not temperature > 0:
        raise InvalidOptionError(f"temperature must be positive, not {temperature!r}.")
    if any(2 * pad > size for pad, size in zip(pads, kernel, strict=True)):
        raise InvalidOptionError(f"padding {pads} must be at most half of kernel_size {kernel}.")
    windows = _windows(x, kernel, steps, pads)
    exponents = windows / temperature
    if any(pads):
        inside = _windows(torch.ones(x.shape[-n_dims:], dtype=torch.bool, device=x.device), kernel, steps, pads)
        outside = ~inside.reshape(len(inside), *(1,) * (x.dim() - n_dims), *inside.shape[1:])
        exponents = exponents.masked_fill(outside, -torch.inf)
    weights = complex_softmax(exponents, 0) if x.is_complex() else torch.softmax(exponents, 0)
    return (weights * windows).sum(0)


def transposed_softmax_pool(
    x: Tensor, cotangent: Tensor, kernel_size: Size, temperature: float = 1.0, n_dims: int = 2
) -> Tensor:
    """The transposed derivative of [`softmax_pool`][torchdeq_ep.nn.softmax_pool] at `x`, of a cotangent.

    In closed form this costs less than a VJP, and so do its own derivatives.

    Args:
        x: Tensor of shape `(..., *spatial)`, complex inside the holomorphic mode only.
        cotangent: Tensor of the shape of `softmax_pool(x, kernel_size)`.
        kernel_size: Size of the windows, which lie side by side and cover `x`.
        temperature: `T`, positive.
        n_dims: Number of spatial dimensions.

    Returns:
        A tensor of the shape of `x`.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> transposed_softmax_pool(x, torch.ones(1, 1), 2)
        tensor([[-0.0479, -0.0429],
                [ 0.1202,  0.9706]])
    """
    kernel = _per_dim("kernel_size", kernel_size, n_dims, 1)
    windows = _windows(x, kernel, kernel, (0,) * n_dims) / temperature
    weights = torch.softmax(windows, 0)
    slopes = weights * (windows - ((weights * windows).sum(0) - 1))
    # Each dimension of the windows goes behind the spatial one that it is part of.
    first = x.dim() - n_dims
    lead = [n_dims + dim for dim in range(first)]
    pairs = [axis for dim in range(n_dims) for axis in (n_dims + first + dim, dim)]
    return torch.unflatten(slopes * cotangent, 0, kernel).permute(*lead, *pairs).reshape(x.shape)


def _windows(x: Tensor, kernel: Sequence[int], steps: Sequence[int], pads: Sequence[int]) -> Tensor:
    """All windows of `x`: their entries along a new first dimension, since long inner loops are fast."""
    if any(pads):
        x = functional.pad(x, [pad for pad in reversed(pads) for _ in range(2)])
    first = x.dim() - len(kernel)
    for dim, (size, step) in enumerate(zip(kernel, steps, strict=True), start=first):
        tiled = step == size and x.shape[dim] % size == 0
        # Both are views; the derivative of the first one is a view too.
        x = torch.unflatten(x, dim, (-1, size)).movedim(dim + 1, -1) if tiled else x.unfold(dim, size, step)
    n_dims = len(kernel)
    return x.movedim(tuple(range(-n_dims, 0)), tuple(range(n_dims))).flatten(0, n_dims - 1)


def _per_dim(name: str, value: Size, n_dims: int, least: int) -> tuple[int, ...]:
    values = (value,) * n_dims if isinstance(value, int) else tuple(value)
    if len(values) != n_dims or any(v < least for v in values):
        raise InvalidOptionError(f"{name} must be one or {n_dims} whole numbers of at least {least}, not {value!r}.")
    return values


class _SoftmaxPool(nn.Module):
    _n_dims: int

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return softmax_pool(x, self.kernel_size, self.stride, self.padding, self.temperature, self._n_dims)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"temperature={self.temperature}"
        )


class SoftmaxPool1d(_SoftmaxPool):
    """[`softmax_pool`][torchdeq_ep.nn.softmax_pool] over the last dimension.

    Args:
        kernel_size: Size of the window, one number or one for each spatial dimension.
        stride: Step between windows; `None` for the size of the window.
        padding: Entries added on both sides, at most half of the window.
        temperature: Positive; max pooling as it falls to 0, average pooling as it grows.

    Example:
        >>> SoftmaxPool1d(2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 4])
    """

    _n_dims = 1


class SoftmaxPool2d(_SoftmaxPool):
    """[`softmax_pool`][torchdeq_ep.nn.softmax_pool] over the last two dimensions.

    Args:
        kernel_size: Size of the window, one number or one for each spatial dimension.
        stride: Step between windows; `None` for the size of the window.
        padding: Entries added on both sides, at most half of the window.
        temperature: Positive; max pooling as it falls to 0, average pooling as it grows.

    Example:
        >>> SoftmaxPool2d(3, stride=2, padding=1, temperature=0.5)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    _n_dims = 2


class SoftmaxPool3d(_SoftmaxPool):
    """[`softmax_pool`][torchdeq_ep.nn.softmax_pool] over the last three dimensions.

    Args:
        kernel_size: Size of the window, one number or one for each spatial dimension.
        stride: Step between windows; `None` for the size of the window.
        padding: Entries added on both sides, at most half of the window.
        temperature: Positive; max pooling as it falls to 0, average pooling as it grows.

    Example:
        >>> SoftmaxPool3d(2)(torch.zeros(1, 3, 4, 4, 4)).shape
        torch.Size([1, 3, 2, 2, 2])
    """

    _n_dims = 3
