"""Files that recipes leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchdeq_ep.extend import write_text


def write_results(path: str | Path, found: Any) -> None:
    """Write figures as JSON.

    Args:
        path: The file.
        found: What JSON can hold.

    Raises:
        InvalidOptionError: If it cannot be written.
    """
    write_text(path, json.dumps(found, indent=1) + "\n")
