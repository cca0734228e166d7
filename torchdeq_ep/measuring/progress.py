"""How far a measurement is, told to whoever asks for it, and to a notebook without being asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from importlib import import_module
from typing import Any

OnProgress = Callable[[str, int, int], None]
"""Told what is measured next, how many steps of the whole are done, and how many there are."""


class Steps:
    """Tells a caller how far the work is; without one, a line in a notebook, if this is one.

    Args:
        on_progress: Whom to tell, if anyone.
        total: Number of steps.

    Example:
        >>> steps = Steps(print, 2)
        >>> steps("the first")
        the first 0 2
        >>> steps("the second")
        the second 1 2
        >>> steps.end()
        done 2 2
    """

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self.total = on_progress or _notebook(), total
        self._done = 0

    def __call__(self, what: str) -> None:
        """Before a step.

        Args:
            what: What it is about.
        """
        if self._on_progress is not None:
            self._on_progress(what, self._done, self.total)
        self._done += 1

    def end(self) -> None:
        """After the last step."""
        if self._on_progress is not None:
            self._on_progress("done", self.total, self.total)


def _notebook() -> OnProgress | None:
    """A line below the cell of a notebook that changes with every step; `None` where there is no notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    display: Any = import_module("IPython.display")
    line = display.display(display.HTML(""), display_id=True)

    def show(what: str, done: int, total: int) -> None:
        text = "" if done == total else f"<progress value={done} max={total}></progress> {escape(what)}"
        line.update(display.HTML(text))

    return show
