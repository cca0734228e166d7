"""A user's own netlist as a layer: what it may hold, its gradients against finite differences, what is refused."""

import copy
import math
import pickle

import pytest
import torch
from physics_problems import needs_ngspice

import torchdeq_ep as tep
import torchdeq_ep_physics as physics
from torchdeq_ep.errors import AsymmetryWarning, InvalidOptionError, MissingDependencyError
from torchdeq_ep_physics.flat_netlist import spice_value

MODELS = """* models of the process
.model QP PNP(IS=1e-15 BF=60)
"""

AMPLIFIER = """Two-transistor amplifier
.include "models.inc"
.param supply=5
.subckt stage in out vcc
Rc vcc out 4.7k
Q1 out in e QX
Re e 0 330
.model QX NPN(IS=2e-15 BF=120 VAF=60)
.ends
Vcc vcc 0 {supply}
Vin in 0 DC 0.7 AC 1
Rb in b 10k
X1 b mid vcc stage
Re2 vcc e2 1k
Q2 out mid e2 QP
Rl out 0 2.2k
.control
tran 1u 1m
plot v(out)
.endc
.tran 1u 1m
.end
"""

MIRROR = """Gate-driven MOSFETs
Vdd dd 0 3
Vin g 0 1.2
M1 out g 0 0 nch W=20u L=1u
Rl dd out 10k
M2 out2 out 0 0 nch W=10u L=1u
Rl2 dd out2 20k
.model nch NMOS(LEVEL=1 VTO=0.6 KP=1e-4 LAMBDA=0.05)
.end
"""

LADDER = """Resistors, a diode, an ideal bidirectional pair: reciprocal
Vin in 0 1
I1 0 b 1m
R1 in a 1k
R2 a b 2k
R3 b 0 3k m=2
Vb c 0 0.2
R4 a c 4k tc1=1e-3
X1 b 0 clamp
.subckt clamp p n
R5 p k 500
D1 k n dm
.ends
.model dm D(IS=1e-12 N=1.4 RS=10)
.end
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (
        ("models.inc", MODELS),
        ("amplifier.cir", AMPLIFIER),
        ("mirror.cir", MIRROR),
        ("ladder.cir", LADDER),
    ):
        (tmp_path / name).write_text(text)
    return tmp_path


def amplifier(folder, **options):
    trainable = ["X1.Rc", "x1.re", "Rl", "QX.BF", "QX.IS", "QP.bf", "Vcc"]
    return physics.Netlist(folder / "amplifier.cir", trainable, ["Vin"], ["out", "x1.e"], **options)


def mirror(folder, **options):
    trainable = ["nch.VTO", "nch.KP", "M1.W", "Rl", ("Rl2", 1e3, 1e5)]
    return physics.Netlist(folder / "mirror.cir", trainable, ["Vin"], ["out2"], **options)


def ladder(folder, **options):
    trainable = ["R1", "r2", "R3", "R4", "x1.r5", "Vb", "dm.is", "dm.N"]
    return physics.Netlist(folder / "ladder.cir", trainable, ["Vin", "I1"], ["a", "v(b)", "i(Vb)"], **options)


CIRCUITS = {
    "amplifier": (amplifier, torch.tensor([[0.8], [0.9], [1.0]]).double()),
    "mirror": (mirror, torch.tensor([[0.75], [0.8]]).double()),
    "ladder": (ladder, torch.tensor([[1.0, 1e-3], [3.0, 0.0], [-1.0, 2e-4]]).double()),
}


def loss_of(network, x):
    z = network(x)
    weights = torch.linspace(0.5, 1.5, z.numel()).reshape(z.shape).double()
    scale = torch.tensor([1e3 if name.startswith("i(") else 1.0 for name in network.outputs])  # in milliamperes
    return (weights * (z * scale).sin()).sum()


def gradients_of(network, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss_of(network, x), [network.raw, x])


def differences(network, x):
    """Central differences of the loss, by the trained numbers and by the inputs."""
    by_raw, by_x = torch.zeros_like(network.raw), torch.zeros_like(x)
    with torch.no_grad():
        for k in range(len(by_raw)):
            losses = []
            for sign in (1, -1):
                other = copy.deepcopy(network)
                other.raw[k] += sign * 1e-4
                losses.append(loss_of(other, x))
            by_raw[k] = (losses[0] - losses[1]) / 2e-4
        for k in range(x.numel()):
            step = 1e-4 * max(float(x.abs().max(0).values[k % x.shape[1]]), 1e-6)
            shift = torch.zeros(x.numel()).double()
            shift[k] = step
            up, down = (loss_of(network, x + sign * shift.reshape(x.shape)) for sign in (1, -1))
            by_x.view(-1)[k] = (up - down) / (2 * step)
    return by_raw, by_x


@needs_ngspice
@pytest.mark.parametrize("gradient", ["auto", "forward"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_gradients_are_finite_differences(name, gradient, folder):
    make, x = CIRCUITS[name]
    network = make(folder, gradient=gradient)
    found, exact = gradients_of(network, x), differences(network, x)
    for mine, reference in zip(found, exact, strict=True):
        assert (mine - reference).norm() < 1e-3 * reference.norm()  # asked for: 1 %
        assert ((mine - reference).abs() < 1e-2 * reference.abs() + 1e-4 * reference.norm()).all()
    expected = "ep" if name == "ladder" and gradient == "auto" else "forward"
    assert network.last.rule == expected


@needs_ngspice
@pytest.mark.parametrize("make", [amplifier, mirror])
def test_a_one_way_circuit_trained_by_nudges_is_warned_of(make, folder):
    x = CIRCUITS[make.__name__][1]
    network = make(folder, gradient="ep")
    with pytest.warns(AsymmetryWarning, match="not reciprocal"):
        by_nudges = gradients_of(network, x)[0]
    exact = gradients_of(make(folder, gradient="forward"), x)[0]
    assert (by_nudges - exact).norm() > 0.5 * exact.norm()
    assert network.last.mismatch > 0.1


@needs_ngspice
def test_a_circuit_found_to_be_one_way_is_not_tested_again(folder):
    network, x = amplifier(folder), CIRCUITS["amplifier"][1]
    gradients_of(network, x)
    first = network.last
    gradients_of(network, x)
    assert first.mismatch > 0.1
    assert math.isnan(network.last.mismatch)
    assert network.last.solves < first.solves


@needs_ngspice
def test_it_is_a_black_box_for_the_functions_of_the_package(folder):
    network, x = ladder(folder), CIRCUITS["ladder"][1]
    theta = network.physical()
    factor = torch.autograd.grad(network.physical()["R1"], network.raw)[0][0]
    z = tep.attach_equilibrium(
        network.solver(x),
        network.force,
        theta,
        x,
        scale="response",
        noise=1e-9,
        check=False,
        stencil=tep.Stencil.symmetric(1e-4),
    )
    assert z.shape == (3, len(network.unknowns))
    torch.testing.assert_close(z[:, :3], network(x))
    (found,) = torch.autograd.grad(z[:, 0].sum(), network.raw)
    (expected,) = torch.autograd.grad(network(x)[:, 0].sum(), network.raw)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    columns = tep.sensitivities(
        network.solver(x),
        network.force,
        {name: value.detach() for name, value in theta.items()},
        x,
        columns=[0, 5],
        scale="response",
        noise=1e-9,
        check=False,
        stencil=tep.Stencil.symmetric(1e-4),
    ).columns
    assert float(columns[0, :, 0].sum() * factor) == pytest.approx(float(expected[0]), rel=1e-3)


@needs_ngspice
def test_a_two_transistor_amplifier_learns_a_transfer_curve(folder):
    x = torch.tensor([[0.75], [0.85], [1.0], [1.2]]).double()
    with torch.no_grad():
        target = physics.Netlist(folder / "amplifier.cir", [], ["Vin"], ["out"])(x)
    start = AMPLIFIER.replace("4.7k", "8k").replace("330", "600")
    (folder / "start.cir").write_text(start)
    network = physics.Netlist(folder / "start.cir", [("x1.Rc", 1e3, 2e4), "x1.Re"], ["Vin"], ["out"])
    optimiser = torch.optim.LBFGS(network.parameters(), max_iter=12, line_search_fn="strong_wolfe")
    losses = []

    def closure():
        optimiser.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimiser.step(closure)
    assert losses[-1] < 1e-4 * losses[0]
    assert [value.item() for value in network.physical().values()] == pytest.approx([4700, 330], rel=0.02)
    (folder / "trained.cir").write_text(network.netlist())
    with torch.no_grad():
        torch.testing.assert_close(physics.Netlist(folder / "trained.cir", [], ["vin"], ["out"])(x), network(x))


OPAMP = """Macro of an operational amplifier, a behavioural source, a controlled current, a JFET
Vin in 0 1
Rin in n 1k
Rf n out 2k
X1 0 n out OPA
.subckt OPA p n out gain=1e4
.model clip D(IS=1e-14)
E1 m 0 p n {gain}
Ro m out 50
D1 out vp clip
Vp vp 0 4
.ends
B1 sq 0 V=V(out)*V(out)
Rsq sq 0 1k
G1 0 gg out 0 1m
Rg gg 0 1k
Vd d 0 5
J1 d gg js jm
Rjs js 0 2k
.model jm NJF(VTO=-2 BETA=1e-3)
.temp 85
.end
"""


@needs_ngspice
@pytest.mark.parametrize("title", ["* a comment", "", ".model is no title", "R1 neither", "expanded by ngspice"])
def test_the_first_line_is_a_title_whatever_it_is(title, folder):
    x = CIRCUITS["ladder"][1]
    (folder / "titled.cir").write_text("\n".join([title, *LADDER.splitlines()[1:], ""]))
    with torch.no_grad():
        found = physics.Netlist(folder / "titled.cir", [], ["Vin", "I1"], ["a"])(x)
        torch.testing.assert_close(found, ladder(folder)(x)[:, :1])


@needs_ngspice
def test_controlled_sources_and_macros(folder):
    (folder / "opamp.cir").write_text(OPAMP)
    trainable = ["rf", "x1.e1", "G1", "jm.beta", physics.Trainable("jm.vto", log=False), "J1.area"]
    trainable[-1] = physics.Trainable("J1.area", initial=1.5)
    network = physics.Netlist(folder / "opamp.cir", trainable, ["vin"], ["out", "sq", "js"])
    x = torch.tensor([[0.5], [-0.4], [-3.0]]).double()
    z = network(x)
    assert z[0, 0].item() == pytest.approx(-1.0, rel=1e-2)
    assert 4 < z[2, 0].item() < 5, "the clamp does not hold"
    torch.testing.assert_close(z[:, 1], z[:, 0] ** 2, rtol=1e-6, atol=1e-9)
    found, exact = gradients_of(network, x), differences(network, x)
    for mine, reference in zip(found, exact, strict=True):
        assert (mine - reference).norm() < 2e-3 * reference.norm()


@needs_ngspice
def test_the_temperature_is_that_of_the_file(folder):
    x = torch.ones(1, 2).double() * 1e-3
    values = []
    for line in ("", ".temp 27\n", ".temp 85\n", ".options temp=85\n"):
        (folder / "t.cir").write_text(LADDER.replace(".end\n", f"{line}.end\n").replace(".ends", ".ends"))
        with torch.no_grad():
            values.append(float(physics.Netlist(folder / "t.cir", [], ["Vin", "I1"], ["b"])(1e3 * x)[0, 0]))
    assert values[0] == values[1] != values[2] == values[3]


@needs_ngspice
def test_nothing_of_the_user_is_read_and_nothing_is_written(folder, tmp_path, monkeypatch):
    x = CIRCUITS["amplifier"][1]
    with torch.no_grad():
        before = amplifier(folder)(x)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".spiceinit").write_text("option temp=85\n")
    (folder / ".spiceinit").write_text("option temp=85\n")
    noisy = AMPLIFIER.replace("plot v(out)", "write all.raw\nwrdata data.txt v(out)\nshell touch touched")
    noisy = noisy.replace(".tran 1u 1m", ".options temp=27 reltol=0.1 vntol=0.1\n.tran 1u 1m\n.print tran v(out)")
    (folder / "amplifier.cir").write_text(noisy)
    seen = {path.name for path in folder.iterdir()}
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    with torch.no_grad():
        torch.testing.assert_close(amplifier(folder)(x), before, rtol=1e-9, atol=1e-12)
    assert {path.name for path in folder.iterdir()} == seen
    assert [path.name for path in elsewhere.iterdir()] == [".spiceinit"]


@needs_ngspice
def test_rows_copies_dtypes_and_arrays(folder):
    network, x = ladder(folder), CIRCUITS["ladder"][1]
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(ladder(folder, workers=2)(x), expected, rtol=1e-8, atol=1e-12)
        network.raw[0] += 0.3
        moved = network(x)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            torch.testing.assert_close(other(x), moved)
        fresh = ladder(folder)
        fresh.load_state_dict(network.state_dict())
        torch.testing.assert_close(fresh(x), moved)
        assert network(x.float()).dtype is torch.float32
        torch.testing.assert_close(network(x.numpy()), moved)
    assert not torch.equal(moved, expected)


@needs_ngspice
def test_bounds_hold_and_values_start_where_the_netlist_has_them(folder):
    trainable = [("R1", 500, 2000), physics.Trainable("Vb", low=0.1, high=0.3), physics.Trainable("R3", low=1.0)]
    trainable += [physics.Trainable("dm.N", high=2.0), "R2"]
    network = physics.Netlist(folder / "ladder.cir", trainable, ["Vin"], ["a"])
    values = [float(value.detach()) for value in network.physical().values()]
    assert values == pytest.approx([1000, 0.2, 3000, 1.4, 2000])
    for size in (-30.0, 30.0):
        with torch.no_grad():
            network.raw.fill_(size)
        values = {name: float(value.detach()) for name, value in network.physical().items()}
        assert 500 <= values["R1"] <= 2000
        assert 0.1 <= values["Vb"] <= 0.3
        assert values["R3"] >= 1.0
        assert values["dm.N"] <= 2.0
        assert values["R2"] > 0


@needs_ngspice
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable": ["R9"]}, "nothing called 'R9'"),
        ({"trainable": ["x1.R9"]}, "nothing called 'x1.R9'"),
        ({"trainable": ["nomodel.IS"]}, "nothing called"),
        ({"trainable": ["x1.D1"]}, "no value of its own"),
        ({"trainable": ["dm.cjo"]}, "initial="),
        ({"trainable": ["Vb.dc"]}, "only the value"),
        ({"trainable": ["R1", "r1"]}, "given twice"),
        ({"trainable": ["Vin"]}, "given twice"),
        ({"trainable": "R1"}, "must be a list"),
        ({"trainable": [3]}, "give a name"),
        ({"trainable": [("R1", 2000, 3000)]}, "does not lie between"),
        ({"trainable": [("R1", -1, 3000)], "log": None}, None),
        ({"inputs": ["R1"]}, "no voltage or current source"),
        ({"outputs": ["nowhere"]}, "unknown node"),
        ({"outputs": ["0"]}, "unknown node"),
        ({"outputs": ["i(R1)"]}, "no voltage source"),
        ({"outputs": []}, "outputs is empty"),
        ({"gradient": "nudge"}, "gradient"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_what_is_not_there_is_refused(options, words, folder):
    options.pop("log", None)
    given = {"trainable": ["R2"], "inputs": ["Vin"], "outputs": ["a"], **options}
    if words is None:
        assert not physics.Netlist(folder / "ladder.cir", **given).knobs[0].spec.log
        return
    with pytest.raises(InvalidOptionError, match=words):
        physics.Netlist(folder / "ladder.cir", **given)


@needs_ngspice
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title\nD1 a 0 nomodel\nV1 a 0 1\n.end\n", "modelname"),
        ("title\n.include 'nowhere.inc'\nV1 a 0 1\n.end\n", "nowhere.inc"),
        ("title\nX1 a 0 nosub\nV1 a 0 1\n.end\n", "nosub"),
        ("", "cannot read|no element"),
        ("title\n.end\n", "cannot read|no element"),
    ],
)
def test_a_bad_netlist_is_named(text, words, tmp_path):
    (tmp_path / "bad.cir").write_text(text)
    with pytest.raises(physics.NgspiceError, match=words):
        physics.Netlist(tmp_path / "bad.cir", [], [], ["a"])


@needs_ngspice
def test_floating_nodes_absent_files_and_what_does_not_converge(tmp_path):
    (tmp_path / "floating.cir").write_text("title\nV1 a 0 1\nR1 a 0 1k\nC1 a b 1p\nI1 0 b 0\n.end\n")
    network = physics.Netlist(tmp_path / "floating.cir", ["R1"], ["V1"], ["b"])
    with pytest.raises(physics.NgspiceError, match=r"row 0.*node b"):
        network(torch.ones(1, 1))
    with pytest.raises(InvalidOptionError, match="cannot be read"):
        physics.Netlist(tmp_path / "absent.cir", [], [], ["a"])
    with pytest.raises(InvalidOptionError, match="x must have shape"):
        network(torch.ones(1))
    with pytest.raises(InvalidOptionError, match="finite"):
        network(torch.full((1, 1), float("nan")))


def test_an_absent_program_is_named(tmp_path):
    (tmp_path / "circuit.cir").write_text(LADDER)
    with pytest.raises(MissingDependencyError, match="ngspice"):
        physics.Netlist(tmp_path / "circuit.cir", ["R1"], ["Vin"], ["a"], command="no-such-simulator")


@pytest.mark.parametrize(
    ("text", "value"),
    [("4.7k", 4700), ("1MEG", 1e6), ("10mOhm", 1e-2), ("1e-3", 1e-3), (".5u", 5e-7), ("2mil", 50.8e-6), ("x", None)],
)
def test_numbers_as_spice_writes_them(text, value):
    assert spice_value(text) == (value if value is None else pytest.approx(value))
