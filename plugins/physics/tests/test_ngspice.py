"""ngspice as a process: nothing of the user's settings leaks in, nothing is left behind, and failures have names."""

import contextlib
import decimal
import fractions
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from physics_problems import needs_ngspice

import torchdeq_ep as tep
import torchdeq_ep_physics as physics
from torchdeq_ep.errors import InvalidOptionError, MissingDependencyError, SolverTimeoutError
from torchdeq_ep_physics import recipes


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """A cache and a folder for temporary files that the test can look into."""
    for name, folder in (("XDG_CACHE_HOME", "cache"), ("TMPDIR", "tmp")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr("tempfile.tempdir", None)


def circuit(**options):
    """A resistor and a diode from the input to the node, and a resistor to ground."""
    options = {"diodes": [(0, 2)], **options}
    network = physics.ResistiveNetwork(1, 1, [(0, 1), (0, 2)], torch.tensor([1e-3, 2e-4]).double(), **options)
    return network, torch.tensor([[2.0], [-1.0], [0.5]], dtype=torch.float64)


def program(tmp_path, script, name="fake"):
    """A program in the place of ngspice."""
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def left(tmp_path):
    return sorted((tmp_path / "tmp").iterdir())


def kept(error):
    """The netlist and the log that an error names."""
    stem = re.search(r"Netlist and log: (\S+)\.cir", str(error.value))[1]
    return Path(f"{stem}.cir").read_text(), Path(f"{stem}.log").read_text()


# --- the user's settings ---------------------------------------------------------------------------------------------


@needs_ngspice
@pytest.mark.parametrize("line", ["option temp=85", "option reltol=0.1", "set numdgt=3", "option gmin=1e-4"])
def test_start_up_files_and_variables_change_nothing(line, tmp_path, monkeypatch):
    network, x = circuit()
    spice = physics.Ngspice(network, x)
    before = spice(torch.zeros(()))
    home = tmp_path / "home"
    home.mkdir()
    for folder in (home, tmp_path):
        (folder / ".spiceinit").write_text(f"{line}\n")
        (folder / "spinit").write_text(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    for name in ("SPICE_SCRIPTS", "SPICE_LIB_DIR", "NGSPICE_INPUT_DIR", "SPICE_EXEC_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert torch.equal(spice(torch.zeros(())), before)


def test_what_the_program_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("SPICE_ASCIIRAWFILE", "1")
    monkeypatch.setenv("LC_NUMERIC", "de_DE.UTF-8")
    script = f'echo "$@" > {tmp_path}/arguments; env > {tmp_path}/env; cat > {tmp_path}/deck; exit 1'
    network, x = circuit()
    with pytest.raises(physics.NgspiceError, match="stopped after 0 of 3 rows"):
        physics.Ngspice(network, x, command=program(tmp_path, script))(torch.zeros(()))
    assert "-n" in (tmp_path / "arguments").read_text().split()
    names = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert names["LC_ALL"] == "C"
    assert not {name for name in names if name.startswith(("SPICE_", "NGSPICE_", "LC_N", "LANG"))}
    deck = (tmp_path / "deck").read_text()
    assert "temp=27" in deck
    assert "tnom=27" in deck
    assert "reltol=1e-10" in deck


# --- numbers ---------------------------------------------------------------------------------------------------------


@needs_ngspice
@pytest.mark.parametrize(
    "number", [np.float64, np.float32, decimal.Decimal, fractions.Fraction, torch.tensor, np.asarray]
)
def test_numbers_of_any_type(number):
    plain, x = circuit(saturation=0.0009765625, ideality=1.5, rails=(0.25,))
    other, _ = circuit(saturation=0.0009765625, ideality=1.5, rails=(0.25,))
    other.saturation, other.ideality, other.rails = number(0.0009765625), number(1.5), (number(0.25),)
    expected = physics.Ngspice(plain, x)(torch.zeros(()))
    assert torch.equal(physics.Ngspice(other, x)(torch.zeros(())), expected)
    assert torch.equal(physics.Ngspice(plain, x)(np.zeros((3, 1), dtype=np.float32)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "much", None])
def test_what_is_no_number_is_refused(bad):
    network, x = circuit()
    network.saturation = bad
    with pytest.raises(InvalidOptionError, match="saturation"):
        physics.Ngspice(network, x, command="true")(torch.zeros(()))


def test_inputs_and_currents_are_finite():
    network, x = circuit()
    with pytest.raises(InvalidOptionError, match="x has entries"):
        physics.Ngspice(network, x * float("nan"), command="true")
    with pytest.raises(InvalidOptionError, match="finite"):
        physics.Ngspice(network, x, command="true")(torch.full((3, 1), float("inf")))
    with pytest.raises(InvalidOptionError, match="conductance"):
        physics.Ngspice(network, x, {"conductance": torch.tensor([0.0, 1.0])}, command="true")


# --- failures --------------------------------------------------------------------------------------------------------


def test_floating_nodes_are_named_before_any_simulation():
    conductance = torch.tensor([1e-3, 1e-3]).double()
    with pytest.raises(InvalidOptionError, match="joins node 1, 2, 3 to an input or a rail"):
        physics.ResistiveNetwork(4, 1, [(0, 4), (1, 2)], conductance)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("cat >/dev/null", "stopped after 0 of 3 rows"),
        ("cat >/dev/null; echo '@row 0'; echo 'v(n0) = nan'", "row 0"),
        ("cat >/dev/null; echo '@row 0'; echo 'v(n0) = 1,5'", "row 0"),
        ("cat >/dev/null; echo '@row 0'; echo 'v(n0) = 1e0'", "stopped after 1 of 3 rows"),
        ("cat >/dev/null; echo '@row 0'; echo 'v(n1) = 1'; echo 'Error: no such vector' >&2", "no such vector"),
        ("cat >/dev/null; printf '\\377\\376 @row'", "stopped after 0"),
        ("kill -SEGV $$", "stopped after 0"),
    ],
)
def test_output_that_is_no_answer_is_a_named_error_with_netlist_and_log(script, words, tmp_path):
    network, x = circuit()
    command = program(tmp_path, script)
    with pytest.raises(physics.NgspiceError, match=words) as error:
        physics.Ngspice(network, x, command=command)(torch.zeros(()))
    netlist, log = kept(error)
    assert "alter Vin0" in netlist
    assert ("@row" in log) == ("@row" in script)
    assert not left(tmp_path)


@needs_ngspice
def test_an_operating_point_that_is_not_found_is_said_with_its_row(tmp_path):
    network, x = circuit(diodes=[])
    current = torch.zeros(3, 1).double()
    current[1] = 1e308
    with pytest.raises(physics.NgspiceError, match="row 1"):
        physics.Ngspice(network, x, workers=2)(current)
    assert not left(tmp_path)


@needs_ngspice
def test_a_transient_is_not_taken_for_an_operating_point():
    """At a floating node ngspice falls back on one, and finds that it stays where it was."""
    floating = physics.spice_process.spice_deck(
        ["title", "V1 a 0 1", "R1 a 0 1k", "R2 c d 1k", "I1 0 c 0"], [[]], ["v(c)"]
    )
    spice = physics.SpiceProgram()
    with pytest.raises(physics.NgspiceError, match=r"row 0.*check node c"):
        spice.operating_points([([0], floating)], ["v(c)"])


@pytest.mark.parametrize("script", ["exec sleep 600", "sleep 600", "sleep 600 & wait", "while :; do :; done"])
def test_a_program_that_hangs_is_ended_with_its_children(script, tmp_path):
    network, x = circuit()
    command = program(tmp_path, f"echo $$ > {tmp_path}/pid; {script}")
    start = time.monotonic()
    spice = physics.Ngspice(network, x, command=command, timeout=0.5)
    with pytest.raises(subprocess.TimeoutExpired, match=r"timeout= of Ngspice") as error:
        spice(torch.zeros(()))
    assert isinstance(error.value, physics.NgspiceError)
    assert "alter Vin0" in kept(error)[0]
    assert time.monotonic() - start < 10
    assert not left(tmp_path)
    group = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(group), 10)  # a killed process needs a moment to end
    with pytest.raises(SolverTimeoutError, match=r"timeout= of Ngspice"):
        tep.attach_equilibrium(spice, network.force, network.physical(), x)


def alive(group):
    """Whether any process of a group runs. Those that ended and were not waited for do not count."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(line.split()[0]) == group and "Z" not in line.split()[1] for line in found.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="processes that end with their parent are a matter of Linux")
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_kill(way, tmp_path):
    script = tmp_path / "run.py"
    command = program(tmp_path, f"echo $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid; exec sleep 600")
    script.write_text(
        "import signal, torch, torchdeq_ep_physics as physics\n"
        # Whoever runs the tests in the background may have had Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "network = physics.ResistiveNetwork(1, 1, [(0, 1)], torch.ones(1))\n"
        f"physics.Ngspice(network, torch.ones(1, 1), command={command!r})(torch.zeros(()))\n"
    )
    run = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "pid").exists)
        run.send_signal(way)
        run.wait(30)
        group = int((tmp_path / "pid").read_text())
        wait_for(lambda: not alive(group))
        assert not left(tmp_path)
    finally:
        run.kill()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_kept_files_do_not_grow_without_end(tmp_path):
    network, x = circuit()
    spice = physics.Ngspice(network, x, command="true")
    for _ in range(23):
        with pytest.raises(physics.NgspiceError):
            spice(torch.zeros(()))
    assert len(list((tmp_path / "cache").rglob("*.cir"))) == 20


def test_an_error_is_not_lost_where_nothing_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    network, x = circuit()
    with pytest.raises(physics.NgspiceError, match="could not be kept"):
        physics.Ngspice(network, x, command="true")(torch.zeros(()))


def test_a_program_that_goes_away_is_named(tmp_path):
    network, x = circuit()
    command = program(tmp_path, "true")
    spice = physics.Ngspice(network, x, command=command)
    Path(command).unlink()
    with pytest.raises(MissingDependencyError, match="command="):
        spice(torch.zeros(()))


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": -1.0}, {"timeout": "60"}, {"workers": 0}])
def test_options_are_checked(options):
    network, x = circuit()
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        physics.Ngspice(network, x, command="true", **options)


def test_inputs_of_another_shape_are_refused():
    network, _ = circuit()
    for x in (torch.ones(1), torch.ones(2, 2), torch.ones(0, 1)):
        with pytest.raises(InvalidOptionError, match="x must have shape"):
            physics.Ngspice(network, x, command="true")


@needs_ngspice
def test_rows_over_several_processes_come_back_in_order():
    network, _ = circuit()
    x = torch.linspace(-1, 3, 7, dtype=torch.float64).unsqueeze(1)
    current = 1e-4 * torch.arange(7.0).double().unsqueeze(1)
    one, several = (physics.Ngspice(network, x, workers=workers)(current) for workers in (1, 3))
    torch.testing.assert_close(several, one, rtol=1e-9, atol=1e-12)


@needs_ngspice
def test_the_time_out_of_a_recipe_is_an_argument():
    network, x = circuit()
    with pytest.raises(SolverTimeoutError):
        recipes.simulated(network, x, timeout=1e-3)
    with pytest.raises(SolverTimeoutError):
        recipes.classify("iris", "ngspice", steps=1, timeout=1e-3)
