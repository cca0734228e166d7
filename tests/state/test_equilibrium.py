"""What becomes of a free phase that stopped early, and of values that are not finite."""

import math

import pytest
import torch
from problems import relative_error, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import ConvergenceWarning, FallbackWarning, NonFiniteError


@pytest.mark.parametrize("seed", range(5))
def test_an_inexact_free_phase_costs_ep_no_more_than_it_costs_ift(seed):
    problem = tanh_problem(20, (4,), seed, dtype=torch.float32)
    loose = problem.z
    direction = torch.randn_like(loose)
    loose = loose + 1e-3 * loose.norm() * direction / direction.norm()
    moved = {
        name: relative_error(
            tep.get_backward(name, tol=1e-6)(problem.f, loose, problem.g),
            tep.get_backward(name, tol=1e-6)(problem.f, problem.z, problem.g),
        )
        for name in ("ep-infinitesimal", "ift", "ep")
    }
    assert 0 < moved["ep"] <= 1.1 * max(moved["ift"], moved["ep-infinitesimal"])


@pytest.mark.parametrize("name", ["ift", "ep"])
def test_a_free_phase_that_never_converged_is_said(name):
    problem = tanh_problem()
    with pytest.warns(ConvergenceWarning, match="not an equilibrium"):
        tep.get_backward(name)(problem.f, problem.z + 0.1, problem.g)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cotangents_that_are_not_finite(bad):
    problem = tanh_problem()
    g = problem.g.clone()
    g[0, 0] = bad
    for name in ("ift", "ep", "aep"):
        with pytest.raises(NonFiniteError, match="1 of 24 entries"):
            tep.get_backward(name)(problem.f, problem.z, g)
    with pytest.warns(FallbackWarning):
        v = tep.get_backward("ep", on_divergence="ift")(problem.f, problem.z, g)
    assert v.isnan().all()
