"""Other distributions that extend this package: how their entry points are found and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torchdeq_ep.errors import PluginError, PluginWarning

BACKWARDS = "torchdeq_ep.backwards"
"""Entry points of this group are backward modes: a name, and a factory of the mode."""
COMMANDS = "torchdeq_ep.commands"
"""Of this one, subcommands: a name, and a callable from the remaining arguments to an exit code."""
ADAPTERS = "torchdeq_ep.adapters"
"""Of this one, functions `(module, backward, **options)` that switch the equilibrium layers of another library, and
return a handle, or `None` if there are none."""
GROUPS = {BACKWARDS: "backward mode", COMMANDS: "command", ADAPTERS: "adapter"}


@cache
def entries(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, in the order of their distributions.

    Args:
        group: One of `GROUPS`.

    Example:
        >>> entries("torchdeq_ep.nothing")
        ()
    """
    return tuple(sorted(entry_points(group=group), key=origin))


def origin(entry: EntryPoint) -> str:
    """The distribution of an entry point, or what it is if that is not known."""
    return entry.dist.name if entry.dist else entry.value


def by_name(found: Iterable[EntryPoint], taken: Collection[str] = ()) -> tuple[dict[str, EntryPoint], list[str]]:
    """The entry points that hold, and what is to be said of the others.

    Args:
        found: Of one group.
        taken: Names that no plugin can have.

    Returns:
        One for each name, that of the distribution that comes first in the alphabet; and a sentence for each other.

    Example:
        >>> first, second = (EntryPoint("greet", f"{name}:run", COMMANDS) for name in ("beta", "alpha"))
        >>> chosen, notes = by_name([first, second])
        >>> chosen["greet"].value, notes
        ('alpha:run', ["the command 'greet' is of alpha:run and of beta:run: that of alpha:run is used"])
    """
    chosen: dict[str, EntryPoint] = {}
    notes = []
    for entry in sorted(found, key=origin):
        if entry.name in taken:
            notes.append(f"{_name(entry)} of {origin(entry)} has the name of what is built in, which is used")
        elif entry.name not in chosen:
            chosen[entry.name] = entry
        elif chosen[entry.name].value != entry.value:
            first = origin(chosen[entry.name])
            notes.append(f"{_name(entry)} is of {first} and of {origin(entry)}: that of {first} is used")
    return chosen, notes


def load(entry: EntryPoint) -> Any:
    """What an entry point names.

    Args:
        entry: Of one of `GROUPS`.

    Raises:
        PluginError: If it cannot be imported, whatever its import raises.

    Example:
        >>> load(EntryPoint("root", "math:sqrt", COMMANDS))(4.0)
        2.0
    """
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{_name(entry)} of {origin(entry)} is {entry.value}, which cannot be imported: "
            f"{_raised(error)}. {_remedy(entry)}"
        ) from error


def leave_out(entry: EntryPoint, error: BaseException) -> None:
    """Warn, once in a process, that a plugin is broken and things go on without it.

    Args:
        entry: Its entry point.
        error: What it raised.
    """
    if entry in _left_out:
        return
    _left_out.add(entry)
    failed = f"{_name(entry)} of {origin(entry)} failed with {_raised(error)}. {_remedy(entry)}"
    said = error.args[0] if isinstance(error, PluginError) else failed
    warnings.warn(f"{said} It is left out, which is not said again.", PluginWarning, stacklevel=4)


_left_out: set[EntryPoint] = set()


def _name(entry: EntryPoint) -> str:
    return f"the {GROUPS[entry.group]} {entry.name!r}"


def _raised(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _remedy(entry: EntryPoint) -> str:
    return f"Update or uninstall {entry.dist.name}." if entry.dist else "Update or uninstall what provides it."
