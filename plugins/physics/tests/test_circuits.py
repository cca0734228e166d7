"""Circuits: the law of their diodes, their size, and how their matrices are solved."""

import math
import subprocess
import time

import numpy as np
import pytest
import torch
from physics_problems import grid, needs_ngspice

import torchdeq_ep_physics as physics
from torchdeq_ep.errors import InvalidOptionError

pytestmark = pytest.mark.usefixtures("in_double")


# --- law -------------------------------------------------------------------------------------------------------------

LAWS = [(1e-26, 1.0), (1e-26, 2.0), (1e-20, 1.0), (1e-14, 1.5), (1e-6, 1.0), (1e-6, 2.0)]
CELSIUS = [-40.0, 27.0, 85.0]


def driven(saturation, ideality, temperature=27.0, ohms=1e3):
    """One diode from a node to ground, and a resistor from the node to a source."""
    return physics.ResistiveNetwork(
        1,
        1,
        [(0, 1)],
        torch.tensor([1 / ohms]),
        diodes=[(0, 2)],
        saturation=saturation,
        ideality=ideality,
        temperature=temperature,
    )


def bisected(network, volts, ohms):
    """The voltage of the node by bisection of Kirchhoff's law in plain floats, by the logarithm of the current."""
    law = network.diode_law
    low, high = 0.0, volts
    for _ in range(200):
        v = (low + high) / 2
        through = (volts - v) / ohms - physics.resistive.GMIN * v
        # The diode takes more than that if its law at v is above it: compared as logarithms, which do not overflow.
        takes_more = through <= 0 or v / law.slope > math.log1p(through / law.saturation)
        low, high = (low, v) if takes_more else (v, high)
    return low


@pytest.mark.parametrize("temperature", CELSIUS)
@pytest.mark.parametrize(("saturation", "ideality"), LAWS)
@pytest.mark.parametrize(("volts", "ohms"), [(5.0, 1e3), (0.3, 1e6), (1e3, 1.0), (1e5, 1e-2)])
def test_the_law_of_a_diode_is_exact_under_any_drive(saturation, ideality, temperature, volts, ohms):
    network = driven(saturation, ideality, temperature, ohms)
    z = network(torch.tensor([[volts]]))
    expected = bisected(network, volts, ohms)
    assert z.item() == pytest.approx(expected, rel=1e-9)
    (found,) = torch.autograd.grad(z.sum(), network.log_conductance)
    law, v = network.diode_law, expected
    through = (volts - v) / ohms
    slope = (through - physics.resistive.GMIN * v + law.saturation) / law.slope + physics.resistive.GMIN
    assert found.item() == pytest.approx(through / (1 / ohms + slope), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("saturation", [1e-30, 1e-26, 1e-12, 1e-3])
def test_no_voltage_overflows(saturation, dtype):
    law = physics.DiodeLaw.at(saturation, 1.0)
    v = torch.tensor([-1e6, -5.0, -0.1, 0.0, 0.5, 5.0, 1e3, 1e6], dtype=dtype)
    for value in (law.current(v), law.conductance(v), law.content(v)):
        assert torch.isfinite(value).all()
        assert value.dtype == dtype


@pytest.mark.parametrize("saturation", [1e-20, 1e-6])
def test_current_conductance_and_content_are_derivatives_of_each_other(saturation):
    law = physics.DiodeLaw.at(saturation, 1.3, temperature=60.0)
    knee = -3 * law.slope
    v = torch.tensor([-2.0, 3 * knee, knee - 1e-9, knee + 1e-9, 0.0, 0.4, 30.0, 50.0], requires_grad=True)
    for function, derivative in ((law.content, law.current), (law.current, law.conductance)):
        (slope,) = torch.autograd.grad(function(v).sum(), v)
        torch.testing.assert_close(slope, derivative(v), rtol=1e-9, atol=1e-30)
    step = 1e-7 * law.slope
    across = law.content(torch.tensor([knee + step])) - law.content(torch.tensor([knee - step]))
    assert float(across) == pytest.approx(2 * step * float(law.current(torch.tensor([knee]))), rel=1e-4)


def test_two_diodes_in_series_between_rails():
    """Nothing but diodes holds the node, so their currents, 1e13 amperes, are what balances: they too obey the law."""
    network = physics.ResistiveNetwork(
        1,
        1,
        [(0, 1)],
        torch.tensor([1e-6]),
        diodes=[(3, 0), (0, 4), (0, 4)],
        rails=(0.0, 3.0, 0.0),
        saturation=1e-12,
        ideality=1.0,
    )
    z = network(torch.zeros(1, 1))
    assert z.item() == pytest.approx(1.5 - network.diode_law.slope * math.log(2) / 2, abs=1e-12)


@needs_ngspice
@pytest.mark.parametrize("temperature", CELSIUS)
@pytest.mark.parametrize(("saturation", "ideality"), LAWS)
def test_the_twin_is_ngspice_at_any_temperature(saturation, ideality, temperature, tmp_path):
    drives, ohms = [5.0, 0.7, -1.0, -0.1, 200.0], [1e3, 1e3, 1e4, 1e6, 10.0]
    lines = [
        "* diodes",
        f".options temp={temperature} tnom=27 reltol=1e-9 vntol=1e-12 abstol=1e-16 gmin=1e-12 itl1=2000",
    ]
    for k, (volts, resistance) in enumerate(zip(drives, ohms, strict=True)):
        lines += [f"V{k} in{k} 0 {volts}", f"R{k} in{k} n{k} {resistance}", f"D{k} n{k} 0 d"]
    lines += [f".model d D(IS={saturation} N={ideality})", ".control", "set numdgt=14", "op"]
    lines += [f"print v(n{k})" for k in range(len(drives))] + ["quit", ".endc", ".end", ""]
    path = tmp_path / "diodes.cir"
    path.write_text("\n".join(lines))
    done = subprocess.run(["ngspice", "-n", "-b", str(path)], capture_output=True, text=True, timeout=60)
    found = [float(line.split("=")[1]) for line in done.stdout.splitlines() if line.startswith("v(n")]
    assert len(found) == len(drives), done.stdout + done.stderr
    for volts, resistance, expected in zip(drives, ohms, found, strict=True):
        z = driven(saturation, ideality, temperature, resistance).equilibrium(torch.tensor([[volts]]))
        assert z.item() == pytest.approx(expected, abs=1e-4)


@needs_ngspice
@pytest.mark.parametrize("temperature", CELSIUS)
def test_the_netlist_of_a_network_has_its_temperature(temperature):
    network, x = driven(1e-12, 1.5, temperature, 1e3), torch.tensor([[2.0]])
    found = physics.Ngspice(network, x)(torch.zeros(1, 1))
    assert network.equilibrium(x).item() == pytest.approx(found.item(), abs=1e-6)


# --- size ------------------------------------------------------------------------------------------------------------


def gradient(network, x, backward):
    network.backward = backward
    z = network(x)
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad((z * cotangent).sum(), network.log_conductance)[0]


@pytest.mark.parametrize("side", [30, 45])
def test_ep_is_exact_in_large_circuits(side):
    network, x = grid(side)
    exact = gradient(network, x, "ift")
    assert (gradient(network, x, "ep") - exact).norm() < 1e-6 * exact.norm()  # asked for: 1e-4
    assert (network.last.force < 1e-9).all()


@pytest.mark.parametrize("amplification", [0.0, 0.5])
def test_sparse_and_dense_matrices_are_the_same(amplification):
    network = physics.ResistiveNetwork.layered(12, 30, 8, amplification=amplification)
    x = 2 * torch.randn(3, 12)
    found = []
    for is_dense in (True, False):
        network._assembly.is_dense = network._is_full = is_dense
        found.append((network.equilibrium(x), gradient(network, x, "ift"), network.last.smallest_eigenvalue))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0.05, atol=0.0)


@pytest.mark.parametrize(("saturation", "ideality"), LAWS)
@pytest.mark.parametrize("conductance", [1e-6, 1e-3, 10.0])
def test_the_search_for_an_operating_point_takes_few_steps(monkeypatch, saturation, ideality, conductance):
    """Diodes go no further in a step than their resistors can drive them, so that no step has to be shortened."""
    made = torch.Generator().manual_seed(0)
    options = {"spread": 2.0, "saturation": saturation, "ideality": ideality, "generator": made}
    network = physics.ResistiveNetwork.layered(60, 20, 5, conductance=conductance, **options)
    x = 10 * torch.randn(20, 60, generator=made)
    network.equilibrium(x)
    assert network.last.steps <= 12
    if saturation < 1e-12:  # others conduct at once
        limited = network.last.steps
        monkeypatch.setattr(physics.ResistiveNetwork, "limited", physics.PhysicalSystem.limited)
        network.equilibrium(x)
        assert network.last.steps > limited


def test_a_diode_that_does_not_conduct_is_not_limited():
    law = physics.DiodeLaw.at(1e-12, 1.0)
    v = torch.tensor([-5.0, 0.0, 0.2, 0.6])
    shares = law.within_reach(v, torch.tensor([5.2, 0.2, -3.0, 5.0]), torch.tensor(1e-4))
    assert shares[:3].tolist() == [1.0, 1.0, 1.0]
    assert 0 < shares[3] < 0.1
    assert law.within_reach(v, torch.zeros(4), torch.tensor(torch.inf)).tolist() == [1.0] * 4


def test_the_energy_is_the_heat_of_half_its_resistors_and_the_content_of_its_diodes():
    network = physics.ResistiveNetwork(
        2, 2, [(0, 1), (0, 2), (1, 3), (2, 3), (2, 4), (4, 5)], torch.rand(6), diodes=[(0, 4)], rails=(0.0, 2.0)
    )
    x, z = torch.randn(3, 2), torch.randn(3, 2)
    u = network.potentials(z, x)
    siemens = network.physical()["conductance"].tolist()
    heat = sum(g * (u[:, a] - u[:, b]) ** 2 for (a, b), g in zip(network.resistors, siemens, strict=True))
    expected = heat / 2 + network.diode_law.content(u[:, 0])
    for network._is_full in (True, False):
        torch.testing.assert_close(network.energy(z, network.physical(), x).detach(), expected)


def test_the_largest_current_of_a_large_circuit_is_bounded_from_below(monkeypatch):
    network, x = physics.ResistiveNetwork.layered(20, 30, 8), torch.randn(4, 20)
    z = 0.3 * torch.randn(4, network.n_states)
    monkeypatch.setattr(physics.DiodeLaw, "current", lambda law, v: 0 * v)
    exact = network.largest_term(z, network.physical(), x).detach()
    monkeypatch.setattr(physics.resistive, "_MANY", 0)
    bound = network.largest_term(z, network.physical(), x).detach()
    assert (bound < exact).all()
    assert (bound > 1e-3 * exact).all()


def test_the_gradient_is_that_of_finite_differences():
    network, x = grid(18)
    cotangent = torch.randn(1, network.n_states)
    (found,) = torch.autograd.grad((network(x) * cotangent).sum(), network.log_conductance)
    direction, step = torch.randn_like(found), 1e-5
    values = []
    for sign in (1, -1):
        theta = {"conductance": (network.log_conductance + sign * step * direction).exp()}
        values.append(float((network.equilibrium(x, theta=theta) * cotangent).sum()))
    assert float((found * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def seconds(action):
    before = time.process_time()
    action()
    return time.process_time() - before


def free_and_backward(network, x):
    (network(x) * torch.arange(1.0, network.n_states + 1)).sum().backward()


@pytest.mark.slow
def test_time_grows_more_slowly_than_the_power_of_1_6():
    sides, times = (22, 32, 45, 63, 89), []
    for side in sides:
        network, x = grid(side)
        times.append(min(seconds(lambda network=network, x=x: free_and_backward(network, x)) for _ in range(3)))
    exponent = np.polyfit(np.log([side**2 for side in sides]), np.log(times), 1)[0]
    assert exponent < 1.6, times


@pytest.mark.slow
def test_a_circuit_of_ten_thousand_nodes():
    network, x = grid(100)
    exact = gradient(network, x, "ift")
    assert network.n_states == 10_000
    assert float(network.last.force) < 1e-9
    assert network.last.is_stable.all()
    assert (gradient(network, x, "ep") - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.slow
@needs_ngspice
@pytest.mark.parametrize(("size", "share"), [("layered", 0.5), ("grid", 1.0)])
def test_the_twin_is_faster_than_ngspice(size, share):
    """Free phase and backward pass, against ngspice's free states alone."""
    if size == "grid":
        network, x = grid(45)
    else:
        network, x = physics.ResistiveNetwork.layered(400, 100, 20), 2 * torch.randn(8, 400)
    free_and_backward(network, x)
    before = time.perf_counter()
    free_and_backward(network, x)
    own = time.perf_counter() - before
    spice = physics.Ngspice(network, x)
    before = time.perf_counter()
    states = spice(torch.zeros(()))
    theirs = time.perf_counter() - before
    torch.testing.assert_close(network.equilibrium(x), states, rtol=1e-6, atol=1e-8)
    assert own < share * theirs, (own, theirs)


# --- what a circuit may not be ---------------------------------------------------------------------------------------


def test_a_floating_node_is_refused_by_name():
    one = torch.ones(2)
    with pytest.raises(InvalidOptionError, match="node 1, 2 "):
        physics.ResistiveNetwork(3, 1, [(0, 3), (1, 2)], one)
    physics.ResistiveNetwork(3, 1, [(0, 3), (1, 2)], one, diodes=[(2, 4)])  # a diode has a conductance too
    for options in ({"saturation": 0.0}, {"ideality": -1.0}, {"temperature": -300.0}):
        with pytest.raises(InvalidOptionError):
            physics.ResistiveNetwork(1, 1, [(0, 1)], torch.ones(1), **options)
