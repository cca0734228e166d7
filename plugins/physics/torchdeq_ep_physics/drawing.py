"""Pictures of physical networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import MissingDependencyError


def figure(*grid: int, width: float = 10.0, height: float = 4.2) -> tuple[Any, Any]:
    """A matplotlib figure without a window, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a picture needs matplotlib: pip install 'torchdeq-ep-physics[recipes]'."
        ) from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(*(grid or (1, 1)))


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
    """Branches as lines as thick as they are strong, nodes as coloured dots, arrows dashed."""
    largest = float(strength.max()) if len(strength) else 1.0
    for (a, b), value in zip(branches, strength.tolist(), strict=True):
        share = value / (largest or 1.0)
        line = torch.stack([places[a], places[b]]).T.tolist()
        axes.plot(*line, color="0.45", linewidth=0.2 + 3 * share, alpha=0.25 + 0.75 * share, zorder=1)
    for a, b in arrows:
        axes.annotate(
            "", places[b].tolist(), places[a].tolist(), arrowprops={"arrowstyle": "-|>", "color": "tab:red", "lw": 0.6}
        )
    shown = list(nodes)
    options: dict[str, Any] = {"c": "tab:blue"}
    if colour is not None:
        options = {"c": colour[shown].tolist(), "cmap": "twilight" if cyclic else "coolwarm"}
    if cyclic:
        options |= {"vmin": 0.0, "vmax": 2 * math.pi}
    dots = axes.scatter(*places[shown].T.tolist(), edgecolors="black", linewidths=0.5, zorder=2, **options)
    if colour is not None:
        axes.figure.colorbar(dots, ax=axes, label=label)
    axes.set_aspect("equal")
    axes.axis("off")
