"""The two modes that solve a linear equation."""

import warnings
from dataclasses import replace

import pytest
import torch
from problems import chain, contraction, relative_error, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.state import Equilibrium, Memory


@pytest.mark.parametrize("name", ["ift", "ep-infinitesimal"])
@pytest.mark.parametrize("size", [1e3, 1.0, 1e-3])
def test_linear_modes_in_half_precision_do_not_depend_on_the_size_of_the_cotangent(name, size):
    problem = tanh_problem(16, (4,), seed=0, gain=0.5, dtype=torch.float16)
    unit = problem.g.double().norm()
    v = tep.get_backward(name)(problem.f, problem.z, (size * problem.g.double() / unit).half())
    reference = problem.dense(transpose=name == "ift") * (size / unit)
    assert relative_error(v.double(), reference) < 1e-2


@pytest.mark.parametrize("name", ["ift", "ep-infinitesimal"])
@pytest.mark.parametrize(("gain", "units"), [(1.5, 30), (4, 12)])
def test_where_the_loop_fails_gmres_takes_over(name, gain, units):
    """Powers of a Jacobian far from normal grow before they fall, which looks like divergence."""
    problem, exact = chain(gain, units)
    if name == "ep-infinitesimal":
        exact = exact.flip(1)  # J is J^T with the units in reverse order
    with pytest.warns(tep.errors.ConvergenceWarning):
        alone = tep.get_backward(name, max_iter=100).solve(replace(problem, memory=Memory()))[1]
    v, report = tep.get_backward(name).solve(problem)
    assert not alone.converged
    assert report.converged
    assert relative_error(v, exact) < 1e-8
    again = tep.get_backward(name).solve(problem)[1]
    assert again.iterations == report.iterations - alone.iterations  # the layer remembers


def test_gmres_takes_over_beyond_a_spectral_radius_of_one():
    jacobian = 3 * contraction(20, 0, 0.9)
    g = torch.ones(1, 20, dtype=torch.float64)
    problem = Equilibrium(lambda z: torch.sin(z @ jacobian.T), 0 * g, 0 * g, g, eps=1e-6)
    v, report = tep.get_backward("ift").solve(problem)
    exact = torch.linalg.solve(torch.eye(20, dtype=torch.float64) - jacobian.T, g.T).T
    assert report.converged
    assert relative_error(v, exact) < 1e-3


def test_of_two_that_fail_the_better_is_taken_and_the_other_not_tried_again():
    """An orthogonal Jacobian with eigenvalue 1: no vector solves it."""
    problem, _ = chain(1.0, 6)
    turned = replace(problem, f=lambda z: z.roll(1, dims=-1), cotangent=1 + problem.cotangent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = tep.get_backward("ift", on_divergence="accept").solve(turned)[1]
        second = tep.get_backward("ift", on_divergence="accept").solve(turned)[1]
    assert not first.converged
    assert second.iterations < first.iterations
