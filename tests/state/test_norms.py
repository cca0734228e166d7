"""Norms of states of any size and dtype: squares leave the range long before entries do."""

import math

import pytest
import torch

from torchdeq_ep.state import Rows, are_independent
from torchdeq_ep.state.norms import (
    MIN_NORM,
    _scaled_row_norms,
    cosine,
    fetch,
    in_the_middle,
    largest_row_norm,
    norm,
    norm_and,
    relative_difference,
    row_norms,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def entries(dtype, size):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (size * torch.randn(4, 50, dtype=wide)).to(dtype)


def exact(tensor, size):
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return size * torch.linalg.vector_norm(tensor.to(wide) / size, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ["largest", "ordinary", "smallest"])
def test_norms_at_both_ends_of_the_range(dtype, end):
    limits = torch.finfo(dtype)
    small = math.sqrt(limits.tiny) if limits.bits > 16 or dtype == torch.bfloat16 else 16 * limits.tiny
    size = {"largest": limits.max / 64, "ordinary": 1.0, "smallest": small}[end]
    tensor = entries(dtype, size)
    rows = exact(tensor, size)
    assert norm(tensor) == pytest.approx(float(exact(tensor.reshape(1, -1), size)), rel=1e-5)
    assert largest_row_norm(tensor.reshape(4, 5, 10)) == pytest.approx(float(rows.max()), rel=1e-5)
    if not dtype.is_complex:
        assert row_norms(tensor).tolist() == pytest.approx(rows.tolist(), rel=1e-5)
        assert cosine(tensor, tensor) == pytest.approx(1.0, rel=1e-5)
        assert cosine(tensor, -tensor) == pytest.approx(-1.0, rel=1e-5)
        if norm(tensor) > MIN_NORM:
            assert relative_difference(-tensor, tensor) == pytest.approx(2.0, rel=1e-5)


def test_rows_of_any_sizes_beside_each_other():
    matrix = torch.randn(6, 30)
    sizes = torch.tensor([1e30, 1.0, 1e-30, 0.0, torch.inf, torch.nan], dtype=torch.float64)
    found = row_norms((matrix * sizes[:, None]).float().masked_fill(sizes[:, None] == 0, 0.0))
    assert found[:3].double().div(sizes[:3]).tolist() == pytest.approx(matrix[:3].norm(dim=1).tolist(), rel=1e-5)
    assert found[3] == 0
    assert math.isinf(found[4])
    assert math.isnan(found[5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_has_no_ordinary_norm(dtype):
    assert norm(torch.zeros(3, dtype=dtype)) == norm(torch.zeros(0, 3, dtype=dtype)) == 0.0
    assert row_norms(torch.zeros(0, 3, dtype=dtype)).shape == (0,)
    assert math.isinf(norm(torch.tensor([1.0, -torch.inf], dtype=dtype)))
    assert math.isnan(norm(torch.tensor([torch.inf, torch.nan], dtype=dtype)))
    assert math.isnan(cosine(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_norm_comes_with_other_numbers_in_one_transfer(size):
    tensor, others = size * torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    length, found = norm_and(tensor, others, torch.tensor(7.0))
    assert length == pytest.approx(5 * size, rel=1e-6)
    assert found.tolist() == [1, 2, 3, 4, 7]
    assert fetch(torch.ones(2, dtype=torch.float16), torch.tensor(0.1)).dtype == "float64"


def test_scaled_norms_of_rows_are_the_ordinary_ones():
    """On an accelerator every row is scaled: to look whether one has to be takes longer."""
    matrix = torch.randn(6, 9) * torch.tensor([1e-25, 1e-3, 1.0, 1e3, 1e25, 0.0]).unsqueeze(1)
    assert _scaled_row_norms(matrix).tolist() == pytest.approx(row_norms(matrix).tolist(), rel=1e-6)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1.0, 1e20, 3e38])
def test_scaling_by_a_power_of_two_rounds_nothing(size):
    tensor = size * torch.tensor([1.0, -0.75, 0.0])
    scaled, factor = in_the_middle(tensor)
    assert torch.equal(scaled * factor, tensor)
    assert math.frexp(factor)[0] == 0.5
    assert float(scaled.abs().max()) <= 4


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_samples_are_told_apart_whatever_their_size(size):
    z = size * torch.randn(4, 3)
    assert are_independent(lambda z: 0.5 * z, z, 0.5 * z, Rows(4, (3,)))

    def centred(z):
        return z - z.mean(0)

    assert not are_independent(centred, z, centred(z), Rows(4, (3,)))
