"""No state is returned that is not a stable equilibrium, unless it is said."""

import collections
import copy
import math
import pickle
import warnings

import pytest
import torch
from physics_problems import grid, random_network

import torchdeq_ep as tep
import torchdeq_ep_physics as physics
from torchdeq_ep.errors import EPWarning, InvalidOptionError
from torchdeq_ep_physics import recipes

pytestmark = pytest.mark.usefixtures("in_double")


def jacobians(network, z, x):
    theta = {name: value.detach() for name, value in network.physical().items()}
    return [
        torch.func.jacrev(lambda state, given=given: network.force(state[None], theta, given[None])[0])(state)
        for state, given in zip(z, x, strict=True)
    ]


def said(network, x, **options):
    """What is returned, or nothing, and the names of the errors and warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            z = network.equilibrium(x, **options)
        except physics.NoEquilibriumError:
            return None, {"NoEquilibriumError"}
    return z, {type(warning.message).__name__ for warning in seen}


def check_random_problems(kind, seeds, solver="newton"):
    counts = collections.Counter()
    for seed in seeds:
        network, x = random_network(kind, seed)
        network.solver, network.max_iter = solver, 100
        z, names = said(network, x)
        if z is None:
            counts["raised"] += 1
            continue
        force = network.force(z, network.physical(), x).detach().abs().amax(1)
        largest = network.largest_term(z, network.physical(), x).detach()
        is_off = bool((force > 1e-3 * largest).any())
        growth = torch.stack([torch.linalg.eigvals(matrix).real.max() for matrix in jacobians(network, z, x)])
        is_unstable = bool((growth > 1e-6 * network.stiffness(z, network.physical(), x).detach().mean()).any())
        assert not is_off or names, (kind, seed)
        assert not is_unstable or "UnstableStateWarning" in names, (kind, seed)
        counts["said" if names else "silent"] += 1
    return counts


@pytest.mark.parametrize("kind", ["hopfield", "xy", "kuramoto", "lag"])
def test_no_random_network_returns_what_is_no_stable_equilibrium_unsaid(kind):
    counts = check_random_problems(kind, range(12))
    assert counts["silent"] >= 3, counts
    if kind in ("hopfield", "xy"):  # a bounded energy has a minimum, and it is found
        assert counts["silent"] == 12, counts


@pytest.mark.parametrize("solver", ["anderson", "fixed_point_iter"])
@pytest.mark.parametrize("kind", ["hopfield", "xy", "kuramoto"])
def test_solvers_of_torchdeq_are_checked_too(kind, solver):
    counts = check_random_problems(kind, range(8), solver)
    assert counts["raised"] + counts["said"] > 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hopfield", "xy", "kuramoto"])
def test_a_thousand_random_networks(kind):
    counts = check_random_problems(kind, range({"hopfield": 334, "xy": 333, "kuramoto": 333}[kind]))
    if kind != "kuramoto":
        assert counts["silent"] >= 333, counts
    assert counts["silent"] >= 100, counts


def test_oscillators_that_do_not_lock_are_an_error_or_on_request_a_warning():
    coupling = 0.1 * (torch.ones(3, 3) - torch.eye(3))
    network = physics.OscillatorNetwork(coupling, torch.zeros(3, 1), torch.tensor([-1.0, 0.0, 1.0]))
    with pytest.raises(physics.NoEquilibriumError, match="do not lock"):
        network(torch.zeros(2, 1))
    assert not network.last.is_equilibrium.any()
    network.on_failure = "warn"
    with pytest.warns(physics.UnconvergedStateWarning, match="rows 0, 1 of 2"):
        network(torch.zeros(2, 1))


def test_a_common_rotation_is_no_instability_and_no_force():
    """Nothing pins the phases, all of which turn at one rate: the frame turns with them."""
    network = physics.OscillatorNetwork(torch.ones(4, 4), torch.zeros(4, 1), torch.tensor([0.8, 1.0, 1.1, 1.1]))
    x = torch.zeros(1, 1)
    z = network(x)
    assert network.last.is_stable.all()
    assert float(network.last.smallest_eigenvalue) > 1
    assert float(z.detach().mean()) == pytest.approx(float(network.start(x).detach().mean()), abs=1e-9)
    gradients = {}
    for network.backward in ("ift", "ep"):
        z = network(x)
        differences = (z[:, 1:] - z[:, :-1]).square().sum()
        gradients[network.backward] = torch.autograd.grad(differences, [network.coupling, network.frequency])
    for found, exact in zip(gradients["ep"], gradients["ift"], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-9)
        assert exact.norm() > 1e-3
    # Two groups that nothing joins turn at rates of their own.
    apart = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    network = physics.OscillatorNetwork(apart, torch.zeros(4, 1), torch.tensor([0.0, 0.2, 1.0, 1.3]))
    z = network.equilibrium(x)
    assert float(z[0, 1] - z[0, 0]) == pytest.approx(math.asin(0.1), abs=1e-9)


def test_a_gradient_does_not_depend_on_where_phase_zero_is():
    """All phases and inputs turned by one angle: the state is zero in one case, and far from it in the other."""
    coupling, pinning = torch.randn(5, 5).abs(), torch.rand(5, 1)
    found = []
    for turn in (0.0, 1e-9, 2.0):
        network = physics.OscillatorNetwork(coupling, pinning)
        z = network(torch.full((1, 1), turn))
        found.append(torch.autograd.grad((z * torch.arange(5.0)).sum(), network.frequency)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)


def two_patterns(n=60):
    patterns = torch.sign(torch.randn(2, n, generator=torch.Generator().manual_seed(1)))
    return patterns, physics.HopfieldNetwork(2.0 * patterns.T @ patterns / n)


def overlap(z, pattern):
    return float((torch.tanh(z) * pattern).mean())


@pytest.mark.parametrize("strength", [1e-1, 1e-3, 1e-6])
def test_a_weak_cue_recalls_its_pattern(strength):
    patterns, network = two_patterns()
    cue = patterns[0].clone()
    cue[:15] *= -1  # a quarter of it wrong
    z = network.equilibrium(strength * cue[None])
    assert overlap(z, patterns[0]) > 0.9
    assert network.last.is_stable.all()


def test_no_cue_at_all_leaves_the_saddle():
    _, network = two_patterns()
    z = network.equilibrium(torch.zeros(1, 60))
    assert network.last.escapes == 1
    assert network.last.is_stable.all()
    assert z.abs().min() > 0.1


def test_an_unstable_state_of_another_solver_is_said():
    _, network = two_patterns()
    network.solver = "fixed_point_iter"
    with pytest.warns(physics.UnstableStateWarning, match="row 0 of 1"):
        z = network.equilibrium(torch.zeros(1, 60))
    assert float(z.abs().max()) == 0.0
    assert float(network.last.smallest_eigenvalue) == pytest.approx(-1.0, abs=0.5)


def test_an_amplifier_loop_without_a_stable_operating_point_is_said():
    """Positive feedback beyond what the resistors take away, without a diode to end it."""
    network = physics.ResistiveNetwork(
        2,
        1,
        [(0, 3), (1, 3), (0, 2)],
        torch.tensor([1e-3, 1e-3, 1e-3]),
        amplifiers=[((0, 3), (1, 3)), ((1, 3), (0, 3))],
        transconductance=torch.tensor([5e-3, 5e-3]),
    )
    z, names = said(network, torch.ones(1, 1))
    assert names, z
    network.log_transconductance.data -= 3.0
    z, names = said(network, torch.ones(1, 1))
    assert not names
    assert network.last.is_stable.all()


def test_annealing_leaves_a_local_minimum():
    """A ring of phases that turns once around is a minimum of the energy; the lowest one does not turn."""
    ring = torch.roll(torch.eye(16), 1, 0)
    coupling, pinning, x = ring + ring.T, 1e-3 * torch.ones(16, 1), torch.zeros(8, 1)
    start = torch.arange(16.0).expand(8, -1) * (2 * math.pi / 16)
    energies = []
    for annealing in (None, physics.Annealing(temperature=1.0, steps=1000)):
        network = physics.OscillatorNetwork(coupling, pinning, annealing=annealing)
        z = network.equilibrium(x, start=start)
        energies.append(network.energy(z, network.physical(), x).detach())
        assert network.last.is_stable.all()
    assert (energies[0] > -15).all()
    assert (energies[1] < -15.9).sum() >= 4
    for arguments in ((0.0,), (1.0, 0)):
        with pytest.raises(InvalidOptionError):
            physics.Annealing(*arguments)


def test_a_start_chooses_among_equilibria():
    network = physics.HopfieldNetwork(torch.tensor([[2.0]]))
    x = torch.zeros(1, 1)
    upper, lower = (network(x, start=torch.full((1, 1), side)).detach() for side in (0.5, -0.5))
    assert float(upper) == -float(lower) > 1


def test_the_report_is_that_of_the_states():
    network, x = random_network("hopfield", 3)
    z = network(x)
    report = network.last
    assert report.force.shape == report.smallest_eigenvalue.shape == (3,)
    growth = [float(torch.linalg.eigvals(matrix).real.max()) for matrix in jacobians(network, z.detach(), x)]
    torch.testing.assert_close(report.smallest_eigenvalue, -torch.tensor(growth), rtol=0.0, atol=2e-8)
    assert report.steps > 0
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other.last.force, report.force)
    large, given = grid(13)  # its smallest eigenvalue is estimated
    state = large.equilibrium(given)
    (matrix,) = jacobians(large, state, given)
    assert float(large.last.smallest_eigenvalue) == pytest.approx(-float(torch.linalg.eigvalsh(matrix).max()), rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_an_error_of_its_row(bad):
    for network, x in (random_network("hopfield", 0), random_network("xy", 1), grid(3), grid(20)):
        x = x.expand(3, -1).clone()
        x[1, 0] = bad
        with pytest.raises(physics.NoEquilibriumError, match="row 1 of 3"):
            network.equilibrium(x)


def test_single_precision_is_judged_by_its_own_rounding():
    torch.set_default_dtype(torch.float32)
    for kind in ("hopfield", "xy"):
        for seed in range(4):
            network, x = random_network(kind, seed)
            z, names = said(network, x)
            assert z.dtype == torch.float32
            assert not names


def test_a_nudge_beyond_the_linear_range_is_solved_too():
    """A gradient at a large amplitude: its nudged states are equilibria, though far from where the factor is of."""
    network = physics.OscillatorNetwork(0.3 * torch.randn(6, 6), torch.rand(6, 3) + 1)
    x, cotangent = torch.randn(4, 3), torch.randn(4, 6)
    found = {}
    for beta in (0.1, 1e-4):
        network.backward = f"ep:beta={beta}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EPWarning)
            z = network(x)
            found[beta] = torch.autograd.grad((z * cotangent).sum(), network.frequency)[0]
    difference = float((found[0.1] - found[1e-4]).norm() / found[1e-4].norm())
    assert 1e-6 < difference < 1


def test_options_are_checked():
    with pytest.raises(InvalidOptionError, match="on_failure"):
        physics.HopfieldNetwork(torch.eye(2), on_failure="ignore")


def test_an_elastic_network_of_thousands_of_nodes():
    network, _ = recipes.lattice(side=45)
    x = network.positions[None, network.n_free : network.n_free + 1] + torch.tensor([0.2, 0.05])
    z = network(x)
    assert z.shape == (1, 3958)
    assert network.last.is_stable.all()
    gradients = {}
    for network.backward in ("ift", "ep"):
        (gradients[network.backward],) = torch.autograd.grad(network(x).square().sum(), network.log_stiffness)
    assert (gradients["ep"] - gradients["ift"]).norm() < 1e-4 * gradients["ift"].norm()


@pytest.mark.parametrize("side", [4, 12])
def test_the_matrix_of_an_elastic_network_is_that_of_its_force(side):
    network, _ = recipes.lattice(side=side)
    x = network.positions[None, network.n_free : network.n_free + 1] + torch.tensor([0.2, 0.05])
    z = network.start(x) + 0.05 * torch.randn(1, network.n_states)
    theta = {name: value.detach() for name, value in network.physical().items()}
    r = torch.randn(1, network.n_states)
    (jacobian,) = jacobians(network, z, x)
    shift = torch.full_like(r, 10.0)
    expected = torch.linalg.solve(10 * torch.eye(network.n_states) - jacobian, r[0])
    found = network.stiffness_matrix(z, theta, x).factor(shift).solve(r)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_black_box_nudges_are_checked_too():
    network, x = random_network("xy", 2)
    theta = network.physical()
    z = tep.attach_equilibrium(lambda current: network.equilibrium(x, current, theta), network.force, theta, x)
    torch.autograd.grad(z.sum(), network.coupling)
    assert network.last.is_stable.all()
    assert (network.last.force < 1e-9).all()
