"""How a map rounds is measured from its values: never found where it is not, and mostly found where it is."""

import pytest
import torch
from torch import Tensor

from torchdeq_ep.state.rounding import measured_rounding

DRAWS = 20


def _maps(width, seed, activation):
    """A layer in single precision, and the same whose product is taken in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(width, width, generator=generator) * 0.8 / width**0.5
    bias = torch.randn(width, generator=generator)

    def fine(z: Tensor) -> Tensor:
        return activation(weights @ z + bias)

    def coarse(z: Tensor) -> Tensor:
        return activation((weights.bfloat16() @ z.bfloat16()).float() + bias)

    return fine, coarse


def _at_fixed_point(f, width):
    z = torch.zeros(width)
    for _ in range(100):
        z = f(z)
    return measured_rounding(f, z, f(z))[0]


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, torch.nn.functional.silu])
@pytest.mark.parametrize(("width", "missed"), [(8, 6), (32, 2), (130, 2), (300, 0)])
def test_coarse_rounding_is_found_and_no_other(width, missed, activation):
    found = [[_at_fixed_point(f, width) for f in _maps(width, seed, activation)] for seed in range(DRAWS)]
    assert max(fine for fine, _ in found) < 3e-6
    assert sum(coarse < 2e-4 for _, coarse in found) <= missed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_map_that_rounds_as_its_dtype_does_is_found_to_do_so(dtype):
    z = torch.randn(400, generator=torch.Generator().manual_seed(0)).to(dtype)
    eps = torch.finfo(dtype).eps
    found, calls = measured_rounding(torch.tanh, z, torch.tanh(z))
    assert eps / 4 <= found < 4 * eps
    assert calls <= 6
