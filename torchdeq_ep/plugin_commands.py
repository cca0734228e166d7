"""Commands of other distributions: run as programs are, and named where they are absent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import NoReturn

from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.plugins import load

PROVIDERS = {
    "train": "torchdeq-ep-lightning",
    "sweep": "torchdeq-ep-lightning",
    "physics": "torchdeq-ep-physics[recipes]",
}
"""Which distribution of this project has a command."""


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
        PluginError: If it cannot be imported.
    """
    command: Callable[[list[str]], int | None] = load(entry)
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
