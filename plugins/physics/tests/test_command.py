"""`torchdeq-ep physics`: what cannot be done is said before any work, by name, and the exit code is not zero."""

import sys

import pytest

from torchdeq_ep import cli
from torchdeq_ep.errors import InvalidOptionError, MissingDependencyError
from torchdeq_ep_physics import recipes
from torchdeq_ep_physics.command import ENTRIES, main


@pytest.fixture
def _no_work(monkeypatch):
    def work(*arguments, **options):
        raise AssertionError("work began")

    for name in ("classify", "amplifiers", "instrument", "motion", "recall", "rules", "devices"):
        monkeypatch.setattr(recipes, name, work)
    monkeypatch.setattr(recipes.mnist, "run", work)


@pytest.mark.parametrize(
    "arguments",
    [
        "iris --steps 0",
        "iris --steps -3",
        "moons --steps 0 --simulator twin",
        "motion --steps 0",
        "iris --seed -1",
        "motion --out {file}",
        "motion --out {file}/below",
        "instrument --out /proc/nowhere",
        "iris --timeout 0",
        "iris --timeout nan --simulator ngspice",
        "iris --workers 0",
        "rules --steps 0",
        "devices --out {file}",
        "recall --seed -1",
        "iris --out {file}",
        "motion --simulator twin",
        "amplifiers --timeout 3",
        "instrument --workers 2",
        "instrument --seed 1",
        "instrument --steps 3",
        "amplifiers --steps 3",
        "amplifiers --out {file}.d",
        "iris --out {file}.d",
        "recall --steps 3",
        "motion --data {file}",
        "rules --netlist {file}.cir",
        "iris --epochs 2",
        "mnist",
        "mnist --data {file} --steps 3",
        "mnist --data {file} --images 0",
        "mnist --data {file} --epochs 0",
        "mnist --data {file} --simulator twin",
        "mnist --data {file} --workers 2",
        "mnist --data {file} --out {file}",
    ],
)
@pytest.mark.usefixtures("_no_work")
def test_options_are_refused_before_any_work(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    given = arguments.format(file=tmp_path / "file").split()
    with pytest.raises(InvalidOptionError, match=r"--\w+"):
        main(given)
    assert cli.main(["physics", *given]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("arguments", ["iris --steps many", "iris --simulator spice", "nothing", "", "iris --step"])
@pytest.mark.usefixtures("_no_work")
def test_what_is_no_option_ends_with_another_code_than_zero(arguments):
    assert cli.main(["physics", *arguments.split()]) == 2


@pytest.mark.usefixtures("_no_work")
def test_an_absent_simulator_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(MissingDependencyError, match="apt-get install ngspice"):
        main(["iris", "--simulator", "ngspice"])


def test_the_twin_takes_the_place_of_an_absent_simulator(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda command: None)
    assert main(["moons", "--steps", "1"]) == 0
    assert "moons on twin" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["steps", "batch"])
def test_recipes_refuse_no_work(name):
    with pytest.raises(InvalidOptionError, match=name):
        recipes.classify("iris", **{name: 0})
    with pytest.raises(InvalidOptionError, match="steps"):
        recipes.motion(0)
    with pytest.raises(InvalidOptionError, match="simulator"):
        recipes.classify("iris", "spice")


@pytest.mark.parametrize("recipe", ENTRIES)
@pytest.mark.usefixtures("_no_work")
def test_a_recipe_that_draws_needs_matplotlib_before_any_work(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError if ENTRIES[recipe].draws else AssertionError):
        main([recipe, *(("--data", "folder") if recipe == "mnist" else ())])


def test_recall_on_the_command_line(tmp_path, capsys):
    assert main(["recall", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("recalled 1.00") == 3
    picture = (tmp_path / "recall.svg").read_text()
    assert "<svg" in picture
    assert "fill: #ffffff" not in picture, "the ground is not transparent"


def test_recall_mends_what_was_spoilt():
    found = recipes.recall(0.2, seed=1)
    assert max(found.cues) < 0.65
    assert min(found.recalled) == 1.0
    assert recipes.recall(0.0).cues == (1.0, 1.0, 1.0)
    with pytest.raises(InvalidOptionError, match="flipped"):
        recipes.recall(1.5)
