"""`attach_equilibrium`: right gradients from any solver, honest standard errors, and named failures."""

import copy
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from networks import Network, Springs
from problems import relative_error

import torchdeq_ep as tep
from torchdeq_ep.errors import (
    DoubleBackwardError,
    InvalidOptionError,
    MapChangedError,
    MapContractError,
    NonFiniteError,
    NotHolomorphicError,
    TruncationWarning,
)

# --- right gradients -------------------------------------------------------------------------------------------------

STENCILS = [tep.Stencil.one_sided(0.05), tep.Stencil.symmetric(0.05), tep.Stencil.richardson(0.1, order=4)]


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")  # both are large, and equally so
@pytest.mark.parametrize("stencil", STENCILS, ids=lambda stencil: stencil.name)
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_same_gradient_as_attach(network, stencil, scale):
    mode = tep.EquilibriumPropagation(stencil, scale=scale, tol=1e-14)
    for measured, expected in zip(
        network.gradients(stencil=stencil, scale=scale), network.reference(mode), strict=True
    ):
        assert relative_error(measured, expected) < 1e-10


def test_the_documented_call_agrees_with_attach(network):
    stencil = tep.Stencil.symmetric(0.05)
    expected = network.reference(tep.EquilibriumPropagation(stencil))
    for measured, exact in zip(network.gradients(stencil=stencil), expected, strict=True):
        torch.testing.assert_close(measured, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("stencil", "order"), [("one-sided", 1), ("symmetric", 2), ("richardson", 4)])
def test_order_of_the_stencil(network, stencil, order):
    make = {"one-sided": tep.Stencil.one_sided, "symmetric": tep.Stencil.symmetric}.get(stencil, tep.Stencil.richardson)
    exact = network.reference(tep.ImplicitDifferentiation(tol=1e-14))[0]
    errors = [relative_error(network.gradients(stencil=make(beta))[0], exact) for beta in (0.08, 0.04)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_the_automatic_amplitude_is_exact_to_rounding(network):
    exact = network.reference("ift")
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(network.gradients(), exact, strict=True))


def test_float32_state_of_a_float64_solver_keeps_its_precision():
    network = Network(torch.float32)
    double = copy.deepcopy(network)
    double.theta, double.x = (t.detach().double().requires_grad_() for t in (network.theta, network.x))

    def solve(current):
        return double.solve(current.double())

    def error(**options):
        z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, **options)
        assert z.dtype == torch.float32
        (gradient,) = torch.autograd.grad(network.loss(z), network.theta)
        return relative_error(gradient.double(), double.reference("ift")[0])

    assert error(noise=1e-15) < 1e-6
    assert error() < 3e-5  # without a word, the amplitude is one for float32: its square is 2e-5


def test_a_scipy_solver(network):
    theta, x = network.theta.detach().numpy(), network.x.detach().numpy()

    def solve(current):
        def residual(flat):
            z = flat.reshape(x.shape)
            return (np.tanh(z @ theta.T) @ theta + x - z + current.numpy()).ravel()

        return scipy.optimize.root(residual, x.ravel(), tol=1e-13).x.reshape(x.shape)

    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, noise=1e-12)
    gradients = torch.autograd.grad(network.loss(z), (network.theta, network.x))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(gradients, network.reference("ift"), strict=True))


def test_a_solver_that_reuses_its_memory(network):
    memory = torch.zeros_like(network.x)

    def solve(current):
        memory.copy_(network.solve(current))
        current.zero_()
        return memory

    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, shape=network.x.shape)
    gradient = torch.autograd.grad(network.loss(z), network.theta)[0]
    assert relative_error(gradient, network.reference("ift")[0]) < 1e-9


def test_one_row_at_a_time(network):
    def solve(current, row):
        one = copy.copy(network)
        one.x = network.x[row]
        return one.solve(current)

    for options in ({}, {"executor": "thread", "workers": 3}, {"shape": network.x.shape}):
        z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, batched=False, **options)
        gradient = torch.autograd.grad(network.loss(z), network.theta)[0]
        assert relative_error(gradient, network.reference("ift")[0]) < 1e-9


def test_parameters_in_a_dictionary_and_no_input():
    def force(z, theta, x):
        assert x is None
        first, second = theta["stiffness"]
        return theta["load"] - first * z - second * z**3

    theta = {
        "load": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
        "stiffness": (torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.tensor(0.5).double()),
    }

    def solve(current):
        z = torch.zeros(2, dtype=torch.float64)
        for _ in range(60):
            z = z + force(z, theta, None).detach().add(current) / (2 + 1.5 * z**2)
        return z

    reports = []
    z = tep.attach_equilibrium(
        solve, force, theta, stencil=tep.Stencil.richardson(0.05), repeats=2, writer=reports.append
    )
    z.sum().backward()
    slope = 2 + 1.5 * z.detach() ** 2
    assert torch.allclose(theta["load"].grad, 1 / slope, rtol=1e-5)
    assert torch.allclose(theta["stiffness"][0].grad, -(z.detach() / slope).sum(), rtol=1e-5)
    errors = reports[0].standard_error
    assert errors["load"].shape == (2,)
    assert errors["stiffness"][0] == 0
    assert errors["stiffness"][1] is None
    assert reports[0].standard_error_x is None


def test_the_metric_makes_unequal_time_scales_exact(network):
    rate = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)

    def solve(current):  # rate * F + current = 0
        return network.solve(current / rate)

    def force(z, theta, x):
        return rate * network.force(z, theta, x)

    exact = network.reference("ift")[0]

    def error(metric):
        z = tep.attach_equilibrium(solve, force, network.theta, network.x, metric=metric)
        return relative_error(torch.autograd.grad(network.loss(z), network.theta)[0], exact)

    assert error(rate) < 1e-9
    assert error(lambda z: rate) < 1e-9
    assert error(None) > 0.1


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_response_scale_does_not_depend_on_the_unit_of_the_force(network, unit):
    reports = []
    z = tep.attach_equilibrium(
        lambda current: network.solve(current / unit),
        lambda z, theta, x: unit * network.force(z, theta, x),
        network.theta,
        network.x,
        stencil=tep.Stencil.symmetric(1e-3),
        scale="response",
        noise=1e-6,
        writer=reports.append,
    )
    gradient = torch.autograd.grad(network.loss(z), network.theta)[0]
    assert relative_error(gradient, network.reference("ift")[0]) < 1e-4
    assert 0.5 <= reports[0].signal_to_noise / 1e3 <= 2
    assert reports[0].calls <= 6


def test_the_response_scale_backs_off_from_forces_that_break_the_solver(network):
    def solve(current):
        if current.norm() > 1e-3:
            raise ValueError("a fuse blew")
        return network.solve(current)

    gradient = network.gradients(scale="response", stencil=tep.Stencil.symmetric(1e-6))[0]
    z = tep.attach_equilibrium(
        solve, network.force, network.theta, network.x, scale="response", stencil=tep.Stencil.symmetric(1e-6)
    )
    assert relative_error(torch.autograd.grad(network.loss(z), network.theta)[0], gradient) < 1e-6


def test_readings_that_are_cut_off_are_warned_of(network):
    rest = network.solve(torch.zeros(()))
    network_solve, limit = network.solve, 0.01 * float(rest.norm())

    def solve(current):
        return rest + (network_solve(current) - rest).clamp(-limit, limit)

    z = tep.attach_equilibrium(
        solve, network.force, network.theta, network.x, scale="response", stencil=tep.Stencil.symmetric(0.07)
    )
    with pytest.warns(TruncationWarning, match="cut off"):
        network.loss(z).backward()


def test_nothing_is_nudged_without_need(network):
    calls = []

    def solve(current):
        calls.append(current)
        return network.solve(current)

    with torch.no_grad():
        assert not tep.attach_equilibrium(solve, network.force, network.theta, network.x).requires_grad
    assert not tep.attach_equilibrium(solve, lambda z, theta, x: -z, network.theta, network.x).requires_grad
    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x)
    (0 * z).sum().backward()
    assert len(calls) == 3
    assert not network.theta.grad.any()


def test_second_derivatives_are_refused(network):
    z = tep.attach_equilibrium(network.solve, network.force, network.theta, network.x)
    (first,) = torch.autograd.grad(z.square().sum(), network.theta, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        first.sum().backward()


# --- noise -----------------------------------------------------------------------------------------------------------


def noisy(network, sigma, seed):
    generator = torch.Generator().manual_seed(seed)

    def solve(current):
        z = network.solve(current)
        return z + sigma * torch.randn(z.shape, generator=generator, dtype=z.dtype)

    return solve


@pytest.mark.parametrize(
    "stencil", [tep.Stencil.one_sided(0.003), tep.Stencil.symmetric(0.03), tep.Stencil.richardson(0.1)]
)
def test_intervals_cover_the_exact_gradient(stencil):
    network = Springs(batch=4, n=3)
    sigma = 1e-4 if stencil.order == 1 else 1e-3
    exact, exact_x = network.reference("ift")
    inside, inside_x, runs = 0, 0, 200
    for run in range(runs):
        reports = []
        z = tep.attach_equilibrium(
            noisy(network, sigma, run),
            network.force,
            network.theta,
            network.x,
            stencil=stencil,
            repeats=4,
            writer=reports.append,
        )
        gradient, gradient_x = torch.autograd.grad(network.loss(z), (network.theta, network.x))
        half, half_x = reports[0].interval(0.95)
        inside += ((gradient - exact).abs() <= half).double().mean().item()
        inside_x += ((gradient_x - exact_x).abs() <= half_x).double().mean().item()
    assert 0.90 <= inside / runs <= 0.98
    assert 0.90 <= inside_x / runs <= 0.98


def test_the_amplitude_follows_the_measured_noise(network):
    def run(sigma):
        reports = []
        z = tep.attach_equilibrium(
            noisy(network, sigma, 0), network.force, network.theta, network.x, repeats=8, writer=reports.append
        )
        network.loss(z).backward()
        return reports[0]

    quiet, loud = run(1e-8), run(1e-5)
    relative = math.sqrt(network.x.numel()) * 1e-5 / float(network.solve(torch.zeros(())).norm())
    assert loud.noise == pytest.approx(relative, rel=0.3)
    assert loud.beta / quiet.beta == pytest.approx(10, rel=0.3)  # third root of a thousand
    assert loud.signal_to_noise > 3


def mean_error(network, sigma, **options):
    exact = network.reference("ift")[0]
    errors = []
    for seed in range(20):
        z = tep.attach_equilibrium(noisy(network, sigma, seed), network.force, network.theta, network.x, **options)
        errors.append(relative_error(torch.autograd.grad(network.loss(z), network.theta)[0], exact))
    return sum(errors) / len(errors)


def test_the_automatic_amplitude_is_near_the_best(network):
    automatic = mean_error(network, 1e-4, repeats=4)
    amplitudes = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    best = min(mean_error(network, 1e-4, repeats=4, stencil=tep.Stencil.symmetric(beta)) for beta in amplitudes)
    assert automatic < 4 * best


def test_repeats_average():
    network, stencil = Springs(), tep.Stencil.symmetric(0.05)
    once, often = (mean_error(network, 1e-3, stencil=stencil, repeats=repeats) for repeats in (1, 16))
    assert often == pytest.approx(once / 4, rel=0.35)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"repeats": 0},
        {"repeats": 1.5},
        {"retries": -1},
        {"timeout": 0},
        {"executor": "fork"},
        {"workers": 0},
        {"scale": "relatve"},
        {"noise": -1.0},
        {"stencil": "symetric"},
        {"metric": "auto"},
    ],
)
def test_options_are_checked(network, options):
    with pytest.raises(InvalidOptionError):
        network.gradients(**options)


def test_contours_are_refused(network):
    with pytest.raises(NotHolomorphicError, match="richardson"):
        network.gradients(stencil=tep.Stencil.contour(0.1))


def test_arguments_are_checked(network):
    with pytest.raises(InvalidOptionError):
        tep.attach_equilibrium(3, network.force, network.theta)
    with pytest.raises(InvalidOptionError):
        tep.attach_equilibrium(network.solve, 3, network.theta)
    with pytest.raises(InvalidOptionError, match="rows"):
        tep.attach_equilibrium(network.solve, network.force, network.theta, batched=False)
    with pytest.raises(MapContractError, match="force returned"):
        tep.attach_equilibrium(network.solve, lambda z, theta, x: z.sum(), network.theta, network.x)
    for metric in (torch.zeros(5), lambda z: None):
        with pytest.raises(InvalidOptionError, match="metric"):
            network.gradients(metric=metric)


def test_parameters_that_changed_in_between(network):
    z = tep.attach_equilibrium(network.solve, network.force, network.theta, network.x)
    with torch.no_grad():
        network.theta.mul_(0.5)
    with pytest.raises(MapChangedError):
        network.loss(z).backward()


def test_a_cotangent_that_is_not_finite(network):
    z = tep.attach_equilibrium(network.solve, network.force, network.theta, network.x)
    with pytest.raises(NonFiniteError):
        (z * math.inf).sum().backward()


def test_a_state_that_cannot_move(network):
    z = tep.attach_equilibrium(
        lambda current: torch.ones(3, 5).double(), network.force, network.theta, network.x, scale="response"
    )
    with pytest.raises(InvalidOptionError, match="no force"):
        z.sum().backward()
