"""Equilibrium propagation: its bias, its options, and honesty about failure."""

import contextlib
import math
import warnings

import pytest
import torch
from problems import SOLVERS, Problem, contraction, relative_error, report_of, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import (
    ConvergenceWarning,
    EPError,
    FallbackWarning,
    InvalidOptionError,
    NudgeDivergedError,
    PrecisionWarning,
)


def test_symmetric_weights_are_biased_until_the_metric_is_right():
    problem = tanh_problem(symmetric=True, gain=0.9)
    exact = problem.dense(transpose=True)
    plain = tep.EquilibriumPropagation()(problem.f, problem.z, problem.g)
    assert relative_error(plain, exact) > 0.02  # J = D W is not symmetric though W is
    right = tep.EquilibriumPropagation(metric=lambda z: 1 - z**2)(problem.f, problem.z, problem.g)
    assert relative_error(right, exact) < 1e-9
    errors = [
        relative_error(
            tep.EquilibriumPropagation(tep.Stencil.symmetric(beta), metric=lambda z: 1 - z**2, tol=1e-13)(
                problem.f, problem.z, problem.g
            ),
            exact,
        )
        for beta in (0.2, 0.1)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_a_map_that_descends_an_energy_is_unbiased():
    weight = contraction(6, 0, 0.4, symmetric=True)

    def energy(z):
        return 0.5 * (z**2).sum() - torch.log(torch.cosh(z @ weight)).sum()

    def f(z):
        z = z if z.requires_grad else z.detach().requires_grad_()
        with torch.enable_grad():
            return z - 0.5 * torch.autograd.grad(energy(z), z, create_graph=True)[0] + 0.1

    z = torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(200):
        z = f(z).detach()
    g = torch.randn_like(z)
    v = tep.EquilibriumPropagation(batching="loop")(f, z, g)
    assert relative_error(v, tep.ImplicitDifferentiation()(f, z, g)) < 1e-8


def test_bfloat16_states_are_warned_about():
    problem = tanh_problem(dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        v = tep.EquilibriumPropagation()(problem.f, problem.z, problem.g)
        assert not caught
        tep.get_backward("ep:beta=0.01")(problem.f, problem.z, problem.g)
    assert PrecisionWarning in {warning.category for warning in caught}
    assert v.dtype == torch.bfloat16
    assert relative_error(v, problem.dense()) < 0.03


def test_a_linear_map_without_a_gradient_has_a_best_estimate_and_is_said_or_refused():
    # f(z + c) = f(z) + c, so I - J is singular and no error vector exists.
    centring = torch.eye(4, dtype=torch.float64) * 0.5 + 0.125

    def f(z):
        return z @ centring

    z = torch.ones(2, 4, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="I - J is nearly singular"):
        v = tep.EquilibriumPropagation()(f, z, torch.ones_like(z))
    assert v.isfinite().all()
    with pytest.raises(NudgeDivergedError, match=r"diverged.*solver='broyden'"):
        tep.EquilibriumPropagation(on_divergence="raise")(f, z, torch.ones_like(z))


def test_divergence_shrinks_then_raises_or_falls_back():
    # Beyond z = -1.2 the map explodes; a large nudge gets there, a small one does not.
    def f(z):
        return 0.5 * z + 1e3 * torch.relu(z.abs() - 1.2).square() * z - 0.25

    z = torch.full((3,), -0.5, dtype=torch.float64)
    g = torch.ones_like(z)
    stencil = tep.Stencil.one_sided(0.9)
    problem = Problem(f, z, g, torch.full((1, 1, 1), 0.5))
    v, report = report_of(tep.EquilibriumPropagation(stencil), problem)
    assert report.retries >= 1
    assert report.beta == 0.9 / 2**report.retries
    assert relative_error(v, 2 * g) < 1e-9
    with pytest.raises(NudgeDivergedError, match="one-sided"):
        report_of(tep.EquilibriumPropagation(stencil, on_divergence="raise"), problem)
    with pytest.warns(FallbackWarning, match="implicit differentiation took over"):
        v, _ = report_of(tep.EquilibriumPropagation(stencil, on_divergence="ift"), problem)
    assert relative_error(v, 2 * g) < 1e-9


def test_a_failed_nudge_may_be_accepted_as_it_is():
    problem = tanh_problem(gain=0.99)
    with pytest.raises(NudgeDivergedError):
        report_of(tep.EquilibriumPropagation("one-sided", max_iter=1, on_divergence="raise"), problem)
    with pytest.warns(ConvergenceWarning, match="the one-sided nudge .* stopped at"):
        v, report = report_of(tep.EquilibriumPropagation("one-sided", max_iter=1, on_divergence="accept"), problem)
    assert report.residual > 0.1
    assert not report.converged
    one_step = tep.jacobian.jvp(problem.f, problem.z)(problem.g) + problem.g
    assert relative_error(v, one_step) < 1e-6


def test_running_out_of_steps_is_said():
    problem = tanh_problem(gain=0.99)
    with pytest.warns(ConvergenceWarning, match="Raise max_iter"):
        _, report = report_of(tep.EquilibriumPropagation(max_iter=4, tol=1e-6), problem)
    assert not report.converged
    assert report.residual > report.tol


def test_reported_residual_is_the_true_one():
    problem = tanh_problem()
    for solver in SOLVERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(1e-4), solver=solver, max_iter=6)
            v, report = report_of(mode, problem)
        nudge = report.nudge
        step = (problem.f(problem.z + nudge * v) - problem.f(problem.z)) / nudge + problem.g
        true = float((step - v).norm() / problem.g.norm())
        assert true <= report.residual * (1 + 1e-6), solver  # the value is one step past the point it was judged at


@pytest.mark.parametrize(
    "options",
    [
        {"tol": 0.0},
        {"tol": 2},
        {"max_iter": 0},
        {"max_iter": 2.5},
        {"solver": "andersen"},
        {"scale": "relativ"},
        {"schedule": "on-line"},
        {"batching": "stack"},
        {"on_divergence": "ignore"},
        {"metric": 3.0},
        {"correction": "symmetric"},
        {"stencil": "central"},
        {"stencil": 0.1},
    ],
)
def test_options_are_checked_at_construction(options):
    with pytest.raises(InvalidOptionError) as error:
        tep.EquilibriumPropagation(**options)
    assert isinstance(error.value, (EPError, ValueError))
    assert len(str(error.value)) > 20


def test_misspelt_choices_name_the_nearest():
    with pytest.raises(InvalidOptionError, match="Did you mean 'anderson'"):
        tep.EquilibriumPropagation(solver="andersen")
    with pytest.raises(InvalidOptionError, match="Did you mean 'relative'"):
        tep.EquilibriumPropagation(scale="relativ")


def test_a_divergence_at_every_amplitude_ends_in_the_best_estimate():
    z = torch.zeros(4)
    with pytest.warns(ConvergenceWarning, match="stopped at"):
        v = tep.EquilibriumPropagation(solver="plain")(lambda z: -3 * z + 0.1 * z**2, z, torch.ones(4))
    assert v.isfinite().all()


def test_memory_does_not_grow_with_iterations():
    from torch.profiler import ProfilerActivity, profile

    weight = contraction(64, 0, 0.999)

    def f(z):
        return z @ weight.T

    z, g = torch.zeros(64, 64, dtype=torch.float64), torch.randn(64, 64, dtype=torch.float64)

    def peak(max_iter):
        mode = tep.EquilibriumPropagation(tol=1e-15, max_iter=max_iter)
        recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with recording as recorded, contextlib.suppress(tep.errors.EPError):
            mode(f, z, g)
        level = highest = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                highest = max(highest, level)
        return highest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tep.errors.ConvergenceWarning)
        peak(10)  # the profiler's own first-time allocations
        assert peak(200) <= 1.01 * peak(10)
