"""One look for every figure: an opaque light ground, so that it can be read on a dark page too, and few colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchdeq_ep.measuring.files import require, write_whole

# Okabe & Ito's palette, with a grey in place of its yellow, which is too pale for a light ground.
COLOURS = ("#000000", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#777777", "#E69F00", "#D55E00")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
GROUND, INK, FAINT, GRID = "#FAFAFA", "#222222", "#8A8A8A", "#E2E2E2"


def new_figure(width: float, height: float) -> Any:
    """An empty figure.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        A `matplotlib.figure.Figure`, without pyplot: no window, no global state, no choice of backend for the caller.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    require("matplotlib.figure", "matplotlib", "A figure")
    from torchdeq_ep.measuring.shown import ShownFigure

    return ShownFigure(figsize=(width, height), facecolor=GROUND)


def dress(axes: Any) -> None:
    """Ground, grid, ticks and frame of one panel.

    Args:
        axes: A `matplotlib.axes.Axes`.
    """
    axes.set_facecolor(GROUND)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure, whole or not at all; the same figure gives the same file.

    Args:
        figure: The figure.
        path: File to write; its suffix chooses the format.

    Raises:
        InvalidOptionError: If the file cannot be written.
    """
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(path).suffix.lower())
    with require("matplotlib", "matplotlib", "A figure").rc_context({"svg.hashsalt": "torchdeq-ep"}):
        write_whole(path, lambda part: figure.savefig(part, facecolor=GROUND, dpi=160, metadata=undated))
