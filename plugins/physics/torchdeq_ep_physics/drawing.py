"""Pictures of physical networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import MissingDependencyError
from torchdeq_ep.extend import write_whole

INK = "#7d828c"
"""A grey that can be read on a white and on a dark ground."""

TONES = ("#3b8ed0", "#d9822b", "#2fa36b", "#b76bc4")
"""Colours of which the same holds."""


def figure(*grid: int, width: float = 10.0, height: float = 4.2) -> tuple[Any, Any]:
    """A matplotlib figure without a window, and its axes, for light and dark pages alike.

    The ground is transparent, and what is written is of a middle grey, so that both can be read on either.

    Args:
        *grid: Rows and columns of axes; by default one of each.
        width: In inches.
        height: In inches.

    Returns:
        The figure and its axes.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a picture needs matplotlib: pip install 'torchdeq-ep-physics[recipes]'."
        ) from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    look: dict[Any, Any] = dict.fromkeys(inked, INK)
    look |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    with rc_context(look):
        drawn = Figure(figsize=(width, height), layout="constrained")
        return drawn, drawn.subplots(*(grid or (1, 1)))


def save_figure(drawn: Any, path: str | Path) -> None:
    """Write a figure on a transparent ground, whole or not at all; the same figure gives the same file.

    Args:
        drawn: The figure.
        path: Where to; its suffix chooses the format.

    Raises:
        InvalidOptionError: If the file cannot be written.
    """
    from matplotlib import rc_context

    undated = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
    with rc_context({"svg.hashsalt": "torchdeq-ep"}):
        write_whole(path, lambda part: drawn.savefig(part, facecolor="none", dpi=160, metadata=undated))


def circle(count: int) -> Tensor:
    """Places on a circle, of shape `(count, 2)`."""
    angle = torch.arange(count) * (2 * math.pi / max(count, 1))
    return torch.stack([angle.cos(), angle.sin()], 1)


def graph(
    axes: Any,
    places: Tensor,
    nodes: Iterable[int],
    branches: Sequence[tuple[int, int]],
    strength: Tensor,
    colour: Tensor | None = None,
    label: str = "",
    *,
    arrows: Sequence[tuple[int, int]] = (),
    cyclic: bool = False,
) -> None:
    """Branches as lines as thick as they are strong, nodes as coloured dots, arrows between them."""
    largest = float(strength.max()) if len(strength) else 1.0
    for (a, b), value in zip(branches, strength.tolist(), strict=True):
        share = value / (largest or 1.0)
        line = torch.stack([places[a], places[b]]).T.tolist()
        axes.plot(*line, color=INK, linewidth=0.2 + 3 * share, alpha=0.25 + 0.75 * share, zorder=1)
    for a, b in arrows:
        axes.annotate(
            "", places[b].tolist(), places[a].tolist(), arrowprops={"arrowstyle": "-|>", "color": TONES[1], "lw": 0.6}
        )
    shown = list(nodes)
    options: dict[str, Any] = {"c": TONES[0]}
    if colour is not None:
        options = {"c": colour[shown].tolist(), "cmap": "twilight" if cyclic else "coolwarm"}
    if cyclic:
        options |= {"vmin": 0.0, "vmax": 2 * math.pi}
    dots = axes.scatter(*places[shown].T.tolist(), edgecolors=INK, linewidths=0.5, zorder=2, **options)
    if colour is not None:
        bar = axes.figure.colorbar(dots, ax=axes)
        bar.set_label(label, color=INK)
        bar.ax.tick_params(colors=INK)
        bar.outline.set_edgecolor(INK)
    axes.set_aspect("equal")
    axes.axis("off")
