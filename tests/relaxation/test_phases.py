"""Extrapolation and mixing choose the smallest residual that they can reach."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import contraction

from torchdeq_ep.relaxation.loop import iterate
from torchdeq_ep.relaxation.phases import least_residual


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_the_mixed_residual_is_the_smallest_of_all_combinations_row_by_row(n, seed):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, n, 9, dtype=torch.float64, generator=generator)
    residual = torch.randn(3, 9, dtype=torch.float64, generator=generator)
    gram, pull = directions @ directions.mT, (directions @ residual.unsqueeze(2)).squeeze(2)
    weights = torch.tensor(least_residual(gram.numpy(), pull.numpy(), 0.0))
    mixed = residual - torch.einsum("rm,rmn->rn", weights, directions)
    assert float(torch.einsum("rn,rmn->rm", mixed, directions).abs().max()) < 1e-9


def test_a_row_that_is_done_has_no_weights():
    gram, pull = np.zeros((2, 3, 3)), np.zeros((2, 3))
    gram[1], pull[1] = np.eye(3), 1.0
    weights = least_residual(gram, pull, 1e-12)
    assert (weights[0] == 0).all()
    assert weights[1] == pytest.approx([1, 1, 1])


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 0.999).filter(lambda w: abs(w) > 1e-3), st.integers(0, 1000))
def test_one_eigenvalue_is_extrapolated_to_the_fixed_point(eigenvalue, seed):
    offset = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    calls = 0

    def step(z):
        nonlocal calls
        calls += 1
        return eigenvalue * z + offset

    result = iterate(step, torch.zeros_like(offset), scale=float(offset.norm()), tol=1e-9, max_iter=9)
    assert calls == 3
    torch.testing.assert_close(result.value, offset / (1 - eigenvalue), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("size", "dtype"), [(1e160, torch.float64), (1e20, torch.float32)])
def test_residuals_whose_squares_are_no_numbers_end_no_solve(size, dtype):
    offset = torch.full((1, 4), size, dtype=dtype)
    slopes = torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=dtype)
    result = iterate(lambda z: slopes * z + offset, torch.zeros_like(offset), tol=1e-3, max_iter=50, scale=size)
    torch.testing.assert_close(result.value * (1 - slopes), offset, rtol=1e-2, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000))
def test_the_extrapolated_residual_is_the_smallest_along_its_line(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = contraction(9, seed, 0.8)
    offset = torch.randn(1, 9, dtype=torch.float64, generator=generator)
    points = []

    def step(z):
        points.append(z)
        return z @ matrix.T + offset

    iterate(step, torch.zeros_like(offset), tol=1e-12, max_iter=3)
    first, second, third = (z @ matrix.T + offset - z for z in points)
    # What the step after the two did to the residual of their combination: one multiplication by the matrix.
    along = second - first
    combined = torch.linalg.solve(matrix, third[0])
    assert abs(float(combined @ along[0])) < 1e-6 * float(combined.norm() * along.norm())
