"""The command line, end to end through `main`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from torchdeq_ep import cli, plugins
from torchdeq_ep.modes import registry
from torchdeq_ep.modes.registry import available_backwards

pytest.importorskip("rich")

MODULE = """
import torch, torchdeq

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.deq = torch.nn.Linear(4, 4), torchdeq.get_deq(ift=True)

    def forward(self, x):
        return self.deq(lambda z: 0.5 * torch.tanh(self.linear(z)) + x, torch.zeros_like(x))[0][-1]

def make():
    return Model(), (torch.randn(3, 4), torch.randn(3, 4)), torch.nn.functional.mse_loss

def overflowing():
    return Model(), torch.randn(3, 4), lambda outputs: (outputs * torch.inf).sum()

def pair():
    return Model(), torch.randn(3, 4)

def wrong_model():
    return "model", None, make

def wrong_loss():
    return Model(), None, 3

def broken():
    raise KeyError("weights")

number = 3
"""


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module of factories and one that cannot be imported."""
    (tmp_path / "problems_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_of_mine.py").write_text("import json\n\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("COLUMNS", "160")
    yield tmp_path
    sys.modules.pop("problems_of_mine", None)


MINE = ["compare", "problems_of_mine:make", "--backward", "ift", "--backward", "ep", "--repeats", "1"]


def test_compare_prints_the_table_and_writes_every_file(problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = ["--json", "out.json", "--markdown", "out.md", "--plot", "out.png"]
    assert cli.main([*MINE, "--solver", "own", "--solver", "anderson", *files]) == 0
    printed = capsys.readouterr().out
    plain = json.loads(Path("out.json").read_text())
    markdown = Path("out.md").read_text()
    assert [(row["backward"], row["solver"]) for row in plain["rows"]] == [
        ("ift", "own"),
        ("ift", "anderson"),
        ("ep", "own"),
        ("ep", "anderson"),
    ]
    assert plain["sentence"] in markdown
    assert plain["sentence"].split(" (")[0] in printed
    assert "anderson" in printed
    assert 0 < plain["spectral_radius"] < 1
    assert f"Free phase: relative residual {plain['free_residual']:.1e}" in printed
    assert "Reference: dense" in markdown
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in problems.iterdir() if path.suffix != ".py" and path.is_file()} == {
        "out.json",
        "out.md",
        "out.png",
    }


@pytest.mark.usefixtures("problems")
def test_json_on_standard_output_is_nothing_but_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*MINE, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert [row["backward"] for row in json.loads(captured.out)["rows"]] == ["ift", "ep"]
    assert "closest to the exact gradient" in captured.err


def test_diagnose_prints_the_tables_and_writes_every_file(problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = ["--json", "out.json", "--markdown", "out.md", "--plot", "out.png"]
    assert cli.main(["diagnose", "problems_of_mine:make", *files]) == 0
    printed = capsys.readouterr().out
    (layer,) = json.loads((problems / "out.json").read_text())["layers"]
    markdown = (problems / "out.md").read_text()
    for heading in ("finite nudge", "asymmetry", "convergence", "symmetry", "spectral radius", "best beta"):
        assert heading in printed
        assert heading in markdown
    assert 0 < layer["spectral_radius"] < 1
    assert 0 < layer["symmetry"]["symmetry"] < 1
    assert layer["symmetry"]["asymmetry_se"] > 0
    assert layer["advice"] in markdown
    assert (problems / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["compare", "diagnose"])
@pytest.mark.usefixtures("problems")
def test_a_problem_without_a_gradient_still_ends_in_a_table(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "problems_of_mine:overflowing", "--backward", "ep", "--json", "out.json"]) == 0
    printed = capsys.readouterr().out
    assert "NonFiniteError: the cotangent" in printed
    assert "spectral" in printed.lower()
    assert json.loads(Path("out.json").read_text())


@pytest.mark.parametrize("command", ["compare", "diagnose"])
@pytest.mark.usefixtures("problems")
def test_progress_is_drawn_without_a_thread(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, threads, drawn = pytest.importorskip("rich.progress").Progress, [], []

    def update(self: object, task: object, **fields: object) -> None:
        drawn.append(fields)
        threads.append(threading.active_count())

    monkeypatch.setattr(progress, "update", update)
    before = threading.active_count()
    assert cli.main([command, "problems_of_mine:make", "--backward", "ep"]) == 0
    assert drawn[-1]["completed"] == drawn[-1]["total"]
    assert set(threads) == {before}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("problems_of_mine", "package.module:factory"),
        (":make", "package.module:factory"),
        ("problems_of_mine:", "package.module:factory"),
        ("nowhere_at_all:make", "No module named 'nowhere_at_all'"),
        ("broken_of_mine:make", "broken_of_mine.py, line 3"),
        ("problems_of_mine:missing", "no attribute 'missing'"),
        ("problems_of_mine:number", "not a function"),
        ("problems_of_mine:pair", "(model, batch, loss_fn), not tuple of 2"),
        ("problems_of_mine:wrong_model", "must be an nn.Module, not str"),
        ("problems_of_mine:wrong_loss", "cannot be called: int"),
        ("problems_of_mine:broken", "KeyError: 'weights'"),
    ],
)
@pytest.mark.usefixtures("problems")
def test_a_bad_factory_is_named_without_a_traceback(
    factory: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", factory]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("torchdeq-ep: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backward", "epp"], "unknown backward mode 'epp'"),
        (["--solver", "newton"], "unknown solver 'newton'"),
        (["--repeats", "0"], "--repeats"),
        (["--json", "missing/out.json"], "no directory missing"),
        (["--markdown", "."], "is a directory"),
        (["--plot", "out.docx"], "picture format"),
    ],
)
@pytest.mark.usefixtures("problems")
def test_what_cannot_be_done_is_refused_before_measuring(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli, "train_digits", lambda *_: pytest.fail("training began"))
    assert cli.main(["compare", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("problems")
def test_a_missing_package_is_named_with_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(MINE) == 2
    assert "pip install 'torchdeq-ep[compare]'" in capsys.readouterr().err


def test_without_a_factory_a_model_of_digits_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["compare", "--backward", "ift", "--backward", "ep", "--repeats", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    accuracy = float(captured.err.partition("propagation: ")[2].partition("%")[0])
    assert accuracy > 90
    ift, ep = json.loads(captured.out)["rows"]
    assert ift["gradient_error"] < 1e-4
    assert ep["gradient_cosine"] > 0.9
    assert ep["converged"] is True


def test_list_names_every_mode_and_solver(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    described = {words[0]: words[1] for line in lines if len(words := line.split(maxsplit=1)) == 2}
    assert {*available_backwards(), "own", "anderson", "broyden"} <= set(described)
    assert described["aep"] == "Symmetric nudges with the asymmetric correction; exact for every Jacobian."


def test_version_help_and_misspellings_return_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("torchdeq-ep 0.")
    assert cli.main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert cli.main(["conpare"]) == 2
    assert cli.main([]) == 2


def greet(arguments: list[str]) -> int:
    print("greetings", *arguments)
    return 7


def test_commands_of_plugins_are_listed_and_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "greeting_plugin", sys.modules[__name__])
    entries = [
        EntryPoint("greet", "greeting_plugin:greet", plugins.COMMANDS),
        EntryPoint("list", "greeting_plugin:greet", plugins.COMMANDS),
        EntryPoint("absent", "no_such_plugin:run", plugins.COMMANDS),
    ]
    _provide(monkeypatch, *entries)
    assert cli.main(["greet", "--loudly", "you"]) == 7
    assert capsys.readouterr().out == "greetings --loudly you\n"
    assert cli.main(["--help"]) == 0
    assert "greet " in capsys.readouterr().out
    assert cli.main(["absent"]) == 2
    assert "no_such_plugin" in capsys.readouterr().err
    assert cli.main(["list"]) == 0  # a plugin cannot take the place of a command that is built in
    assert "backward modes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(5)", 5, ""),
        ("sys.exit('no such simulator')", 1, "no such simulator\n"),
        ("return None", 0, ""),
        ("return 3", 3, ""),
    ],
)
def test_a_plugin_ends_as_it_would_alone(
    ending: str, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("ending_plugin")
    exec(f"import sys\ndef run(arguments):\n    {ending}", vars(module))
    monkeypatch.setitem(sys.modules, "ending_plugin", module)
    _provide(monkeypatch, EntryPoint("end", "ending_plugin:run", plugins.COMMANDS))
    assert cli.main(["end"]) == code
    assert capsys.readouterr().err == message


def _provide(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> None:
    """The entry points of this process: these, and no others."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry for entry in entries if entry.group == group])
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    plugins.entries.cache_clear()


@pytest.fixture(autouse=True)
def _no_plugins_after() -> Iterator[None]:
    yield
    plugins.entries.cache_clear()


@pytest.mark.parametrize("name", ["train", "sweep", "physics"])
def test_a_command_without_its_distribution_names_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _provide(monkeypatch)
    assert cli.main([name, "digits-mlp", "--backward", "hep"]) == 2
    assert (
        f"pip install 'torchdeq-ep-{'physics[recipes]' if name == 'physics' else 'lightning'}'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["conpare"], "'compare'"),
        (["tran"], "'train'"),
        (["compare", "--bakward", "ep"], "'--backward'"),
        (["compare", "--backwrad=ep"], "'--backward'"),
        (["diagnose", "--markdwon", "x.md"], "'--markdown'"),
        (["env", "--jsn"], "'--json'"),
    ],
)
def test_a_misspelt_name_is_answered_by_the_nearest(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert f"Did you mean {near}?" in printed
    assert "usage:" not in printed


def test_ctrl_c_ends_with_the_code_of_a_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "environment", interrupted)
    assert cli.main(["env"]) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err


def test_a_broken_plugin_breaks_nothing_else(
    problems: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("odd_plugin")
    exec("def bad():\n    raise KeyError('odd')\nnumber = 3", vars(module))
    monkeypatch.setitem(sys.modules, "odd_plugin", module)
    broken = [
        EntryPoint(name, value, plugins.BACKWARDS)
        for name, value in (("gone", "no_such_plugin:mode"), ("odd", "odd_plugin:bad"), ("three", "odd_plugin:number"))
    ]
    _provide(monkeypatch, *broken, EntryPoint("absent", "no_such_plugin:run", plugins.COMMANDS))
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "no_such_plugin" in listed
    assert "aep " in listed
    files = ["--json", "out.json"]
    assert cli.main(["compare", "problems_of_mine:make", "--repeats", "1", *files]) == 0
    rows = {row["backward"]: row for row in json.loads(Path("out.json").read_text())["rows"]}
    assert rows["ift"]["gradient_error"] < 1e-3
    assert {"gone", "odd", "three"} <= set(rows)
    assert "gone: UnknownBackwardError" in capsys.readouterr().out


def test_two_plugins_of_one_name_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_plugin", sys.modules[__name__])
    _provide(
        monkeypatch,
        EntryPoint("greet", "b_plugin:greet", plugins.COMMANDS),
        EntryPoint("greet", "a_plugin:greet", plugins.COMMANDS),
        EntryPoint("list", "a_plugin:greet", plugins.COMMANDS),
        EntryPoint("mine", "b_plugin:mode", plugins.BACKWARDS),
        EntryPoint("mine", "a_plugin:greet", plugins.BACKWARDS),
        EntryPoint("ep", "a_plugin:greet", plugins.BACKWARDS),
    )
    assert cli.main(["greet"]) == 7
    assert "'greet' is of a_plugin:greet and of b_plugin:greet" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().err
    assert "'greet' is of" in printed
    assert "'list' of a_plugin:greet has the name of what is built in" in printed
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().err
    assert "the backward mode 'mine' is of a_plugin:greet and of b_plugin:mode" in printed
    assert "the backward mode 'ep' of a_plugin:greet has the name of what is built in" in printed


@pytest.mark.parametrize("start", [["-m", "torchdeq_ep"], ["-m", "torchdeq_ep.cli"], ["PROGRAM"]])
def test_the_version_is_told_without_torch(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    program = tmp_path / "torchdeq-ep"  # as an installer writes it
    program.write_text("import sys\nfrom torchdeq_ep.cli import main\nsys.exit(main())\n")
    command = [sys.executable, *(str(program) if part == "PROGRAM" else part for part in start), "--version"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=60)
    assert told.stdout.startswith("torchdeq-ep 0.")
