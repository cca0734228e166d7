"""The pages docs/api-*.md have every public name, and the docstring behind each of their entries is complete.

Sections are those of Google's style. What a call raises is what its own body raises: an `EPError` by name. A class is
called through its constructor, with the checks that this calls.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import torchdeq_ep as tep

PAGES = sorted((Path(__file__).resolve().parent.parent / "docs").glob("api-*.md"))
ENTRIES = [name for page in PAGES for name in re.findall(r"^::: (torchdeq_ep[\w.]*)$", page.read_text(), re.MULTILINE)]
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):\n((?:\n|    .*(?:\n|\Z))*)", re.MULTILINE)
NAMES = re.compile(r"^    \*{0,2}(\w+):", re.MULTILINE)
NAMESPACES = ["torchdeq_ep"] + [
    f"torchdeq_ep.{name}" for name in ("compare", "errors", "holomorphic", "jacobian", "nn")
]


class Documented:
    """A function, method or class, and its docstring.

    Args:
        path: Dotted name.
        thing: What has the name.
    """

    def __init__(self, path: str, thing: Any) -> None:
        self.path = path
        self.thing = thing
        self.is_class = isinstance(thing, type)
        self.sections = dict(SECTION.findall(inspect.cleandoc(thing.__doc__ or "") + "\n"))

    def names(self, *titles: str) -> set[str]:
        """What sections explain."""
        return {name for title in titles for name in NAMES.findall(self.sections.get(title, ""))}

    @cached_property
    def parameters(self) -> set[str]:
        """What a caller may pass."""
        function = self.thing
        if self.is_class:
            if not any("__init__" in vars(base) for base in self._own_bases):
                return set()
            function = self.thing.__init__
        return {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}

    @cached_property
    def explained(self) -> set[str]:
        """The parameters that the docstring explains, or that of a public class it derives from."""
        own = self.names("Args", "Attributes")
        bases = [base for base in self._own_bases[1:] if not base.__name__.startswith("_")] if self.is_class else []
        return own.union(*(Documented(base.__name__, base).names("Args", "Attributes") for base in bases))

    @cached_property
    def statements(self) -> list[ast.AST]:
        """What runs in a call of it, one level deep."""
        if not self.is_class:
            return list(statements(self.thing))
        own = [vars(base) for base in self._own_bases]
        found = [next((each[name] for each in own if name in each), None) for name in ("__init__", "__post_init__")]
        made = [node for function in found if function and has_source(function) for node in statements(function)]
        return made + [node for function in self._called(made) for node in statements(function)]

    @cached_property
    def raised(self) -> set[str]:
        """The errors of this package that its body raises."""
        raised = [node.exc for node in self.statements if isinstance(node, ast.Raise)]
        names = {ast.unparse(each.func).rpartition(".")[2] for each in raised if isinstance(each, ast.Call)}
        return {name for name in names if name in vars(tep.errors)}

    @property
    def _own_bases(self) -> list[type]:
        return [base for base in self.thing.__mro__ if base.__module__.startswith("torchdeq_ep")]

    def _called(self, nodes: list[ast.AST]) -> Iterator[Callable[..., Any]]:
        """Functions of this package and methods of the class that are called by name."""
        for node in nodes:
            if isinstance(node, ast.Call):
                name = node.func
                found = None
                if isinstance(name, ast.Name):
                    found = vars(inspect.getmodule(self.thing)).get(name.id)
                elif isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id == "self":
                    found = getattr(self.thing, name.attr, None)
                if inspect.isfunction(found) and found.__module__.startswith("torchdeq_ep"):
                    yield found


def has_source(function: Callable[..., Any]) -> bool:
    return inspect.isfunction(function) and Path(function.__code__.co_filename).is_file()


def statements(function: Callable[..., Any]) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions defined in it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    return own_nodes(tree)


def own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from own_nodes(child)


def resolve(path: str) -> Any:
    """What a dotted name stands for, a module before an attribute of its package."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def is_documentable(thing: Any) -> bool:
    return isinstance(thing, type) or inspect.isfunction(inspect.unwrap(thing) if callable(thing) else thing)


def members(namespace: dict[str, Any], module: str) -> Iterator[tuple[str, Any]]:
    """The public functions and classes that a module or class defines, classmethods as functions."""
    for name, value in namespace.items():
        value = getattr(value, "__func__", value)
        if is_documentable(value) and not name.startswith("_") and (value.__module__, value.__name__) == (module, name):
            yield name, value


def documented() -> Iterator[Documented]:
    """The entries of the reference; in place of a module, what it defines; with a class, its methods."""
    for path in ENTRIES:
        thing = resolve(path)
        named = [(path, thing)]
        if isinstance(thing, ModuleType):
            named = [(f"{path}.{name}", value) for name, value in members(vars(thing), thing.__name__)]
        for name, value in named:
            yield Documented(name, value)
            if isinstance(value, type):
                for method, function in members(vars(value), value.__module__):
                    inherited = any(getattr(getattr(base, method, None), "__doc__", None) for base in value.__mro__[1:])
                    if function.__doc__ or not inherited:
                        yield Documented(f"{name}.{method}", function)


EVERYTHING = {each.path: each for each in documented()}
TOP = {path: each for path, each in EVERYTHING.items() if each.is_class or "." not in each.thing.__qualname__}


@pytest.fixture(params=sorted(EVERYTHING))
def each(request: pytest.FixtureRequest) -> Documented:
    return EVERYTHING[request.param]


def test_it_explains_every_parameter_and_no_other(each: Documented) -> None:
    assert each.parameters <= each.explained, f"not explained: {each.parameters - each.explained}"
    assert each.names("Args") <= each.parameters, f"no such parameter: {each.names('Args') - each.parameters}"


def test_it_says_what_comes_back(each: Documented) -> None:
    if each.is_class:
        return
    returns = any(isinstance(node, ast.Return) and node.value is not None for node in each.statements)
    yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in each.statements)
    assert not returns or "Returns" in each.sections
    assert not yields or "Yields" in each.sections


def test_it_names_the_errors_it_raises(each: Documented) -> None:
    assert each.raised <= each.names("Raises"), f"not named: {each.raised - each.names('Raises')}"


@pytest.mark.parametrize("path", sorted(TOP))
def test_functions_and_classes_have_an_example_that_runs(path: str) -> None:
    thing = TOP[path].thing
    if isinstance(thing, type) and issubclass(thing, Exception):
        return  # docs/errors.md has those
    assert doctest.DocTestParser().get_examples(TOP[path].sections.get("Example", "")), "no >>> in its Example"


@pytest.mark.parametrize("path", NAMESPACES)
def test_every_public_name_is_in_the_reference(path: str) -> None:
    names = {name: value for name, value in vars(resolve(path)).items() if not name.startswith("_")}
    own = {n for n, v in names.items() if is_documentable(v) and v.__module__.startswith("torchdeq_ep")}
    known = [each.thing for each in EVERYTHING.values()]
    assert {name for name in own if names[name] not in known} == set()


def test_no_entry_is_there_twice() -> None:
    assert len(set(ENTRIES)) == len(ENTRIES)


def test_the_rules_find_what_is_missing() -> None:
    """The rules themselves, on a function that breaks each of them."""

    def broken(known: int, unknown: int) -> int:
        """Broken.

        Args:
            known: One.
            other: Two.
        """
        if known:
            raise tep.errors.InvalidOptionError("no")
        return unknown

    found = Documented("broken", broken)
    assert found.parameters - found.explained == {"unknown"}
    assert found.names("Args") - found.parameters == {"other"}
    assert found.raised == {"InvalidOptionError"}
    assert "Returns" not in found.sections
