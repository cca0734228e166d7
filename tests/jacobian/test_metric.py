"""Metrics that make a Jacobian symmetric: that of an activation, and the fitted one."""

import math
import pickle

import pytest
import torch
from problems import Problem, contraction, normal, relative_error, solve, tanh_problem
from torch import nn

from torchdeq_ep import EquilibriumPropagation, InfinitesimalEP, Stencil, get_backward
from torchdeq_ep.errors import InvalidOptionError, UnknownBackwardError
from torchdeq_ep.holomorphic.context import holomorphic_map
from torchdeq_ep.jacobian.metric import ActivityMetric, automatic_metric
from torchdeq_ep.nn import shifted_sigmoid


def _leaky(x):
    return torch.where(x > 0, x, 0.3 * x)


@pytest.mark.parametrize(
    ("phi", "twin"),
    [("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("shifted-sigmoid", shifted_sigmoid)],
)
def test_named_activations_have_the_slope_of_their_function(phi, twin):
    u = torch.linspace(-1.5, 2.5, 41, dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(twin))(u)
    for activation in (phi, twin):
        torch.testing.assert_close(ActivityMetric(activation, "pre")(u), 1 / slope)
        torch.testing.assert_close(ActivityMetric(activation, "post")(twin(u)), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("phi", ["tanh", "shifted-sigmoid", torch.tanh, shifted_sigmoid])
def test_at_complex_states_the_metric_is_continued_from_the_real_part(phi):
    function = {"tanh": torch.tanh, "shifted-sigmoid": shifted_sigmoid}.get(phi, phi)
    # So far from the axis that the real part of the slope changes its sign; the last two are flat at their real part.
    u = torch.linspace(-0.5, 1.5, 11, dtype=torch.float64)
    u = torch.cat([u, u.new_tensor([-9.0, 9.0])]) + (0.9j if function is torch.tanh else 0.6j)
    slope = (function(u + 1e-5) - function(u - 1e-5))[:-2] / 2e-5
    assert bool((slope.real < 0).any())
    metric = holomorphic_map(ActivityMetric(phi, "pre"), "real-part")
    torch.testing.assert_close(metric(u)[:-2], 1 / slope)
    assert metric(u)[-2:].tolist() == pytest.approx([1000, 1000])


def test_at_complex_states_the_metric_of_activities_needs_a_name():
    activity = torch.tensor([0.2 + 0.3j, 0.9 - 0.1j])
    metrics = [holomorphic_map(ActivityMetric(phi), "real-part") for phi in ("tanh", torch.tanh)]
    torch.testing.assert_close(metrics[0](activity), 1 - activity**2)
    with pytest.raises(InvalidOptionError, match="inverse"):
        metrics[1](activity)


def test_activations_with_kinks_and_plateaus():
    z = torch.tensor([-0.6, 3.0, 2000.0], dtype=torch.float64)
    torch.testing.assert_close(ActivityMetric(_leaky)(z), torch.tensor([0.3, 1.0, 1.0], dtype=torch.float64))
    assert ActivityMetric(nn.PReLU())(torch.tensor([-1.0, 1.0])).tolist() == [0.25, 1.0]
    clipped = ActivityMetric(nn.functional.hardtanh, floor=0.01)(torch.tensor([-1.0, 0.5, 1.0]))
    assert clipped.tolist() == pytest.approx([0.01, 1.0, 0.01])
    assert ActivityMetric(torch.relu, floor=0.01)(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.01, 1.0])


@pytest.mark.parametrize("state", ["pre", "post"])
@pytest.mark.parametrize("phi", ["tanh", torch.tanh])
def test_saturated_units_have_a_finite_positive_metric(phi, state):
    extreme = torch.tensor([-40.0, 40.0]) if state == "pre" else torch.tensor([-1.0, 1.0])
    bound = 1 / 0.01 if state == "pre" else 0.01
    assert ActivityMetric(phi, state, floor=0.01)(extreme).tolist() == pytest.approx([bound, bound])


def test_an_activity_metric_is_a_value():
    metric = ActivityMetric(torch.tanh, state="pre")
    assert pickle.loads(pickle.dumps(metric)) == metric
    mode = EquilibriumPropagation(metric=ActivityMetric("tanh"))
    assert pickle.loads(pickle.dumps(mode)) == mode


def test_what_an_activity_metric_refuses():
    with pytest.raises(InvalidOptionError, match="Did you mean 'tanh'"):
        ActivityMetric("tahn")
    with pytest.raises(InvalidOptionError, match="name of an activation or a function"):
        ActivityMetric(3)
    with pytest.raises(InvalidOptionError, match="there are: post, pre"):
        ActivityMetric("tanh", state="mid")
    with pytest.raises(InvalidOptionError, match="between 0 and 1"):
        ActivityMetric("tanh", floor=0.0)
    with pytest.raises(InvalidOptionError, match="increasing"):
        ActivityMetric(torch.cos)(torch.zeros(3))
    for state in ("pre", "post"):
        with pytest.raises(InvalidOptionError, match="increasing"):
            ActivityMetric(torch.neg, state)(torch.zeros(3))


def _pre_problem(n=8, batch=(3,), gain=0.6):
    weight = contraction(n, 0, gain, symmetric=True)
    x, g = normal(*batch, n, seed=1), normal(*batch, n, seed=2)

    def f(u):
        return torch.tanh(u) @ weight.T + x

    u = solve(f, torch.zeros_like(x))
    return Problem(f, u, g, weight * (1 - torch.tanh(u.reshape(-1, 1, n)) ** 2))


@pytest.mark.parametrize("phi", ["tanh", torch.tanh])
@pytest.mark.parametrize("state", ["pre", "post"])
def test_with_it_symmetric_weights_make_ep_exact_to_the_order_of_the_stencil(phi, state):
    problem = tanh_problem(symmetric=True) if state == "post" else _pre_problem()
    exact = problem.dense(transpose=True)
    metric = ActivityMetric(phi, state)
    limit = InfinitesimalEP(metric=metric)(problem.f, problem.z, problem.g)
    assert relative_error(limit, exact) < 1e-9
    assert relative_error(InfinitesimalEP()(problem.f, problem.z, problem.g), exact) > 0.05

    def error(make, beta):
        mode = EquilibriumPropagation(make(beta), metric=metric, tol=1e-13)
        return relative_error(mode(problem.f, problem.z, problem.g), exact)

    for make, order in ((Stencil.one_sided, 1), (Stencil.symmetric, 2), (lambda b: Stencil.richardson(b, order=4), 4)):
        ratio = error(make, 0.04) / error(make, 0.02)
        assert math.log2(ratio) == pytest.approx(order, abs=0.25)
    without = EquilibriumPropagation(Stencil.symmetric(0.02))(problem.f, problem.z, problem.g)
    assert relative_error(without, exact) > 0.05


@pytest.mark.parametrize("state", ["pre", "post"])
@pytest.mark.parametrize(("n", "batch", "gain"), [(8, (3,), 0.6), (40, (4,), 0.95), (200, (2,), 0.95)])
def test_the_automatic_metric_takes_the_bias_of_an_activation_away(state, n, batch, gain):
    if state == "post":
        problem = tanh_problem(n, batch, symmetric=True, gain=gain)
        known = 1 - problem.z**2
    else:
        problem = _pre_problem(n, batch, gain)
        known = 1 / (1 - torch.tanh(problem.z) ** 2)
    exact = problem.dense(transpose=True)
    bias = relative_error(problem.dense(), exact)
    automatic = InfinitesimalEP(metric="auto")(problem.f, problem.z, problem.g)
    assert relative_error(automatic, exact) < bias / 10
    # The samples are independent, so each has a scale of its own.
    ratio = automatic_metric(problem.f, problem.z) / known
    assert (ratio.std(dim=-1) / ratio.mean(dim=-1) < 0.1).all()


@pytest.mark.parametrize("spec", ["ep:metric=auto", "ep-infinitesimal:metric=auto", "hep:metric=auto"])
def test_automatic_is_an_option_of_the_modes(spec):
    problem = tanh_problem(symmetric=True)
    exact = problem.dense(transpose=True)
    mode = get_backward(spec)
    assert pickle.loads(pickle.dumps(mode)) == mode
    once, again = (mode(problem.f, problem.z, problem.g) for _ in range(2))
    assert relative_error(once, exact) < 1e-3
    assert torch.equal(once, again)
    with pytest.raises((InvalidOptionError, UnknownBackwardError), match="metric must be"):
        get_backward(spec.replace("auto", "automatic"))


def test_the_reports_count_what_the_fit_costs():
    from torchdeq_ep.state.equilibrium import Equilibrium

    problem = tanh_problem(symmetric=True)
    equilibrium = Equilibrium(problem.f, problem.z, problem.f(problem.z), problem.g, 1e-16)
    for spec in ("ep", "ep-infinitesimal"):
        _, with_fit = get_backward(spec, metric="auto").solve(equilibrium)
        _, without = get_backward(spec).solve(equilibrium)
        assert with_fit.calls > without.calls + 50


def test_a_jacobian_beyond_repair_is_left_as_it_is():
    problem = tanh_problem(40, (4,))  # independent entries: no diagonal makes them symmetric
    exact = problem.dense(transpose=True)
    bias = relative_error(problem.dense(), exact)
    automatic = InfinitesimalEP(metric="auto")(problem.f, problem.z, problem.g)
    assert relative_error(automatic, exact) <= bias * (1 + 1e-9)


def test_a_metric_for_small_misalignment_is_as_good_as_the_known_one():
    weight = contraction(40, 0, symmetric=True) + 0.05 * contraction(40, 3)
    x, g = normal(3, 40, seed=1), normal(3, 40, seed=2)

    def f(z):
        return torch.tanh(z @ weight.T + x)

    z = solve(f, torch.zeros_like(x))
    problem = Problem(f, z, g, (1 - z[:, :, None] ** 2) * weight)
    exact = problem.dense(transpose=True)
    known, automatic = (
        relative_error(InfinitesimalEP(metric=m)(f, z, g), exact) for m in (ActivityMetric("tanh"), "auto")
    )
    assert automatic < 1.2 * known < 0.5 * relative_error(problem.dense(), exact)


def test_dead_units_and_tiny_states():
    weight = contraction(6, 0, symmetric=True)
    alive = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for f, z in (
        (lambda z: alive * torch.tanh(weight @ z), torch.zeros(6, dtype=torch.float64)),
        (lambda z: 0 * z, torch.zeros(6)),
        (lambda z: 0.5 * z, torch.zeros(1)),
    ):
        metric = automatic_metric(f, z)
        assert torch.isfinite(metric).all()
        assert (metric > 0).all()
