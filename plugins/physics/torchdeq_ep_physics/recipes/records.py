"""Files that recipes leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchdeq_ep.extend import write_whole


def write_text(path: str | Path, text: str) -> None:
    """Write a text whole, or not at all.

    Args:
        path: The file.
        text: What is in it.

    Raises:
        InvalidOptionError: If it cannot be written.
    """

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_whole(path, write)


def write_results(path: str | Path, found: Any) -> None:
    """Write figures as JSON.

    Args:
        path: The file.
        found: What JSON can hold.

    Raises:
        InvalidOptionError: If it cannot be written.
    """
    write_text(path, json.dumps(found, indent=1) + "\n")
