"""A law that is not that of the system is refused, whatever is wrong with it; one that is, is never."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Network
from problems import relative_error

import torchdeq_ep as tep
from torchdeq_ep.errors import ConvergenceWarning, EPError, InvalidOptionError, LawMismatchError, TruncationWarning

# --- what is refused -------------------------------------------------------------------------------------------------


def stops_early(network, tol):
    """A fixed point iteration from a random start, until it moves by less than a part of the state."""
    generator = torch.Generator().manual_seed(0)
    theta, x = network.theta.detach(), network.x.detach()

    def solve(current):
        z, step = torch.randn(x.shape, generator=generator, dtype=x.dtype), math.inf
        while step > tol:
            before, z = z, network.map(z, theta, x) + current
            step = float((z - before).norm() / z.norm())
        return z

    return solve


def times(factor):
    return lambda network: lambda z, theta, x: factor * network.force(z, theta, x)


def other_parameters(network):
    return lambda z, theta, x: network.force(z, 1.3 * theta, x)


def other_input(network):
    return lambda z, theta, x: network.force(z, theta, -x)


def right(network):
    return network.force


def honest(network):
    return network.solve


FAULTS = {
    "sign": (times(-1), honest, r"force has the wrong sign\. Return -F"),
    "large unit": (times(1000), honest, r"in units 1000 times those of the current\. Divide it by 1000"),
    "small unit": (times(1e-3), honest, r"in units 0\.001 times those of the current\. Divide it by 0\.001"),
    "unit and sign": (times(-50), honest, r"in units 50 times .* and has the wrong sign\. Divide it by -50"),
    "ignored": (right, lambda network: lambda current: network.solve(0 * current), "solve ignores the current"),
    "parameters": (other_parameters, honest, "has other parameters"),
    "input": (other_input, honest, "has other parameters"),
    "unconverged": (right, lambda network: stops_early(network, 1e-3), "solve has not converged"),
    "not finite": (lambda network: lambda z, theta, x: network.force(z, theta, x) / 0, honest, "not finite"),
}


@pytest.mark.parametrize("stencil", ["one-sided", "symmetric", "richardson"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(network, fault, stencil):
    law, solver, words = FAULTS[fault]
    z = tep.attach_equilibrium(solver(network), law(network), network.theta, network.x, stencil=stencil)
    with pytest.raises(LawMismatchError, match=f"Likeliest: .*{words}.*check=False"):
        network.loss(z).backward()
    assert network.theta.grad is None


def test_it_is_an_error_of_this_package_and_one_of_running():
    assert issubclass(LawMismatchError, EPError)
    assert issubclass(LawMismatchError, RuntimeError)


@pytest.mark.parametrize("scale", ["absolute", "response"])
@pytest.mark.parametrize("fault", ["sign", "large unit", "small unit"])
def test_a_fault_is_named_at_any_scale(network, fault, scale):
    law, solver, words = FAULTS[fault]
    options = {"scale": scale, "stencil": tep.Stencil.symmetric(1e-3)}
    z = tep.attach_equilibrium(solver(network), law(network), network.theta, network.x, **options)
    with pytest.raises(LawMismatchError, match=words):
        network.loss(z).backward()


def test_what_the_faults_did_to_the_gradient(network):
    """Without the check: what it is there for."""
    exact = network.reference("ift")[0].flatten()

    def gradient(fault):
        law, solver, _ = FAULTS[fault]
        z = tep.attach_equilibrium(solver(network), law(network), network.theta, network.x, check=False)
        return torch.autograd.grad(network.loss(z), network.theta)[0].flatten()

    assert torch.cosine_similarity(gradient("sign"), exact, 0) < -0.999
    assert gradient("large unit").norm() > 900 * exact.norm()
    assert not gradient("ignored").any()
    assert relative_error(gradient("unconverged"), exact) > 1


def test_a_fault_is_seen_through_noise(network):
    generator = torch.Generator().manual_seed(0)

    def solve(current):
        z = network.solve(current)
        return z + 1e-3 * torch.randn(z.shape, generator=generator, dtype=z.dtype)

    for fault in ("sign", "large unit"):
        law, _, words = FAULTS[fault]
        z = tep.attach_equilibrium(solve, law(network), network.theta, network.x, repeats=4)
        with pytest.raises(LawMismatchError, match=words):
            network.loss(z).backward()


def test_a_solver_whose_tolerance_is_said_is_not_refused(network):
    reports = []
    z = tep.attach_equilibrium(
        stops_early(network, 1e-3), network.force, network.theta, network.x, noise=3e-3, writer=reports.append
    )
    gradient = torch.autograd.grad(network.loss(z), network.theta)[0]
    assert relative_error(gradient, network.reference("ift")[0]) < 0.1
    assert reports[0].law_residual > 1e-3


def test_a_free_state_that_is_nearly_an_equilibrium_is_warned_of(network):
    theta, x = network.theta.detach(), network.x.detach()

    def solve(current):
        z = torch.zeros_like(x)
        for _ in range(3):
            z = network.map(z, theta, x) + current
        return z

    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x)
    with pytest.warns(ConvergenceWarning, match="of its norm"):
        network.loss(z).backward()


def test_cut_off_readings_are_warned_of_and_not_blamed_on_the_law(network):
    rest = network.solve(torch.zeros(()))
    limit, reports = 0.01 * float(rest.norm()), []

    def solve(current):
        return rest + (network.solve(current) - rest).clamp(-limit, limit)

    options = {"scale": "response", "stencil": tep.Stencil.symmetric(0.07), "writer": reports.append}
    z = tep.attach_equilibrium(solve, network.force, network.theta, network.x, **options)
    with pytest.warns(TruncationWarning, match="cut off"):
        network.loss(z).backward()
    assert reports[0].law_residual > 0.1
    z = tep.attach_equilibrium(solve, FAULTS["sign"][0](network), network.theta, network.x, **options)
    with pytest.warns(TruncationWarning), pytest.raises(LawMismatchError):
        network.loss(z).backward()


# --- what it costs, and what it says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("check", "solves"), [(True, 3), (False, 3), ("reciprocity", 5)])
def test_the_law_is_tested_without_another_solve(network, check, solves):
    calls, reports, laws = [], [], []

    def solve(current):
        calls.append(current)
        return network.solve(current)

    def force(z, theta, x):
        laws.append(torch.is_grad_enabled())
        return network.force(z, theta, x)

    before = torch.random.get_rng_state()
    z = tep.attach_equilibrium(solve, force, network.theta, network.x, check=check, writer=reports.append)
    network.loss(z).backward()
    assert len(calls) == reports[0].calls == solves
    assert laws == ([True] if check is False else [True, False, False, False])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert math.isnan(reports[0].law_residual) == math.isnan(reports[0].free_residual) == (check is False)
    assert math.isnan(reports[0].reciprocity) == (check != "reciprocity")


def test_the_report_has_the_numbers(network):
    reports = []
    z = tep.attach_equilibrium(network.solve, network.force, network.theta, network.x, writer=reports.append)
    network.loss(z).backward()
    z = tep.attach_equilibrium(
        network.solve, lambda z, t, x: 1.05 * network.force(z, t, x), network.theta, network.x, writer=reports.append
    )
    network.loss(z).backward()
    z = tep.attach_equilibrium(network.solve, times(-1)(network), network.theta, network.x, writer=reports.append)
    with pytest.raises(LawMismatchError):
        network.loss(z).backward()
    assert reports[0].law_residual < 1e-6
    assert [report.law_residual for report in reports[1:]] == pytest.approx([0.05, 2.0], rel=1e-4)
    assert all(report.free_residual < 1e-9 and report.law_noise < 1e-6 for report in reports)


def test_a_law_of_what_is_trained_alone_is_allowed_without_the_check(network):
    def part(z, theta, x):
        return torch.tanh(z @ theta.T) @ theta

    def gradient(**options):
        z = tep.attach_equilibrium(network.solve, part, network.theta, network.x, **options)
        return torch.autograd.grad(network.loss(z), network.theta)[0]

    assert relative_error(gradient(check=False), network.reference("ift")[0]) < 1e-9
    with pytest.raises(LawMismatchError, match="check=False"):
        gradient()


@pytest.mark.parametrize("check", ["law", "reciprocal", 1.5, None])
def test_other_checks_are_refused(network, check):
    with pytest.raises(InvalidOptionError, match="check"):
        network.gradients(check=check)


# --- false alarms ----------------------------------------------------------------------------------------------------

STENCILS = {
    "one-sided": tep.Stencil.one_sided,
    "symmetric": tep.Stencil.symmetric,
    "richardson": tep.Stencil.richardson,
}
INSTRUMENTS = {
    "exact": {"repeats": 1},
    "a little noisy": {"repeats": 2, "noise": 1e-6},
    "noisy": {"repeats": 4, "noise": 1e-3},
    "very noisy": {"repeats": 2, "noise": 0.1},
    "common noise": {"repeats": 3, "noise": 1e-2, "common": True},
    "converter": {"repeats": 1, "step": 1e-3},
    "coarse converter": {"repeats": 2, "step": 3e-2},
}


class Stiff:
    """`F = x - K z - z^3 / 5` with stiffnesses over decades, solved by Newton's method in the dtype of the current."""

    def __init__(self, seed, dtype, decades, n=4):
        self.generator = torch.Generator().manual_seed(seed)
        vectors = torch.linalg.qr(self.randn(n, n))[0]
        matrix = vectors * torch.logspace(*decades, n, dtype=torch.float64) @ vectors.T
        self.theta = (0.5 * (matrix + matrix.T)).to(dtype).requires_grad_()
        self.x, self.target = self.randn(n).to(dtype), self.randn(n)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def force(self, z, theta, x):
        return x - theta @ z - z**3 / 5

    def solve(self, current):
        theta, added = self.theta.detach(), self.x + current
        z = torch.zeros_like(self.x)
        for _ in range(40):
            step = torch.linalg.solve(theta + torch.diag(0.6 * z**2), added - theta @ z - z**3 / 5)
            z = z + step * min(1.0, 1 / max(float(step.abs().max()), 1e-9))
        return z

    def report(self, stencil, scale, repeats, noise=0.0, common=False, step=0.0, **options):
        """That of a backward pass on an instrument with noise or a converter."""
        rest = self.solve(torch.zeros_like(self.x))
        size = float(rest.norm()) / len(rest) ** 0.5
        shape, reports = self.randn(len(rest)), []

        def instrument(current):
            z = self.solve(current.expand(self.x.shape))
            if noise:
                z = z + (noise * size * (self.randn(1) * shape if common else self.randn(len(z)))).to(z)
            return (z / (step * size)).round() * (step * size) if step else z

        z = tep.attach_equilibrium(
            instrument,
            self.force,
            self.theta,
            self.x,
            stencil=stencil,
            scale=scale,
            repeats=repeats,
            noise=step or None,
            writer=reports.append,
            **options,
        )
        (z - self.target.to(z)).square().sum().backward()
        return reports[0]


@pytest.mark.parametrize("scale", ["relative", "response", "absolute"])
@pytest.mark.parametrize("decades", [(0, 0.5), (-3, 0), (0, 3), (-3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")  # of very noisy readings
def test_no_false_alarm(dtype, decades, scale):
    for (_, stencil), options in itertools.product(STENCILS.items(), INSTRUMENTS.values()):
        Stiff(0, dtype, decades).report(stencil("auto"), scale, **options)  # an error, or a warning, would be raised


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    noise=st.floats(-7, -1).map(lambda power: 10**power),
    repeats=st.integers(2, 6),
    low=st.floats(-3, 0),
    high=st.floats(0, 3),
    beta=st.one_of(st.just("auto"), st.floats(-4, -1).map(lambda power: 10**power)),
    stencil=st.sampled_from(sorted(STENCILS)),
    scale=st.sampled_from(["relative", "response", "absolute"]),
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.TruncationWarning")
def test_noise_that_repeats_show_is_no_false_alarm(seed, noise, repeats, low, high, beta, stencil, scale):
    try:
        Stiff(seed, torch.float64, (low, high)).report(STENCILS[stencil](beta), scale, repeats, noise)
    except InvalidOptionError:
        assert scale == "response"  # no force was found that is seen through the noise


# --- the rounding of the solver --------------------------------------------------------------------------------------


def float32_inside(single, double):
    return lambda current: single.solve(current.float()).numpy().astype(np.float64)


def float32_sum(single, double):
    return lambda current: double.solve((single.x.detach() + current.float()).double() - double.x.detach()).numpy()


def float32_answer(single, double):
    return lambda current: double.solve(current.double()).float()


@pytest.mark.parametrize("inputs", ["single", "double"])
@pytest.mark.parametrize("solver", [float32_inside, float32_sum, float32_answer])
def test_the_coarser_dtype_decides_the_amplitude(solver, inputs):
    """Before: 4e-3 for a solver in float32 that answers in float64, 1e-3 for one in float64 that answers in float32."""
    torch.manual_seed(0)
    single, double = Network(torch.float32), Network()
    double.theta, double.x = (t.detach().double().requires_grad_() for t in (single.theta, single.x))
    if inputs == "double" and solver is not float32_answer:
        pytest.skip("nothing says that the solver computes in float32")
    network, reports = {"single": single, "double": double}[inputs], []
    z = tep.attach_equilibrium(solver(single, double), network.force, network.theta, network.x, writer=reports.append)
    gradient = torch.autograd.grad(network.loss(z), network.theta)[0]
    assert reports[0].noise == torch.finfo(torch.float32).eps
    assert relative_error(gradient.double(), double.reference("ift")[0]) < 3e-5
