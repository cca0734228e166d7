"""The layers of docs/design.md are those of the code, and each file is one that a newcomer can read.

No module imports from a layer above its own; none is long, and no function is; one name means one thing.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

import torchdeq_ep

PACKAGE = Path(torchdeq_ep.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"


def _layers():
    """The names of the table from the lowest up."""
    section = DESIGN.read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def _unit(path):
    """The module, or the subpackage, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if _unit(path) not in ("__init__", "__main__")]


def _imported(path):
    """The modules and subpackages of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "torchdeq_ep":
                yield rest.partition(".")[0]


def test_the_table_names_every_module_once():
    assert sorted(_layers()) == sorted({_unit(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_from_a_layer_above_its_own(path):
    layers = _layers()
    own = layers.index(_unit(path))
    above = {name for name in _imported(path) if name not in layers[: own + 1]}
    assert not above, f"{_unit(path)} imports from above it, by the table of docs/design.md: {sorted(above)}"


PLUGINS = sorted((PACKAGE.parent / "plugins").glob("*/torchdeq_ep_*"))
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_and_no_function_is_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            assert node.end_lineno - node.lineno + 1 - documented <= LONGEST_FUNCTION, node.name


def test_no_module_has_the_name_of_something_else():
    """`import torchdeq_ep.x.y as y` gives the module, not a function of that name."""
    for path in PACKAGE.rglob("*.py"):
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        parent, _, name = module.__name__.rpartition(".")
        if name not in ("__init__", "__main__"):
            assert getattr(importlib.import_module(parent), name) is module, module.__name__


def test_one_name_of_a_class_or_type_means_one_thing():
    homes = {}
    for path in [*PACKAGE.rglob("*.py"), *(file for plugin in PLUGINS for file in plugin.rglob("*.py"))]:
        for node in ast.parse(path.read_text()).body:
            is_alias = isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp, ast.Name))
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            names += [target.id for target in node.targets if isinstance(target, ast.Name)] if is_alias else []
            for name in names:
                if name[:1].isupper() and not name.isupper():
                    homes.setdefault(name, []).append(str(path.relative_to(PACKAGE.parent)))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugins_import_what_is_meant_for_them(plugin):
    open_to_all = {"errors", "extend", "holomorphic", "jacobian", "nn"}
    for path in plugin.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchdeq_ep."):
                assert node.module.removeprefix("torchdeq_ep.") in open_to_all, f"{path.name}: {node.module}"
