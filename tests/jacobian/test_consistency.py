"""Autograd's derivative against that of the values: hidden parts are found, and rounding is not taken for one."""

import pytest
import torch

from torchdeq_ep.jacobian.consistency import derivative_mismatch
from torchdeq_ep.state.rounding import measured_rounding


def _phases(scale, seed, act=torch.sin):
    """`act(W z + u)` with an input so large that `W z + u` is rounded to a grid, as a Fourier feature of it is."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.5 * torch.randn(32, 32, generator=generator) / 32**0.5
    u = scale * (2 * torch.rand(64, 32, generator=generator) - 1)

    def f(z):
        return act(z @ weight.T + u)

    z = torch.zeros(64, 32)
    for _ in range(200):
        z = f(z)
    direction = torch.randn(64, 32, generator=generator)
    return f, z, direction, measured_rounding(f, z, f(z))[0]


@pytest.mark.parametrize("scale", [3e2, 3e3, 1e4, 2.5e4, 1e5])
@pytest.mark.parametrize("seed", range(3))
def test_a_grid_of_rounding_hides_nothing(scale, seed):
    assert derivative_mismatch(*_phases(scale, seed)).size < 0.02


@pytest.mark.parametrize("scale", [3e2, 3e3, 1e4, 2.5e4])
def test_what_is_hidden_is_found_on_such_a_grid(scale):
    f, z, direction, rounding = _phases(scale, 0)

    def hiding(z):
        return f(z) + 0.3 * (z.detach() - z)

    seen = derivative_mismatch(hiding, z, direction, rounding).size
    assert seen == pytest.approx(_hidden_share(hiding, z, direction), rel=0.1)


def _hidden_share(f, z, direction):
    """By its definition, in which the hidden part is `0.3 u`."""
    derivative = torch.autograd.functional.jvp(f, z, direction)[1]
    whole = derivative + 0.3 * direction
    return float(0.3 * direction.norm() / max(whole.norm(), derivative.norm()))
