"""The two modes that solve a linear equation."""

import pytest
import torch
from problems import relative_error, tanh_problem

import torchdeq_ep as tep


@pytest.mark.parametrize("name", ["ift", "ep-infinitesimal"])
@pytest.mark.parametrize("size", [1e3, 1.0, 1e-3])
def test_linear_modes_in_half_precision_do_not_depend_on_the_size_of_the_cotangent(name, size):
    problem = tanh_problem(16, (4,), seed=0, gain=0.5, dtype=torch.float16)
    unit = problem.g.double().norm()
    v = tep.get_backward(name)(problem.f, problem.z, (size * problem.g.double() / unit).half())
    reference = problem.dense(transpose=name == "ift") * (size / unit)
    assert relative_error(v.double(), reference) < 1e-2
