"""The picture of a comparison: how wrong the gradient is against how long it took."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.measuring.files import check_writable, require
from torchdeq_ep.measuring.style import COLOURS, FAINT, GROUND, INK, SHAPES, dress, new_figure, save
from torchdeq_ep.measuring.tables import Comparison

_FORMATS = (".png", ".svg", ".pdf")


_SMALLEST_ERROR = 1e-16


_FIRST_RING, _RINGS, _DIRECTIONS = 9.0, 8, 16


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


def save_plot(comparison: Comparison, path: str | Path) -> None:
    """Draw the rows of a comparison, and save the picture.

    Args:
        comparison: What to draw.
        path: File to write; its suffix chooses the format.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InvalidOptionError: If the file cannot be written in this place or format, or no row has figures.
    """
    path = check_plot(path)
    figure, _ = draw(comparison)
    save(figure, path)


def draw(comparison: Comparison) -> tuple[Any, list[Any]]:
    """The figure itself, for a test or a notebook.

    Args:
        comparison: What to draw.

    Returns:
        A `matplotlib.figure.Figure`, and the labels of its markers as `matplotlib.text.Annotation`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InvalidOptionError: If no row has figures.
    """
    shown = [row for row in comparison.rows if math.isfinite(row.gradient_error) and math.isfinite(row.milliseconds)]
    if not shown:
        raise InvalidOptionError("there is nothing to draw: no mode of this comparison has an error and a time.")
    relative = comparison.baseline is not None
    figure = new_figure(8.0, 5.2 + 0.12 * max(0, len(shown) - 10))
    axes = figure.add_subplot()
    backwards = list(dict.fromkeys(row.backward for row in comparison.rows))
    solvers = list(dict.fromkeys(row.solver for row in comparison.rows))
    points = []
    for row in shown:
        x = comparison.relative_time(row) if relative else row.milliseconds
        y = max(row.gradient_error, _SMALLEST_ERROR)
        colour = COLOURS[backwards.index(row.backward) % len(COLOURS)]
        shape = SHAPES[solvers.index(row.solver) % len(SHAPES)]
        axes.plot(x, y, shape, color=colour, markersize=8, markeredgecolor=GROUND, markeredgewidth=0.8)
        points.append((x, y, row.label, colour))
    _set_axes(axes, points, relative)
    _set_words(figure, axes, comparison, relative)
    return figure, _label(figure, axes, points)


def _set_axes(axes: Any, points: list[tuple[float, float, str, str]], relative: bool) -> None:
    ticker = require("matplotlib.ticker", "matplotlib", "A plot")
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    # Room for the labels: half of the range, and never less than half an octave in time and half a decade in error.
    x_room = max((max(xs) / min(xs)) ** 0.25, 1.5)
    y_room = max((max(ys) / min(ys)) ** 0.12, 3.0)
    axes.set_xlim(min(xs) / x_room, max(xs) * x_room)
    axes.set_ylim(min(ys) / y_room, max(ys) * y_room)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    dress(axes)
    if relative:
        axes.axvline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)


def _set_words(figure: Any, axes: Any, comparison: Comparison, relative: bool) -> None:
    axes.set_title("How exact and how fast is each backward pass?", loc="left", color=INK, fontsize=13, pad=22)
    axes.text(
        0.0, 1.02, "lower is more exact, further left is faster", transform=axes.transAxes, color="#555555", fontsize=10
    )
    time = "time of the backward solve, relative to implicit differentiation (ift)"
    axes.set_xlabel(time if relative else "time of the backward solve in milliseconds", color=INK)
    axes.set_ylabel("relative error of the gradient", color=INK)
    failed = [row for row in comparison.rows if row.error]
    if failed:
        reasons = ", ".join(f"{row.label} ({row.error.partition(':')[0]})" for row in failed)
        figure.text(0.02, 0.015, f"Not shown: {reasons}", color="#555555", fontsize=8.5, wrap=True)
    figure.subplots_adjust(left=0.11, right=0.975, top=0.87, bottom=0.17 if failed else 0.12)


def _label(figure: Any, axes: Any, points: list[tuple[float, float, str, str]]) -> list[Any]:
    """A label beside each marker: the nearest place where it covers no marker, no other label and no edge."""
    transforms = require("matplotlib.transforms", "matplotlib", "A plot")
    backend = require("matplotlib.backends.backend_agg", "matplotlib", "A plot")
    renderer = backend.FigureCanvasAgg(figure).get_renderer()
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform(point[:2]) for point in points]
    taken = [transforms.Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    labels = []
    for x, y, text, colour in points:
        label = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            color=INK,
            fontsize=10,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
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
