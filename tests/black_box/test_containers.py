"""States in any form."""

import numpy as np
import pytest
import torch

import torchdeq_ep as tep


class ArrayLike:
    """Numbers of another library, which NumPy can read."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


@pytest.mark.parametrize("form", [list, ArrayLike, lambda values: [np.asarray(value) for value in values]])
def test_a_state_in_any_form_that_numpy_reads(form):
    stiffness = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)

    def solve(current):
        return form((1 + current.expand(2)).numpy() / stiffness.detach().numpy())

    z = tep.attach_equilibrium(solve, lambda z, k, x: 1 - k * z, stiffness)
    z.sum().backward()
    assert torch.allclose(stiffness.grad, -1 / stiffness.detach() ** 2)
