"""Activations and layers that can be continued analytically."""

import mpmath
import pytest
import torch
from torch.nn import functional as fn

from torchdeq_ep import holomorphic
from torchdeq_ep import nn as epnn
from torchdeq_ep.nn.activations import slope


def test_shifted_sigmoid_is_the_papers():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(epnn.shifted_sigmoid(x), 1 / (1 + torch.exp(-4 * x + 2)))
    assert epnn.ShiftedSigmoid()(torch.tensor(0.5)) == 0.5


class OldTanh(torch.autograd.Function):
    """Neither a formula for forward mode nor one for the transforms of `torch.func`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent / torch.cosh(x) ** 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("phi", [torch.tanh, OldTanh.apply, lambda x: torch.sinh(x) / torch.cosh(x)])
def test_slope_of_any_activation_has_no_graph(phi, grad):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        found = slope(phi, x)
    torch.testing.assert_close(found, 1 / torch.cosh(x.detach()) ** 2)
    assert not found.requires_grad
    assert x.requires_grad


def test_dsilu_is_the_derivative_of_silu():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    _, slope = torch.func.jvp(fn.silu, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(epnn.dsilu(x), slope)
    torch.testing.assert_close(epnn.DSiLU()(x), slope)


def test_shifted_dsilu_is_the_papers_finite_difference():
    x = torch.linspace(-30, 30, 200, dtype=torch.float64)
    code = 0.5 * x / (1 + torch.exp(-x)) + (1 - 0.5 * x) / (1 + torch.exp(2 - x))
    torch.testing.assert_close(epnn.shifted_dsilu(x), code, rtol=0, atol=1e-14)
    torch.testing.assert_close(epnn.ShiftedDSiLU()(x), (fn.silu(x) - fn.silu(x - 2)) / 2, rtol=0, atol=1e-14)
    single = torch.tensor([50.0, 1e4, 3e38, -50.0, -1e4, -3e38])
    torch.testing.assert_close(epnn.shifted_dsilu(single), torch.tensor([1.0] * 3 + [0.0] * 3))
    mirrored = 1 - epnn.shifted_dsilu(2 - x)  # centred at 1, where dSiLU is centred at 0
    torch.testing.assert_close(epnn.shifted_dsilu(x), mirrored, rtol=0, atol=1e-14)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_activations_at_complex_arguments(dtype, inside):
    z = torch.complex(torch.linspace(-5, 5, 21), torch.linspace(-0.6, 0.6, 21)).to(dtype)
    references = {
        epnn.shifted_sigmoid: lambda v: 1 / (1 + mpmath.exp(2 - 4 * v)),
        epnn.shifted_dsilu: lambda v: (v / (1 + mpmath.exp(-v)) - (v - 2) / (1 + mpmath.exp(2 - v))) / 2,
        epnn.dsilu: lambda v: (1 + mpmath.exp(-v) * (1 + v)) / (1 + mpmath.exp(-v)) ** 2,
    }
    for f, reference in references.items():
        with holomorphic.mode() if inside else torch.no_grad():
            value = f(z)
        assert value.dtype == dtype
        expected = torch.tensor(
            [complex(reference(mpmath.mpc(complex(v)))) for v in z.tolist()], dtype=torch.complex128
        )
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value.to(torch.complex128), expected, rtol=40 * eps, atol=4 * eps)


@pytest.mark.parametrize("phi", [epnn.shifted_sigmoid, epnn.dsilu, epnn.shifted_dsilu])
def test_slope_is_the_derivative(phi):
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    z = torch.complex(x, torch.linspace(-0.5, 0.5, 50, dtype=torch.float64))
    for point in (x, z):
        _, expected = torch.func.jvp(phi, (point,), (torch.ones_like(point),))
        torch.testing.assert_close(slope(phi, point), expected)
        with holomorphic.mode():
            inside = slope(phi, point)
        torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("layer", [epnn.SoftmaxPool2d(2), epnn.SoftmaxPool2d(3, 2, 1, 0.5), epnn.DSiLU()])
def test_layers_are_analytic_and_differentiable(layer):
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert holomorphic.check(layer, x.detach())
    z = x.detach() + 0.1j
    with torch.no_grad():
        plain, stacked = layer(z), torch.vmap(layer)(torch.stack([z, z.conj()]))
        with holomorphic.mode():
            inside = layer(z)
    torch.testing.assert_close(inside, plain)
    torch.testing.assert_close(stacked[0], plain)
    torch.testing.assert_close(stacked[1], plain.conj().resolve_conj())
