"""How large a nudge is, in units of the state."""

import warnings

import pytest
import torch
from problems import chain, contraction, relative_error, report_of, solve, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning, InvalidOptionError


def test_absolute_amplitude_is_taken_as_it_is():
    problem = tanh_problem()
    mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(1e-3), scale="absolute", tol=1e-13)
    _, report = report_of(mode, problem)
    assert report.nudge == 1e-3
    assert report.beta == pytest.approx(1e-3 * float(problem.g.norm() / problem.z.norm()))
    v = mode(problem.f, problem.z, problem.g)
    nudged = solve(lambda z: problem.f(z) - 1e-3 * problem.g, problem.z)
    assert relative_error(v, (problem.z - nudged) / 1e-3) < 1e-8


def test_a_fixed_point_at_zero_has_a_usable_scale():
    weight = contraction(5, 0)
    g = torch.randn(5, dtype=torch.float64)
    v = tep.EquilibriumPropagation()(lambda z: torch.tanh(weight @ z), torch.zeros(5, dtype=torch.float64), g)
    assert relative_error(v, torch.linalg.solve(torch.eye(5, dtype=torch.float64) - weight, g)) < 1e-8


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_a_nudge_below_the_rounding_of_the_state_is_refused(scale):
    z = torch.ones(3)
    mode = tep.EquilibriumPropagation(tep.Stencil.symmetric(1e-12), scale=scale)
    with pytest.raises(InvalidOptionError, match="lost in the rounding"):
        mode(lambda z: 0.5 * z + 0.5, z, torch.ones(3))


@pytest.mark.parametrize("mode", ["ep", "ep-one-sided", "ep-richardson", "hep", "aep"])
@pytest.mark.parametrize("gain", [3.0, 10.0, 100.0])
def test_an_automatic_amplitude_is_never_refused(mode, gain):
    """However far the state is carried away."""
    problem, _ = chain(gain, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EPWarning)
        for _ in range(3):
            v, report = tep.get_backward(mode, on_divergence="accept").solve(problem)
    assert torch.isfinite(v).all()
    assert report.beta == 0 or report.nudge > 0
