"""What the runs of sweeps amount to: the papers' figures, and a page of tables."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import COLOURS, SHAPES, dress, new_figure, save, write_text

RunRow = dict[str, Any]
Series = dict[str, list[tuple[float, "Spread"]]]

_TITLE = "# Reproduction\n\n"
MARK = "<!-- What follows is written by torchdeq_ep_lightning.report. -->\n\n"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; the latter is 0 for a single one.

    Args:
        mean: The mean.
        sd: The standard deviation.

    Example:
        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, sd=1.4142135623730951)
    """

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def text(self, digits: int, unit: str = "") -> str:
        """`mean ± sd`, rounded."""
        return f"{self.mean:.{digits}f} ± {self.sd:.{digits}f}{unit}"


def label(row: RunRow) -> str:
    """What a run is called in tables and legends, without angle and seed."""
    weight = row["homeostasis"]
    others = "".join(f", {key} {value}" for key, value in row.get("axes", {}).items())
    return f"{row['backward']}{'' if weight is None else f', homeostasis {weight:g}'}{others}"


def series(rows: Sequence[RunRow], x: Callable[[RunRow, RunRow], float | None], measure: str, final: bool) -> Series:
    """Means and deviations over the seeds, by label and abscissa.

    Args:
        rows: Runs of a sweep.
        x: Abscissa of an epoch of a run, from the run and the epoch; `None` leaves it out.
        measure: Name of the measurement.
        final: Whether only the last epoch counts.

    Returns:
        Points in order, for each label.
    """
    gathered: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        for epoch in row["history"][-1:] if final else row["history"]:
            place = x(row, epoch)
            value = epoch.get(measure, math.nan)
            if place is not None and math.isfinite(value):
                gathered.setdefault(label(row), {}).setdefault(place, []).append(value)
    return {name: [(p, Spread.of(points[p])) for p in sorted(points)] for name, points in gathered.items()}


def save_figures(rows: Sequence[RunRow], title: str, out: Path) -> list[Path]:
    """Draw what there are data for: error against angle and epochs, cosine of each layer, symmetry.

    Args:
        rows: Runs of a sweep.
        title: What they are of.
        out: Directory.

    Returns:
        The files written.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    layers = sorted({name for row in rows for epoch in row["history"] for name in epoch if "/cosine" in name})
    by_epoch: Callable[[RunRow, RunRow], float | None] = lambda row, epoch: epoch["epoch"]  # noqa: E731
    by_angle: Callable[[RunRow, RunRow], float | None] = lambda row, epoch: row["angle"]  # noqa: E731
    panels = {
        "error-angle": [("test error in percent", series(rows, by_angle, "test/error", final=True))],
        "error-epochs": [("test error in percent", _by_angle(rows, by_epoch, "test/error"))],
        "cosine": [(_cosine_title(name), _by_angle(rows, by_epoch, name)) for name in layers],
        "symmetry": [("symmetry of the Jacobian", _by_angle(rows, by_epoch, "alignment/symmetry"))],
    }
    written = []
    for name, parts in panels.items():
        drawn = [(heading, curves) for heading, curves in parts if any(curves.values())]
        if drawn:
            path = out / f"{name}.png"
            _draw(drawn, title, "angle in degrees" if name == "error-angle" else "epoch", path)
            written.append(path)
    return written


def _by_angle(rows: Sequence[RunRow], x: Callable[[RunRow, RunRow], float | None], measure: str) -> Series:
    """Curves of each angle, named by it where there are several."""
    angles = sorted({row["angle"] for row in rows if row["angle"] is not None})
    if len(angles) < 2:
        return series(rows, x, measure, final=False)
    return {
        f"{name}, {angle:g}°": curve
        for angle in angles
        for name, curve in series([r for r in rows if r["angle"] == angle], x, measure, final=False).items()
    }


def _cosine_title(name: str) -> str:
    layer = name.partition("cosine/")[2]
    return f"cosine to the exact error vector{', ' + layer if layer else ''}"


def _draw(parts: Sequence[tuple[str, Series]], title: str, abscissa: str, path: Path) -> None:
    figure = new_figure(1.2 + 4.6 * len(parts), 4.6)
    figure.set_layout_engine("constrained")
    ticker = import_module("matplotlib.ticker")
    names = list(dict.fromkeys(name for _, curves in parts for name in curves))
    for k, (heading, curves) in enumerate(parts, start=1):
        axes = figure.add_subplot(1, len(parts), k)
        dress(axes)
        for name, curve in curves.items():
            place = names.index(name)
            colour, marker = COLOURS[place % len(COLOURS)], SHAPES[place % len(SHAPES)]
            xs = [x for x, _ in curve]
            low, high = ([spread.mean + sign * spread.sd for _, spread in curve] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
            means = [spread.mean for _, spread in curve]
            axes.plot(xs, means, color=colour, marker=marker, markersize=4, linewidth=1.8, label=name)
        axes.set_title(heading, loc="left", fontsize=10.5)
        axes.set_xlabel(abscissa)
        if abscissa == "epoch":
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.02, ha="left")
    save(figure, path)


def to_markdown(sweeps: Sequence[dict[str, Any]]) -> str:
    """Tables of sweeps, each under the command that made it.

    Args:
        sweeps: What `results.json` of each holds.

    Returns:
        A page in Markdown.
    """
    lines: list[str] = []
    for sweep in sweeps:
        command = shlex.join(["torchdeq-ep", "sweep", *sweep["command"]])
        lines += [f"## {sweep['name']}", "", "```console", f"$ {command}", "```", ""]
        lines += [_TABLE_HEAD, "|---|---|---|---|---|---|---|---|---|"]
        groups: dict[tuple[str, float | None], list[RunRow]] = {}
        for row in sweep["runs"]:
            groups.setdefault((label(row), row["angle"]), []).append(row)
        lines += [_line(name, angle, rows) for (name, angle), rows in groups.items()]
        failures = [
            # What happened; the advice that follows is in the results.
            f"* Failed: {label(row)}, seed {row['seed']}: {row['failure'].partition('. ')[0]}"
            for row in sweep["runs"]
            if row["failure"]
        ]
        lines += ["", *failures, *([""] if failures else [])]
    return _TITLE + "\n".join(lines).rstrip() + "\n"


_TABLE_HEAD = (
    "| gradient | initial angle | seeds | epochs | test error | of each seed | cosine | symmetry | seconds per step |"
)


def _line(name: str, angle: float | None, rows: Sequence[RunRow]) -> str:
    last = [row["history"][-1] for row in rows if row["history"]]

    def cell(measure: str, digits: int, unit: str = "") -> str:
        values = [epoch[measure] for epoch in last if math.isfinite(epoch.get(measure, math.nan))]
        return Spread.of(values).text(digits, unit) if values else "-"

    speeds = [epoch["seconds"] / epoch["step"] for epoch in last]
    cells = [
        name,
        "-" if angle is None else f"{angle:g}°",
        str(len(last)),
        f"{max((epoch['epoch'] for epoch in last), default=0):g}",
        cell("test/error", 2, " %"),
        ", ".join(f"{epoch['test/error']:.2f}" for epoch in last if "test/error" in epoch) or "-",
        cell("alignment/cosine", 3),
        cell("alignment/symmetry", 3),
        Spread.of(speeds).text(3) if speeds else "-",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Write one page of several sweeps: `python -m torchdeq_ep_lightning.report PAGE RESULTS.json ...`.

    What a page that exists has before the line `MARK` is kept.

    Args:
        arguments: The page, and the results of each sweep.

    Returns:
        The exit code.
    """
    import json

    if len(arguments) < 2:
        sys.stderr.write("usage: python -m torchdeq_ep_lightning.report PAGE.md RESULTS.json ...\n")
        return 2
    page, *files = (Path(argument) for argument in arguments)
    try:
        sweeps = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    except (OSError, ValueError) as error:
        raise InvalidOptionError(f"cannot read the results of a sweep: {error}") from error

    head, mark, _ = page.read_text(encoding="utf-8").partition(MARK) if page.is_file() else ("", "", "")
    tables = to_markdown(sweeps)
    write_text(page, head + mark + tables.removeprefix(_TITLE) if mark else tables)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
