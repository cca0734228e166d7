"""The force of a nudge: its metric, and nudges by the loss itself."""

import math

import pytest
import torch
import torchdeq
from problems import DRIVE, WEIGHT, Problem, relative_error, report_of, tanh_problem
from torch import nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, LossMismatchWarning, NonFiniteError, TruncationWarning


@pytest.mark.parametrize("mode", [tep.EquilibriumPropagation, tep.InfinitesimalEP])
def test_metric_conjugates_the_dense_solve(mode):
    problem = tanh_problem(seed=5)
    metric = torch.rand_like(problem.z) + 0.5
    v = mode(metric=lambda _: metric)(problem.f, problem.z, problem.g)
    assert relative_error(v, problem.dense(metric)) < 1e-9


def _quartic_problem():
    problem = tanh_problem()
    target = torch.randn_like(problem.z)

    def loss(z):
        return ((z - target) ** 2).sum() + 0.3 * (z**4).sum()

    g = torch.func.grad(loss)(problem.z)
    return Problem(problem.f, problem.z, g, problem.jacobians), loss


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("by_loss", [False, True])
def test_a_one_sided_nudge_is_the_displacement_on_its_side(direction, by_loss):
    """The definition, eq. (7): `z_b = f(z_b) + b dL/dz(z_b)`, iterated by hand, with `b` below or above zero."""
    problem, loss = _quartic_problem()
    beta = {"down": -0.05, "up": 0.05}[direction]
    z = problem.z
    for _ in range(500):
        z = problem.f(z) + beta * (torch.func.grad(loss)(z) if by_loss else problem.g)
    mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(0.05, direction), scale="absolute", tol=1e-13, max_iter=500)
    v, _ = report_of(mode, problem, loss if by_loss else None)
    assert relative_error(v, (z - problem.z) / beta) < 1e-9
    assert (float(loss(z)) > float(loss(problem.z))) == (direction == "up")


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
@pytest.mark.parametrize(("stencil", "order"), [(tep.Stencil.one_sided, 1), (tep.Stencil.symmetric, 2)])
def test_loss_nudging_has_the_same_limit_and_order(stencil, order):
    problem, loss = _quartic_problem()
    limit = problem.dense()
    errors = [
        relative_error(
            report_of(tep.EquilibriumPropagation(stencil(beta), tol=1e-14), problem, loss)[0],
            limit,
        )
        for beta in (0.05, 0.025)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_loss_nudging_on_a_contour_uses_the_holomorphic_derivative():
    problem, loss = _quartic_problem()
    errors = [
        relative_error(
            report_of(tep.EquilibriumPropagation(tep.Stencil.contour(beta, 4), tol=1e-14), problem, loss)[0],
            problem.dense(),
        )
        for beta in (0.05, 0.025)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)


def test_loss_nudging_ignores_a_factor_and_notices_another_loss():
    problem, loss = _quartic_problem()
    v, _ = report_of(tep.EquilibriumPropagation(), problem, loss)
    scaled, _ = report_of(tep.EquilibriumPropagation(), problem, lambda z: 7 * loss(z))
    assert relative_error(scaled, v) < 1e-9
    with pytest.warns(LossMismatchWarning, match="another gradient"):
        report_of(tep.EquilibriumPropagation(), problem, lambda z: (z**2).sum())


def test_a_metric_that_overflows_is_said():
    problem = tanh_problem(dtype=torch.float32)
    mode = tep.EquilibriumPropagation(metric=lambda z: torch.full_like(z, 1e30))
    with pytest.raises(NonFiniteError, match="times the metric"):
        mode(problem.f, problem.z, problem.g * 1e20)


@pytest.mark.parametrize("metric", [lambda z: z * 0, lambda z: -z.abs() - 1, lambda z: z[0], lambda z: 1.0])
def test_metrics_must_be_positive_and_of_the_states_shape(metric):
    problem = tanh_problem()
    with pytest.raises(InvalidOptionError, match="metric"):
        tep.EquilibriumPropagation(metric=metric)(problem.f, problem.z, problem.g)


def test_several_tensors_and_loss_nudging_with_cross_entropy():
    readout = nn.Linear(6, 3).double()
    targets = torch.tensor([0, 2])

    def f(a, b):
        joint = torch.tanh(torch.cat([a, b], 1) @ WEIGHT.T + DRIVE)
        return joint[:, :6], joint[:, 6:]

    deq = torchdeq.get_deq(f_max_iter=300, f_tol=1e-12)
    x = nn.Parameter(DRIVE.clone())

    def gradient(backward):
        def f(a, b):
            joint = torch.tanh(torch.cat([a, b], 1) @ WEIGHT.T + x)
            return joint[:, :6], joint[:, 6:]

        def loss_of_state(state):
            return functional.cross_entropy(readout(state[0]), targets)

        zeros = (torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))
        with tep.use_backward(deq, backward):
            (state,), _ = deq(f, zeros)
            with tep.nudge_loss(deq, loss_of_state):
                (gradient,) = torch.autograd.grad(loss_of_state(state), x)
        return gradient

    reference = gradient("ep-infinitesimal")
    assert relative_error(gradient("hep:n_points=8,beta=0.05"), reference) < 1e-8
    with pytest.warns(TruncationWarning, match="relative amplitude 0.3"):
        assert relative_error(gradient("ep:beta=0.3"), reference) > 0.05


def test_loss_nudging_takes_the_metric_of_the_nudged_state():
    """The papers' dynamics: potentials are nudged by `dL/dphi`, here written out and iterated by hand."""
    torch.manual_seed(1)
    weight, x = WEIGHT[:6, :6] + WEIGHT[:6, :6].T, torch.randn(2, 6, dtype=torch.float64)
    readout, targets = nn.Linear(6, 3).double(), torch.tensor([0, 2])
    sigmoid, beta = tep.nn.shifted_sigmoid, 0.4

    def slope(u):
        return 4 * sigmoid(u) * (1 - sigmoid(u))

    def f(u):
        return 0.5 * sigmoid(u) @ weight + x

    def loss_of_state(u):
        return functional.cross_entropy(readout(sigmoid(u)), targets)

    def nudged(b):
        u = free
        for _ in range(500):
            activity = sigmoid(u).detach().requires_grad_()
            (force,) = torch.autograd.grad(functional.cross_entropy(readout(activity), targets), activity)
            u = f(u) + b * force
        return u

    free = torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(500):
        free = f(free)
    expected = (nudged(beta) - nudged(-beta)) / (2 * beta) * slope(free)

    deq = torchdeq.get_deq(f_max_iter=300, f_tol=1e-13)
    drive = x.clone().requires_grad_()
    options = {"metric": lambda u: 1 / slope(u), "tol": 1e-10, "max_iter": 500}

    def gradient(mode):
        with tep.use_backward(deq, mode):
            (u,), _ = deq(lambda u: 0.5 * sigmoid(u) @ weight + drive, torch.zeros_like(free))
            with tep.nudge_loss(deq, loss_of_state):
                return torch.autograd.grad(loss_of_state(u), drive)[0]

    def nudge(stencil):
        return tep.EquilibriumPropagation(stencil, scale="absolute", **options)

    assert relative_error(gradient(nudge(tep.Stencil.symmetric(beta))), expected) < 1e-8
    limit = gradient(tep.InfinitesimalEP(**options))
    assert relative_error(expected, limit) > 1e-4  # the nudge is not small
    assert relative_error(gradient(nudge(tep.Stencil.contour(0.1, n_points=8))), limit) < 1e-8
