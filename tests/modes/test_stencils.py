"""Stencils as quadrature rules, and the order at which the estimates of modes converge."""

import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import ANALYTIC_MAPS, analytic_problem, relative_error, report_of, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning, InvalidOptionError, NudgeDivergedError

STENCILS = [
    lambda beta: tep.Stencil.one_sided(beta),
    lambda beta: tep.Stencil.one_sided(beta, direction="up"),
    lambda beta: tep.Stencil.symmetric(beta),
    *(lambda beta, order=order: tep.Stencil.richardson(beta, order) for order in (2, 4, 6, 8)),
    *(lambda beta, n=n: tep.Stencil.contour(beta, n) for n in (2, 3, 4, 5, 6, 8)),
]


@pytest.mark.parametrize("make", STENCILS)
@given(beta=st.floats(0.05, 2.0))
def test_exact_for_powers_below_the_order_only(make, beta):
    stencil = make(beta)
    moments = [
        sum(c * b**power for b, c in zip(stencil.nodes, stencil.coefficients, strict=True))
        for power in range(stencil.order + 1)
    ]
    assert moments[0] == pytest.approx(1.0)
    for power in range(1, stencil.order):
        assert abs(moments[power]) < 1e-12 * max(1.0, beta**power)
    assert abs(moments[stencil.order]) > 1e-4 * beta**stencil.order


@pytest.mark.parametrize("n_points", range(2, 10))
def test_upper_half_circle_stands_for_the_whole(n_points):
    stencil = tep.Stencil.contour(0.3, n_points)
    nodes, coefficients = stencil.upper_half()
    assert len(nodes) == n_points // 2 + 1

    def real_analytic(b):  # conj f(b) = f(conj b)
        return 1 / (2 - b) + b**3

    whole = sum(c * real_analytic(b) for b, c in zip(stencil.nodes, stencil.coefficients, strict=True))
    half = sum(c * complex(real_analytic(b)).real for b, c in zip(nodes, coefficients, strict=True))
    assert half == pytest.approx(complex(whole).real)


def test_nodes_on_the_real_axis_are_real():
    assert [type(node) for node in tep.Stencil.contour(0.1, 4).nodes] == [float, complex, float, complex]
    assert tep.Stencil.richardson(0.1, 6).is_real
    assert not tep.Stencil.contour(0.1, 4).is_real


@pytest.mark.parametrize("make", STENCILS)
def test_auto_amplitude_balances_truncation_against_rounding(make):
    eps = 2.0**-52
    stencil = make("auto").resolve(eps)
    best = stencil.expected_error(eps)
    for factor in (0.1, 10.0):
        assert make(stencil.beta * factor).expected_error(eps) > best
    assert make(0.25).resolve(eps).beta == 0.25


def test_auto_amplitude_stays_small_where_order_is_high():
    assert tep.Stencil.contour("auto", 12).resolve(2.0**-23).beta == 0.1


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, "small", None, True])
def test_refuses_amplitudes_that_are_none(beta):
    with pytest.raises(InvalidOptionError, match="beta must be a positive finite number or 'auto'"):
        tep.Stencil.symmetric(beta)


@pytest.mark.parametrize("make", [lambda: tep.Stencil.richardson(0.1, 3), lambda: tep.Stencil.contour(0.1, 1)])
def test_refuses_impossible_orders(make):
    with pytest.raises(InvalidOptionError):
        make()


@pytest.mark.parametrize("direction", ["upwards", "UP", "", None, 1, True, ["up"]])
def test_refuses_directions_that_are_none(direction):
    with pytest.raises(InvalidOptionError, match="direction"):
        tep.Stencil.one_sided(0.1, direction=direction)


def test_a_direction_stays_as_the_amplitude_is_moved():
    up = tep.Stencil.one_sided("auto", direction="up")
    for moved in (
        up.at(0.2),
        replace(up, beta=0.2),
        tep.get_backward(tep.get_backward("ep-one-sided:direction=up"), beta=0.2).stencil,
    ):
        assert moved == tep.Stencil.one_sided(0.2, "up") != tep.Stencil.one_sided(0.2)
        assert moved.nodes == (0.2,)
    assert tep.Stencil.one_sided(0.2) == tep.Stencil.one_sided(0.2, "down")
    assert up.resolve(1e-7).beta == tep.Stencil.one_sided().resolve(1e-7).beta


def test_auto_has_no_nodes_before_it_is_resolved():
    with pytest.raises(InvalidOptionError, match="resolve"):
        _ = tep.Stencil.symmetric().nodes


@pytest.mark.parametrize("make", STENCILS)
def test_is_a_value(make):
    assert pickle.loads(pickle.dumps(make(0.1))) == make(0.1) != make(0.2)
    assert hash(make(0.1)) == hash(make(0.1))


@pytest.mark.parametrize(
    ("stencil", "order"),
    [
        (tep.Stencil.one_sided, 1),
        (lambda beta: tep.Stencil.one_sided(beta, "up"), 1),
        (tep.Stencil.symmetric, 2),
        (lambda beta: tep.Stencil.richardson(beta, 4), 4),
        (lambda beta: tep.Stencil.richardson(beta, 6), 6),
        (lambda beta: tep.Stencil.contour(beta, 4), 4),
        (lambda beta: tep.Stencil.contour(beta, 6), 6),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_convergence(stencil, order, seed):
    problem = tanh_problem(seed=seed)
    limit = problem.dense()
    errors = [
        relative_error(tep.EquilibriumPropagation(stencil(beta), tol=1e-14)(problem.f, problem.z, problem.g), limit)
        for beta in ((0.4, 0.2) if order == 6 else (0.2, 0.1))
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] > 1e-13  # else the slope would be one of rounding errors


@pytest.mark.parametrize("name", ["ep-one-sided", "ep", "ep-richardson"])
def test_float32_error_is_what_the_stencil_promises(name):
    problem = tanh_problem(dtype=torch.float32)
    mode = tep.get_backward(name)
    v, report = report_of(mode, problem)
    promised = mode.stencil.resolve(report.rounding).expected_error(report.rounding)
    assert report.rounding == pytest.approx(torch.finfo(torch.float32).eps, rel=2)
    assert relative_error(v, problem.dense()) < 5 * promised
    assert report.converged
    assert report.beta == pytest.approx(mode.stencil.resolve(report.rounding).beta)


@pytest.mark.parametrize("name", ANALYTIC_MAPS)
@pytest.mark.parametrize("n_points", [2, 4, 6, 8])
def test_error_falls_as_beta_to_the_number_of_points(name, n_points):
    f, z, g, limit = analytic_problem(name)

    def error(beta):
        mode = tep.EquilibriumPropagation(tep.Stencil.contour(beta, n_points), tol=1e-14, on_divergence="raise")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EPWarning)
            try:
                return relative_error(mode(f, z, g), limit)
            except NudgeDivergedError:
                return math.inf

    # Start far out, where nudges may diverge, and come in to the asymptotic range.
    beta = next(beta for beta in (6.4, 3.2, 1.6, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025) if error(beta) < 1e-3)
    errors = [error(beta), error(beta / 2)]
    assert errors[1] > 1e-11  # else the slope would be one of rounding errors
    assert math.log2(errors[0] / errors[1]) == pytest.approx(n_points, abs=0.3)


@pytest.mark.parametrize("name", ANALYTIC_MAPS)
def test_eight_points_at_a_finite_amplitude_are_exact(name):
    f, z, g, limit = analytic_problem(name)
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(0.05, 8), tol=1e-13)
    assert relative_error(mode(f, z, g), limit) < 1e-9
