"""The order in which nodes are visited: one after the other, stacked, online; and the decay along a contour."""

from dataclasses import replace

import pytest
import torch
from problems import DRIVE, analytic_problem, chain, contraction, relative_error, report_of, solve, tanh_problem
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import TruncationWarning
from torchdeq_ep.modes import propagation
from torchdeq_ep.state import Memory
from torchdeq_ep.state.equilibrium import Equilibrium


@pytest.mark.parametrize("stencil", ["symmetric", "richardson", "contour"])
def test_stacked_nodes_and_one_after_the_other_agree(stencil):
    problem = tanh_problem()
    results = {b: report_of(tep.EquilibriumPropagation(stencil, batching=b), problem) for b in ("auto", "loop", "vmap")}
    assert {name: report.batching for name, (_, report) in results.items()} == {
        "auto": "loop",
        "loop": "loop",
        "vmap": "vmap",
    }
    assert relative_error(results["vmap"][0], results["loop"][0]) < 1e-9
    assert results["loop"][1].calls < results["vmap"][1].calls  # later nodes start close to where they end


def test_online_averages_to_the_same_limit():
    problem = tanh_problem()
    v = tep.get_backward("hep-online", beta=0.05, schedule=tep.Online(steps=30, periods=3))(
        problem.f, problem.z, problem.g
    )
    assert relative_error(v, problem.dense()) < 1e-6


@pytest.mark.parametrize("n_points", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("beta", [0.1, 0.3, 0.6])
def test_contours_estimate_their_own_error(n_points, beta):
    problem = tanh_problem(gain=0.8)
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(beta, n_points), tol=1e-13)
    v, report = report_of(mode, problem)
    error = relative_error(v, problem.dense())
    assert error / 10 < report.truncation < 10 * error
    assert report.radius > 1


def test_contours_that_are_too_large_are_warned_about():
    problem = tanh_problem(gain=0.9)
    with pytest.warns(TruncationWarning, match="Use beta="):
        tep.get_backward("hep:beta=1.2")(problem.f, problem.z, problem.g)


def test_a_stack_of_nodes_solves_the_exact_limit_once(monkeypatch):
    problem = tanh_problem(8, (2,), seed=3)
    solves = []
    solve_limit = propagation.solve_linear
    monkeypatch.setattr(propagation, "solve_linear", lambda *args: solves.append(args) or solve_limit(*args))
    mode = tep.EquilibriumPropagation(tep.Stencil.richardson(), correction="asymmetric", batching="vmap")
    assert relative_error(mode(problem.f, problem.z, problem.g), problem.dense(transpose=True)) < 1e-8
    assert len(solves) == 1


def test_the_online_schedule_reports_each_crossing_once():
    weight = contraction(12, 3, 0.5)

    def f(z):
        return functional.leaky_relu(z @ weight.T + DRIVE, 0.1)

    z = solve(f, torch.zeros(2, 12, dtype=torch.float64))
    stencil = tep.Stencil.contour(1e-3, n_points=4)
    reports = [
        tep.EquilibriumPropagation(
            stencil, schedule=tep.Online(steps=20, periods=periods), piecewise="real-part"
        ).solve(Equilibrium(f, z, f(z), torch.ones_like(z), 2.2e-16))[1]
        for periods in (1, 3)
    ]
    once, thrice = (sum(crossing.units for crossing in report.crossings) for report in reports)
    assert thrice == 3 * once > 0


@pytest.mark.parametrize("name", ["sigmoid", "gelu", "attention"])
def test_online_reaches_the_limit_of_parallel(name):
    f, z, g, limit = analytic_problem(name)
    schedule = tep.Online(steps=25, periods=4)
    v = tep.get_backward("hep-online:beta=0.05,n_points=6", schedule=schedule)(f, z, g)
    parallel = tep.get_backward("hep:beta=0.05,n_points=6")(f, z, g)
    assert relative_error(v, limit) < 1e-4
    assert relative_error(v, parallel) < 1e-4


def test_online_error_falls_with_the_steps_it_takes():
    f, z, g, limit = analytic_problem("sigmoid")
    errors = [
        relative_error(
            tep.get_backward("hep-online:beta=0.05,tol=0.5", schedule=tep.Online(steps=steps, periods=3))(f, z, g),
            limit,
        )
        for steps in (3, 6, 12)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize(("gain", "units"), [(3, 8), (4, 12), (1.5, 30)])
def test_nudges_that_add_more_than_the_force_are_given_up_at_once(gain, units):
    problem, exact = chain(gain, units)
    v, report = tep.get_backward("aep").solve(problem)
    assert relative_error(v, exact) < 1e-8
    assert (report.beta, report.converged) == (0, True)
    limit = tep.get_backward("ift").solve(replace(problem, memory=Memory()))[1]
    assert report.calls <= limit.calls + 60  # some nudges of two steps, and what is measured
