"""`torchdeq-ep --version` is answered before torch is imported, which takes seconds.

The command is in this package, so nothing of it can run before the package is imported, and with it torch. This module
is imported first, and ends the process if that is all it was started for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def asks_for_version(arguments: Sequence[str], command: Sequence[str]) -> bool:
    """Whether a process is the program of this package, asked for its version and nothing else.

    Args:
        arguments: `sys.argv`.
        command: `sys.orig_argv`.

    Example:
        >>> asks_for_version(["/usr/bin/torchdeq-ep", "--version"], ["python", "/usr/bin/torchdeq-ep", "--version"])
        True
        >>> asks_for_version(["train.py", "--version"], ["python", "train.py", "--version"])
        False
    """
    is_program = Path(arguments[0]).stem == "torchdeq-ep" if arguments else False
    is_module = list(command[1:3]) in (["-m", "torchdeq_ep"], ["-m", "torchdeq_ep.cli"])
    return (is_program or is_module) and list(arguments[1:]) == ["--version"]


if asks_for_version(getattr(sys, "argv", []), sys.orig_argv):
    sys.stdout.write(f"torchdeq-ep {version('torchdeq-ep')}\n")
    sys.exit(0)
