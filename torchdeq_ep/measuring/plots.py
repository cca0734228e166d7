"""Pictures of plain numbers: labelled points, and curves beside each other. What they are about is the caller's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.measuring.files import check_writable, require
from torchdeq_ep.measuring.style import COLOURS, FAINT, GROUND, INK, SHAPES, dress, new_figure

_FORMATS = (".png", ".svg", ".pdf")
_FIRST_RING, _RINGS, _DIRECTIONS = 9.0, 8, 16
_PALE = "#555555"


def check_plot(path: str | Path) -> Path:
    """The path of a picture that can be drawn and written, before the work whose result it is to show.

    Args:
        path: Where the picture is to be.

    Returns:
        The same as a `Path`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InvalidOptionError: If the file cannot be written in this place or format.
    """
    require("matplotlib.figure", "matplotlib", "A plot")
    path = check_writable(path)
    if path.suffix.lower() not in _FORMATS:
        raise InvalidOptionError(f"cannot draw {path}: {unknown_name('picture format', path.suffix, _FORMATS)}")
    return path


@dataclass(frozen=True)
class Point:
    """A marker and what is written beside it.

    Args:
        x: Where, positive.
        y: Where, positive.
        label: What is written beside it.
        colour: Number of its colour; they repeat.
        shape: Number of its shape; they repeat.

    Example:
        >>> Point(1.0, 0.1, "ep", colour=len(COLOURS)).hue == COLOURS[0]
        True
    """

    x: float
    y: float
    label: str
    colour: int = 0
    shape: int = 0

    @property
    def hue(self) -> str:
        """The colour itself."""
        return COLOURS[self.colour % len(COLOURS)]


@dataclass(frozen=True)
class Words:
    """What is written around labelled points.

    Args:
        title: Above them.
        subtitle: Below the title.
        x: Along the horizontal axis.
        y: Along the vertical axis.
        footnote: Below the picture.

    Example:
        >>> Words("Errors", "lower is better", "time", "error").x
        'time'
    """

    title: str
    subtitle: str
    x: str
    y: str
    footnote: str = ""


def scatter(points: Sequence[Point], words: Words, rule: float | None = None) -> tuple[Any, list[Any]]:
    """Labelled points on two logarithmic axes.

    Args:
        points: One at least.
        words: What is written around them.
        rule: Where a vertical line stands, if there is one.

    Returns:
        A `matplotlib.figure.Figure`, and the labels of its markers as `matplotlib.text.Annotation`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(8.0, 5.2 + 0.12 * max(0, len(points) - 10))
    axes = figure.add_subplot()
    for point in points:
        shape = SHAPES[point.shape % len(SHAPES)]
        axes.plot(point.x, point.y, shape, color=point.hue, markersize=8, markeredgecolor=GROUND, markeredgewidth=0.8)
    _set_axes(axes, points)
    if rule is not None:
        axes.axvline(rule, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    _write(figure, axes, words)
    return figure, _label(figure, axes, points)


def _set_axes(axes: Any, points: Sequence[Point]) -> None:
    ticker = require("matplotlib.ticker", "matplotlib", "A plot")
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs, ys = [point.x for point in points], [point.y for point in points]
    # Room for the labels: half of the range, and never less than half an octave across and half a decade up.
    x_room = max((max(xs) / min(xs)) ** 0.25, 1.5)
    y_room = max((max(ys) / min(ys)) ** 0.12, 3.0)
    axes.set_xlim(min(xs) / x_room, max(xs) * x_room)
    axes.set_ylim(min(ys) / y_room, max(ys) * y_room)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    dress(axes)


def _write(figure: Any, axes: Any, words: Words) -> None:
    axes.set_title(words.title, loc="left", color=INK, fontsize=13, pad=22)
    axes.text(0.0, 1.02, words.subtitle, transform=axes.transAxes, color=_PALE, fontsize=10)
    axes.set_xlabel(words.x, color=INK)
    axes.set_ylabel(words.y, color=INK)
    if words.footnote:
        figure.text(0.02, 0.015, words.footnote, color=_PALE, fontsize=8.5, wrap=True)
    figure.subplots_adjust(left=0.11, right=0.975, top=0.87, bottom=0.17 if words.footnote else 0.12)


def _label(figure: Any, axes: Any, points: Sequence[Point]) -> list[Any]:
    """A label beside each marker: the nearest place where it covers no marker, no other label and no edge."""
    transforms = require("matplotlib.transforms", "matplotlib", "A plot")
    backend = require("matplotlib.backends.backend_agg", "matplotlib", "A plot")
    renderer = backend.FigureCanvasAgg(figure).get_renderer()
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [transforms.Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    line = {"arrowstyle": "-", "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
    labels = []
    for point in points:
        label = axes.annotate(
            point.label,
            (point.x, point.y),
            xytext=(0, 0),
            textcoords="offset points",
            color=INK,
            fontsize=10,
            va="center",
            arrowprops={**line, "color": point.hue},
        )
        for offset_x, offset_y, side in _places():
            label.set_position((offset_x, offset_y))
            label.set_horizontalalignment(side)
            box = text_box(label, renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        labels.append(label)
    return labels


def text_box(label: Any, renderer: Any) -> Any:
    """Where a label's words are drawn, without the line to its marker.

    Args:
        label: A `matplotlib.text.Annotation`.
        renderer: The renderer of its figure.

    Returns:
        A `matplotlib.transforms.Bbox` in pixels.
    """
    text = require("matplotlib.text", "matplotlib", "A plot")
    label.update_positions(renderer)
    return text.Text.get_window_extent(label, renderer)


def _places() -> list[tuple[float, float, str]]:
    """Offset in points and alignment: rings around the marker, from the right and left outwards."""
    angles = sorted((2 * math.pi * k / _DIRECTIONS for k in range(_DIRECTIONS)), key=lambda a: abs(math.sin(a)))
    return [
        (ring * _FIRST_RING * math.cos(a), ring * _FIRST_RING * math.sin(a), _side(math.cos(a)))
        for ring in range(1, _RINGS + 1)
        for a in angles
    ]


def _side(cosine: float) -> str:
    return "center" if abs(cosine) < 1e-9 else ("left" if cosine > 0 else "right")


@dataclass(frozen=True)
class Panel:
    """Curves over one axis.

    Args:
        title: Above them.
        curves: Their values by what they are called; one without any finite value is left out.
        level: Where a horizontal line stands.

    Example:
        >>> Panel("deq", {"symmetric": (0.99, 0.9)}, level=0.99).curves["symmetric"]
        (0.99, 0.9)
    """

    title: str
    curves: Mapping[str, Sequence[float]]
    level: float


def draw_panels(panels: Sequence[Panel], abscissae: Sequence[float], x: str, y: str, level: str) -> Any:
    """Panels of curves beside each other, over a logarithmic axis.

    Args:
        panels: What to draw.
        abscissae: Where all curves have their values.
        x: Along the horizontal axis.
        y: Along the vertical axis.
        level: What the horizontal lines are called.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(6.4 * len(panels), 4.4)
    figure.set_layout_engine("constrained")
    for k, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), k + 1)
        dress(axes)
        for (name, values), colour, marker in zip(panel.curves.items(), COLOURS[1:], SHAPES, strict=False):
            if any(math.isfinite(value) for value in values):
                axes.plot(abscissae, values, color=colour, marker=marker, label=name)
        axes.axhline(panel.level, color="black", linestyle="--", linewidth=1, label=level)
        axes.set_xscale("log")
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.set_title(panel.title, loc="left", fontsize="medium", color=INK)
        axes.legend(frameon=False, labelcolor=INK)
    return figure
