"""The page on torchdeq's zoo has the tables of the recorded figures; the models themselves need a checkout."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "figures" / "zoo.py"


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models():
    return json.loads((ROOT / "docs" / "results" / "zoo.json").read_text())["models"]


def test_the_page_has_the_tables_of_the_results(zoo, models):
    page = (ROOT / "docs" / "zoo.md").read_text()
    assert zoo.filled(page, models) == page
    for table in zoo.tables(models).values():
        assert table in page


def test_measured_models_have_every_mode(zoo, models):
    names = [found["model"] for found in models]
    assert names == [name for name in zoo.zoo.ZOO if name in names]
    assert len({entry.family for entry in zoo.zoo.ZOO.values()}) == 6
    for found in models:
        assert found["error"] or list(found["modes"]) == list(zoo.MODES)
        assert found["options"] == zoo.zoo.ZOO[found["model"]].options


def test_models_without_figures_are_named(zoo, models):
    table = zoo.tables(models)["model"]
    assert table.count("still to be measured") == len(zoo.zoo.ZOO) - len(models)
    assert all(f"| `{name}` |" in table for name in zoo.zoo.ZOO)


def test_a_figure_that_changed_is_seen(zoo, models):
    page = (ROOT / "docs" / "zoo.md").read_text()
    changed = json.loads(json.dumps(models))
    changed[0]["modes"]["ift"]["gradient_error"] = 0.123
    assert zoo.filled(page, changed) != page


def test_what_is_no_checkout_is_refused(tmp_path):
    ended = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "git clone https://github.com/locuslab/torchdeq" in ended.stderr


def test_a_package_that_is_replaced_raises_when_it_is_used(zoo, monkeypatch):
    name = "no_such_package_of_the_zoo"
    monkeypatch.setitem(sys.modules, name, None)  # not there, and forgotten again after the test
    assert name in zoo.zoo.stand_in(name)[0]
    assert zoo.zoo.stand_in("json") == []
    with pytest.raises(NotImplementedError, match=f"{name}.colored was called"):
        sys.modules[name].colored("text")
