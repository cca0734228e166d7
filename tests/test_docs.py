"""The documentation is true: its Python blocks run, and it covers every error."""

from __future__ import annotations

import ast
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

import torchdeq_ep as tep

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python(?P<rest>[^\n]*)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?", re.M | re.S)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


class Block(NamedTuple):
    """A Python block, and the text block right below it, which is its output."""

    line: int
    code: str
    output: str | None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The Python blocks; a fence with anything after the language is refused, so that none can opt out."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        assert not match["rest"].strip(), f"{name_of(page)}:{line}: every Python block runs, so no options on its fence"
        found.append(Block(line, match["code"], match["output"]))
    assert len(found) == text.count("```python"), f"{name_of(page)}: a Python fence that is indented or not closed"
    return found


OPTIONAL = {"inverse.md": "deepinv", "beam.md": "skfem"}
"""Pages that need a package which the development environment does not bring."""
RUNNABLE = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in OPTIONAL:
        pytest.importorskip(OPTIONAL[page.name], exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchdeq_ep.modes.registry._factories", dict(tep.modes.registry._factories))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        # Blank lines in front, so that a traceback shows the line of the page.
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        if block.output is not None:
            assert_same_output(printed.getvalue(), block.output)


def assert_same_output(printed: str, shown: str) -> None:
    """The same words; the same numbers up to what another machine's rounding may change."""
    assert re.sub(r"\s+", " ", NUMBER.sub("#", printed)) == re.sub(r"\s+", " ", NUMBER.sub("#", shown))
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_names_its_language(page: Path) -> None:
    opening = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)[::2]
    assert all(opening), f"{name_of(page)}: a fence without a language: {opening}"


def test_some_pages_have_blocks() -> None:
    assert len(RUNNABLE) >= 5


def test_every_error_is_explained() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(error_classes())


def error_classes() -> set[str]:
    """The public errors and warnings of the package and its plugins, and all that derive from them."""
    files = [*(ROOT / "torchdeq_ep").rglob("*.py"), *(ROOT / "plugins").glob("*/torchdeq_ep_*/*.py")]
    classes = [node for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    known = {"EPError", "EPWarning"}
    while more := {node.name for node in classes if known & set(map(ast.unparse, node.bases))} - known:
        known |= more
    return known
