"""Softmax pooling against a loop over its windows."""

import pytest
import torch
from torch.nn import functional as fn

from torchdeq_ep import holomorphic
from torchdeq_ep import nn as epnn
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.nn.pooling import transposed_softmax_pool


def looped_pool(x, kernel, stride, padding, temperature):
    """Softmax pooling of one image, window by window."""
    height, width = x.shape
    rows = range(-padding, height + padding - kernel + 1, stride)
    columns = range(-padding, width + padding - kernel + 1, stride)
    out = torch.zeros(len(rows), len(columns), dtype=x.dtype)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = x[max(row, 0) : row + kernel, max(column, 0) : column + kernel].flatten()
            out[i, j] = (torch.softmax(window / temperature, 0) * window).sum()
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, None, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0), (4, 2, 2)])
def test_softmax_pool_against_a_loop(kernel, stride, padding, temperature):
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = epnn.SoftmaxPool2d(kernel, stride, padding, temperature)(x)
    assert value.shape == fn.max_pool2d(x, kernel, stride, padding).shape
    expected = [looped_pool(image, kernel, stride or kernel, padding, temperature) for image in x.flatten(0, 1)]
    torch.testing.assert_close(value.flatten(0, 1), torch.stack(expected))


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_softmax_pool_limits_and_shapes(n_dims):
    x = torch.randn(2, 3, *(6,) * n_dims, dtype=torch.float64)
    layer = getattr(epnn, f"SoftmaxPool{n_dims}d")
    max_pool, avg_pool = (getattr(fn, f"{kind}_pool{n_dims}d") for kind in ("max", "avg"))
    torch.testing.assert_close(layer(2, temperature=1e-3)(x), max_pool(x, 2), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer(2, temperature=1e6)(x), avg_pool(x, 2), rtol=1e-4, atol=1e-4)
    assert layer(3, 2, 1)(x).shape == max_pool(x, 3, 2, 1).shape
    assert "kernel_size=3" in repr(layer(3))


def test_softmax_pool_does_not_overflow():
    x = torch.tensor([[1000.0, -1000.0, 999.0, 3.0]])
    value = epnn.softmax_pool(x, 2, padding=1, n_dims=1)
    torch.testing.assert_close(value, torch.tensor([[1000.0, 999.0, 3.0]]))
    z = x + 1j
    torch.testing.assert_close(epnn.softmax_pool(z, 2, padding=1, n_dims=1), value + 1j)


def test_softmax_pool_of_rectangular_windows():
    x = torch.randn(1, 1, 4, 6)
    assert epnn.softmax_pool(x, (2, 3), (1, 3), (0, 1)).shape == fn.max_pool2d(x, (2, 3), (1, 3), (0, 1)).shape


@pytest.mark.parametrize(("shape", "kernel"), [((2, 3, 4, 6), (2, 2)), ((2, 4, 6, 3), (2, 3, 1)), ((6,), (3,))])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_transposed_softmax_pool_is_the_vjp(shape, kernel, temperature):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def pool(x):
        return epnn.softmax_pool(x, kernel, temperature=temperature, n_dims=len(kernel))

    def transposed(x, cotangent):
        return transposed_softmax_pool(x, cotangent, kernel, temperature, n_dims=len(kernel))

    cotangent = torch.randn_like(pool(x), requires_grad=True)
    torch.testing.assert_close(transposed(x, cotangent), torch.func.vjp(pool, x)[1](cotangent)[0])
    assert torch.autograd.gradcheck(transposed, (x, cotangent))
    both = torch.stack([x.detach(), -x.detach()]), torch.stack([cotangent.detach(), cotangent.detach() ** 2])
    expected = torch.stack([transposed(*pair) for pair in zip(*both, strict=True)])
    torch.testing.assert_close(torch.vmap(transposed)(*both), expected)


def test_transposed_softmax_pool_is_analytic():
    x, cotangent = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    assert holomorphic.check(lambda z: transposed_softmax_pool(z, cotangent * z.mean(), 2, 0.7), x)


def test_softmax_pool_of_permuted_memory():
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    last = x.permute(0, 2, 3, 1).contiguous()
    expected = epnn.softmax_pool(x, 2)
    torch.testing.assert_close(epnn.softmax_pool(last.permute(0, 3, 1, 2), 2), expected)
    torch.testing.assert_close(epnn.softmax_pool(last, (2, 2, 1), n_dims=3).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"padding": 2},
        {"kernel_size": 0},
        {"stride": 0},
        {"kernel_size": (2, 2, 2)},
        {"padding": -1},
    ],
)
def test_softmax_pool_options(options):
    with pytest.raises(InvalidOptionError):
        epnn.softmax_pool(torch.randn(1, 4, 4), **{"kernel_size": 2, **options})
