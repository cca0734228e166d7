"""Operations that are analytic piece by piece."""

import pytest
import torch
from torch import nn
from torch.nn import functional as fn

from torchdeq_ep import holomorphic

PIECEWISE = {
    "relu": torch.relu,
    "fn.relu inplace": lambda z: fn.relu(z.clone(), inplace=True),
    "relu_": lambda z: z.clone().relu_(),
    "relu6": lambda z: fn.relu6(6 * z),
    "leaky_relu": lambda z: fn.leaky_relu(z, 0.2),
    "prelu": lambda z: fn.prelu(z, torch.linspace(0.1, 0.5, z.shape[1], dtype=torch.float64)),
    "elu": lambda z: fn.elu(z, 0.7),
    "celu": lambda z: fn.celu(z, 0.7),
    "selu": fn.selu,
    "hardtanh": lambda z: fn.hardtanh(2 * z),
    "hardsigmoid": lambda z: fn.hardsigmoid(4 * z),
    "hardswish": lambda z: fn.hardswish(4 * z),
    "hardshrink": fn.hardshrink,
    "softshrink": fn.softshrink,
    "softsign": fn.softsign,
    "threshold": lambda z: fn.threshold(z, 0.3, 0.1),
    "abs": lambda z: abs(z) + z.abs() + torch.abs(z),
    "sign": lambda z: torch.sign(z) * z,
    "clamp": lambda z: z.clamp(-0.5, 0.5) + torch.clamp(z, min=0.1) + z.clip(max=0.2),
    "clamp_min": lambda z: z.clamp_min(0.1) + torch.clamp_max(z, torch.tensor(0.2)),
    "clamp tensor": lambda z: z.clamp(min=torch.full_like(z, 0.1)),
    "maximum": lambda z: torch.maximum(z, 2 * z) + torch.fmin(z, z * z) + torch.max(z, torch.zeros_like(z)),
    "max": lambda z: z.max() + z.max(1).values.sum() + torch.max(z, 1, keepdim=True)[0] + torch.min(z),
    "amax": lambda z: z.amax(1) + torch.amin(z, (0, 1, 2)).sum() + z.amax(),
    "argmax": lambda z: z.gather(1, z.argmax(1, keepdim=True)),
    "sort": lambda z: z.sort(1, descending=True)[0] + torch.sort(z, 2).values + z.gather(2, z.argsort(2)),
    "topk": lambda z: z.topk(2, 1).values + z.topk(2, 1, largest=False)[0],
    "comparison": lambda z: torch.where(z > 0.2, z, 0.3 * z) + (z <= 0) * z,
    "max_pool1d": lambda z: fn.max_pool1d(z, 2),
    "max_pool2d": lambda z: fn.max_pool2d(z, 3, 2, 1),
    "max_pool2d indices": lambda z: fn.max_pool2d(z, 2, return_indices=True)[0],
    "adaptive_max_pool2d": lambda z: fn.adaptive_max_pool2d(z, 2),
    "l1_loss": lambda z: fn.l1_loss(z, torch.zeros_like(z)),
    "transformer": lambda z: nn.functional.relu(z) * fn.hardtanh(z),
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_operation_is_gated_by_the_real_part(name):
    f = PIECEWISE[name]
    generator = torch.Generator().manual_seed(2)
    z, u = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64)
    step = 1e-7
    slope = (f(z + step * u) - f(z - step * u)) / (2 * step)
    with holomorphic.mode(piecewise="real-part") as context:
        near = f(z + 1j * step * u)
        at_axis = f(z + 0j)
    torch.testing.assert_close(at_axis.real, f(z))
    torch.testing.assert_close(near.imag / step, slope, atol=1e-6, rtol=1e-6)
    assert context.crossings
    assert all(crossing.crossed == 0 for crossing in context.crossings)
    with holomorphic.mode(piecewise="real-part") as context:
        f(z + 5j * u)
    assert all(0 < crossing.crossed <= crossing.units for crossing in context.crossings)
    report = holomorphic.check(f, z, amplitude=1e-5, piecewise="real-part")
    assert report.analytic


def test_crossings_are_counted_under_vmap():
    z = torch.tensor([[1 + 2j, 3 + 1j], [-1 + 0.5j, 0.1 + 0.2j], [1 + 0j, 1 + 0j]])
    with holomorphic.mode(piecewise="real-part") as context:
        torch.vmap(torch.relu)(z)
    assert context.crossings == (holomorphic.Crossing("relu", 6, 2),)


def test_crossing_criterion_is_exact_at_the_top_of_the_contour():
    radius = 0.3
    units = torch.linspace(-1, 1, 101)
    with holomorphic.mode(piecewise="real-part") as context:
        torch.relu(units + 1j * radius)
    (crossing,) = context.crossings
    assert crossing.crossed == int((units.abs() < radius).sum())
