"""Commands of other distributions: found by entry points, run as programs are, and named where they are absent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.metadata import EntryPoint
from typing import NoReturn

from torchdeq_ep.errors import InvalidOptionError, unknown_name

COMMAND_GROUP = "torchdeq_ep.commands"
"""Entry points of this group are subcommands: a name, and a callable from the remaining arguments to an exit code."""

PROVIDERS = {
    "train": "torchdeq-ep-lightning",
    "sweep": "torchdeq-ep-lightning",
    "physics": "torchdeq-ep-physics[recipes]",
}
"""Which distribution of this project has a command."""


def origin(entry: EntryPoint) -> str:
    """The distribution of an entry point, or what it is if that is not known."""
    return entry.dist.name if entry.dist else entry.value


def by_name(entries: Iterable[EntryPoint], taken: Collection[str] = ()) -> tuple[dict[str, EntryPoint], list[str]]:
    """The entry points that hold, and what is to be said of the others.

    Args:
        entries: Of one group.
        taken: Names that no plugin can have.

    Returns:
        One for each name, that of the distribution that comes first in the alphabet; and a sentence for each other.

    Example:
        >>> first, second = (EntryPoint("greet", f"{name}:run", COMMAND_GROUP) for name in ("beta", "alpha"))
        >>> chosen, notes = by_name([first, second])
        >>> chosen["greet"].value, notes
        ('alpha:run', ["'greet' is of alpha:run and of beta:run: that of alpha:run is used"])
    """
    chosen: dict[str, EntryPoint] = {}
    notes = []
    for entry in sorted(entries, key=origin):
        if entry.name in taken:
            notes.append(f"{entry.name!r} of {origin(entry)} has the name of what is built in, which is used")
        elif entry.name not in chosen:
            chosen[entry.name] = entry
        elif chosen[entry.name].value != entry.value:
            first = origin(chosen[entry.name])
            notes.append(f"{entry.name!r} is of {first} and of {origin(entry)}: that of {first} is used")
    return chosen, notes


def refuse_unknown(name: str, known: Sequence[str]) -> NoReturn:
    """Say which distribution has a command, or which is the nearest.

    Args:
        name: The command that does not exist.
        known: Those that do.

    Raises:
        InvalidOptionError: Always.
    """
    if name in PROVIDERS:
        raise InvalidOptionError(
            f"the command {name!r} comes with a distribution that is not installed: pip install '{PROVIDERS[name]}'"
        )
    raise InvalidOptionError(unknown_name("command", name, [*known, *PROVIDERS]))


def run_plugin(entry: EntryPoint, arguments: list[str]) -> int:
    """Run the command of a plugin.

    Args:
        entry: Its entry point.
        arguments: What follows the name of the command.

    Returns:
        The exit code that it returns or exits with: 0 for `None`, and 1 for a message, which is printed.

    Raises:
        InvalidOptionError: If it cannot be imported.
    """
    try:
        command: Callable[[list[str]], int | None] = entry.load()
    except Exception as error:
        raise InvalidOptionError(
            f"the command {entry.name!r} of {origin(entry)} cannot be imported from {entry.value}: {error}"
        ) from error
    try:
        code: object = command(arguments)
    except SystemExit as stop:
        code = stop.code
    return exit_code(code)


def exit_code(code: object) -> int:
    """The exit code that Python itself would end with; a message is printed on standard error.

    Args:
        code: What a command returned, or exited with.

    Example:
        >>> exit_code(None), exit_code(3)
        (0, 3)
    """
    if code is None or isinstance(code, int):
        return int(code or 0)
    sys.stderr.write(f"{code}\n")
    return 1
