"""The layers of docs/design.md are those of the code: no module imports from a layer above its own."""

import ast
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
