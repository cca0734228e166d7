"""The messages of errors and warnings: what they say, and where they point."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest

from torchdeq_ep import cli, errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.EPError | errors.EPWarning)
]
POINTER = "\nMore: torchdeq-ep errors "


@pytest.fixture(params=CLASSES, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def test_a_message_ends_with_the_command_that_explains_it(kind, capsys):
    message, _, command = str(kind("It is so.")).partition("\nMore: torchdeq-ep ")
    assert message == "It is so."
    assert cli.main(command.split()) == 0
    explained = capsys.readouterr().out
    assert explained.startswith(f"{kind.__name__}\n\n")
    assert "\n## " not in explained
    assert len(explained.split()) > 8


def test_what_was_raised_is_what_was_said(kind):
    error = kind("It is so.")
    assert error.args == ("It is so.",)
    assert str(kind()) == ""


def test_copies_and_pickles_say_it_once(kind):
    error = kind("It is so.")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), kind(str(error)), kind(str(kind(str(error))))):
        assert type(other) is kind
        assert str(other) == f"It is so.{POINTER}{kind.__name__}"


def test_a_message_that_quotes_another_points_to_itself_alone():
    inner = errors.NonFiniteError("NaN in it.")
    outer = errors.FallbackWarning(f"passed on, because {inner} Three times.")
    assert str(outer) == f"passed on, because NaN in it. Three times.{POINTER}FallbackWarning"


def test_a_class_derived_elsewhere_points_to_the_nearest_one_of_this_package():
    class MineError(errors.SolverError):
        pass

    assert str(MineError("It is so.")).endswith(f"{POINTER}SolverError")


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if issubclass(kind, Warning)])
def test_a_warning_shown_in_the_terminal_has_the_pointer(kind):
    shown = warnings.formatwarning(kind("It is so."), kind, __file__, 1, line="")
    assert shown.endswith(f"It is so.{POINTER}{kind.__name__}\n")


def test_a_name_that_does_not_exist_is_refused_with_the_nearest(capsys):
    assert cli.main(["errors", "NotHolomorphic"]) == 2
    assert "Did you mean 'NotHolomorphicError'?" in capsys.readouterr().err


def test_without_a_name_all_are_listed(capsys):
    assert cli.main(["errors"]) == 0
    assert {kind.__name__ for kind in CLASSES} <= set(capsys.readouterr().out.split())


def test_the_wheel_has_the_page(monkeypatch, tmp_path, capsys):
    root = Path(__file__).parents[1]
    assert re.search(
        r'^"docs/errors.md" = "torchdeq_ep/errors.md"', (root / "pyproject.toml").read_text(), re.MULTILINE
    )
    (tmp_path / "errors.md").write_text("# Errors\n\n## EPError\n\nAs shipped.\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    assert cli.main(["errors", "EPError"]) == 0
    assert capsys.readouterr().out == "EPError\n\nAs shipped.\n"
