"""Entry points of other distributions: one home loads them, and what is broken is named with what it raised."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

import torchdeq_ep
from torchdeq_ep.errors import PluginError
from torchdeq_ep.plugins import ADAPTERS, BACKWARDS, COMMANDS, load

PACKAGE = Path(torchdeq_ep.__file__).parent


@pytest.mark.parametrize(
    ("group", "kind"), [(BACKWARDS, "backward mode"), (COMMANDS, "command"), (ADAPTERS, "adapter")]
)
@pytest.mark.parametrize(
    ("source", "raised"),
    [
        ("raise ImportError('libfoo.so: no such file')", "ImportError: libfoo.so: no such file"),
        ("raise KeyError('odd')", "KeyError: 'odd'"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("", "AttributeError: module 'fragile_plugin' has no attribute 'run'"),
    ],
)
def test_whatever_an_import_raises_is_said(group, kind, source, raised, tmp_path, monkeypatch):
    (tmp_path / "fragile_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fragile_plugin", raising=False)
    with pytest.raises(PluginError, match=f"the {kind} 'mine' of fragile_plugin:run is") as caught:
        load(EntryPoint("mine", "fragile_plugin:run", group))
    assert raised in str(caught.value)
    assert "uninstall" in str(caught.value)


def test_ctrl_c_during_an_import_is_no_broken_plugin(monkeypatch):
    def interrupted(self: EntryPoint) -> ModuleType:
        raise KeyboardInterrupt

    monkeypatch.setattr(EntryPoint, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(EntryPoint("mine", "math:sqrt", COMMANDS))


def test_entry_points_are_looked_for_in_one_place():
    homes = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and any(name.name == "entry_points" for name in node.names):
                homes.add(path.name)
    assert homes == {"plugins.py"}


def test_the_package_is_run_as_the_program_is():
    told = subprocess.run(
        [sys.executable, "-m", "torchdeq_ep", "errors", "PluginError"], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0
    assert told.stdout.startswith("PluginError")
