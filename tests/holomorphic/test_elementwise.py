"""Rules of elementwise functions, at many digits and far out."""

import math

import mpmath
import pytest
import torch
from torch.nn import functional as fn

from torchdeq_ep import holomorphic
from torchdeq_ep.nn import dsilu, shifted_sigmoid

SCALAR = {
    "sigmoid": (torch.sigmoid, lambda z: 1 / (1 + mpmath.exp(-z))),
    "logsigmoid": (fn.logsigmoid, lambda z: -mpmath.log(1 + mpmath.exp(-z))),
    "softplus": (fn.softplus, lambda z: mpmath.log(1 + mpmath.exp(z))),
    "tanh": (torch.tanh, mpmath.tanh),
    "silu": (fn.silu, lambda z: z / (1 + mpmath.exp(-z))),
    "mish": (fn.mish, lambda z: z * mpmath.tanh(mpmath.log(1 + mpmath.exp(z)))),
    "gelu": (fn.gelu, lambda z: z / 2 * mpmath.erfc(-z / mpmath.sqrt(2))),
    "gelu tanh": (
        lambda z: fn.gelu(z, approximate="tanh"),
        lambda z: z / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3))),
    ),
    "dsilu": (dsilu, lambda z: mpmath.diff(lambda w: w / (1 + mpmath.exp(-w)), z)),
    "shifted_sigmoid": (shifted_sigmoid, lambda z: 1 / (1 + mpmath.exp(-4 * z + 2))),
    "exp": (torch.exp, mpmath.exp),
    "log1p": (torch.log1p, lambda z: mpmath.log(1 + z)),
    "pow 7": (lambda z: z**7, lambda z: z**7),
    "erf": (torch.erf, mpmath.erf),
    "erfc": (torch.erfc, mpmath.erfc),
}


def exact(reference, z):
    with mpmath.workdps(40):
        return [reference(mpmath.mpc(complex(value))) for value in z.tolist()]


def relative_error(value, reference):
    with mpmath.workdps(40):
        return max(float(abs(mpmath.mpc(v) - r) / abs(r)) for v, r in zip(value.tolist(), reference, strict=True))


@pytest.mark.parametrize(("dtype", "tol"), [(torch.complex128, 1e-13), (torch.complex64, 3e-6)])
@pytest.mark.parametrize("name", SCALAR)
def test_scalar_rule_against_mpmath(name, dtype, tol):
    f, reference = SCALAR[name]
    generator = torch.Generator().manual_seed(3)
    z = torch.complex(8 * torch.rand(60, generator=generator) - 4, 1.2 * torch.rand(60, generator=generator) - 0.6)
    z = z.to(dtype)
    with holomorphic.mode():
        value = f(z)
    assert relative_error(value, exact(reference, z)) < tol


@pytest.mark.parametrize(("f", "reference"), [(torch.erf, mpmath.erf), (torch.erfc, mpmath.erfc)])
def test_error_function_in_the_disc(f, reference):
    generator = torch.Generator().manual_seed(4)
    radius, angle = 10 * torch.rand(2, 400, generator=generator, dtype=torch.float64)
    z = torch.polar(radius, angle)
    with holomorphic.mode():
        value = f(z)
    assert relative_error(value, exact(reference, z)) < 1e-13


@pytest.mark.parametrize("f", [torch.sigmoid, fn.silu, fn.softplus, fn.logsigmoid, torch.tanh, fn.gelu, fn.mish, dsilu])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_no_overflow_far_out(f, dtype):
    z = torch.tensor([1000.0 + 1j, -1000 + 1j, 90 + 1j, -90 - 1j], dtype=dtype)
    real_value = f(z.real)
    axis = z.real.to(dtype)
    with holomorphic.mode():
        value, at_axis = f(z), f(axis)
    assert torch.isfinite(torch.view_as_real(value)).all()
    torch.testing.assert_close(at_axis.real, real_value, rtol=1e-5, atol=1e-30)
    assert at_axis.imag.abs().max() < 1e-30


@pytest.mark.parametrize(
    "f", [torch.sigmoid, fn.softplus, fn.logsigmoid, torch.tanh, torch.exp, fn.gelu, fn.silu, torch.log1p]
)
def test_gradient_through_a_rule_at_the_edge_of_its_pieces(f):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x * 0.9).sum(), x)
    z = x.detach().to(torch.complex128).requires_grad_()
    with holomorphic.mode():
        (value,) = torch.autograd.grad(f(z * 0.9).sum(), z)
    torch.testing.assert_close(value.real, slope)
    assert value.imag.abs().max() < 1e-14


def test_softmax_with_masked_entries():
    z = torch.tensor([[1 + 1j, 2 - 1j, 0.5 + 0j]])
    mask = torch.tensor([[0.0, -math.inf, 0.0]])
    with holomorphic.mode():
        value = torch.softmax(z + mask, 1)
        kept = torch.softmax(z[:, [0, 2]], 1)
    torch.testing.assert_close(value[:, [0, 2]], kept)
    assert value[0, 1] == 0
