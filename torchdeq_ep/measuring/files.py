"""Files that appear whole or not at all, plain data for them, and optional packages that say how to get them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torchdeq_ep.errors import InvalidOptionError, MissingDependencyError


def require(module: str, distribution: str, purpose: str) -> Any:
    """An optional module, or an error that names the extra which installs it.

    Args:
        module: What to import, e.g. `"matplotlib.figure"`.
        distribution: Name of the distribution it belongs to.
        purpose: What it is needed for, as the subject of a sentence.

    Returns:
        The module.

    Raises:
        MissingDependencyError: If it is not installed.

    Example:
        >>> require("json", "json", "This example").__name__
        'json'
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs {distribution}, which cannot be imported ({error}): pip install 'torchdeq-ep[compare]'"
        ) from error


def check_writable(path: str | Path) -> Path:
    """The path of a file that can be written, before the work whose result it is to hold.

    Args:
        path: Where the file is to be; it may exist.

    Returns:
        The same as a `Path`.

    Raises:
        InvalidOptionError: If its directory does not exist or cannot be written to, or if it is a directory itself.

    Example:
        >>> check_writable("table.md").name
        'table.md'
    """
    path = Path(path)
    directory = path.parent
    if path.is_dir():
        raise InvalidOptionError(f"cannot write {path}: it is a directory.")
    if not directory.is_dir():
        raise InvalidOptionError(f"cannot write {path}: there is no directory {directory}. Create it first.")
    if not os.access(directory, os.W_OK):
        raise InvalidOptionError(f"cannot write {path}: no permission to create files in {directory}.")
    return path


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name beside its own, and rename it when it is complete.

    Args:
        path: Where the file is to be; replaced if it exists.
        write: Writes the file to the path it is given.

    Raises:
        InvalidOptionError: If the file cannot be created.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_whole(f"{directory}/note.txt", lambda path: path.write_text("done") and None)
        ...     Path(directory, "note.txt").read_text()
        'done'
    """
    path = check_writable(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path: Where it is to be; replaced if it exists.
        text: Its content.

    Raises:
        InvalidOptionError: If the file cannot be created.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_text(f"{directory}/note.txt", "done")
        ...     Path(directory, "note.txt").read_text()
        'done'
    """

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_whole(path, write)


def plain(value: Any) -> Any:
    """Nested data ready for JSON: lists in place of tuples, `None` in place of a figure that does not exist.

    Args:
        value: Dictionaries, lists and tuples of numbers, texts and the like.

    Returns:
        The same in dictionaries and lists.

    Example:
        >>> plain({"errors": (0.5, float("nan"))})
        {'errors': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
