"""What the runs of sweeps amount to: the papers' figures, and a page of tables."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torchdeq_ep.extend import COLOURS, SHAPES, dress, new_figure, save, write_text
from torchdeq_ep_lightning.resuming import latest

RunRow = dict[str, Any]
Series = dict[str, list[tuple[float, "Spread"]]]

_TITLE = "# Reproduction\n\n"
MARK = "<!-- What follows is written by torchdeq_ep_lightning.report. -->"
"""The line of a page above which everything is kept."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; the latter is 0 for a single one.

    Args:
        mean: The mean.
        sd: The standard deviation.
        count: Of how many.

    Example:
        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, sd=1.4142135623730951, count=2)
    """

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values))

    def text(self, digits: int, unit: str = "") -> str:
        """`mean ± sd`, rounded; the mean alone of a single run."""
        return f"{self.mean:.{digits}f}{'' if self.count < 2 else f' ± {self.sd:.{digits}f}'}{unit}"


def label(row: RunRow) -> str:
    """What a run is called in tables and legends, without angle and seed."""
    weight = row["homeostasis"]
    others = "".join(f", {key} {value}" for key, value in row.get("axes", {}).items())
    told = "" if weight is None else f", homeostasis {weight if isinstance(weight, str) else f'{weight:g}'}"
    return f"{row['backward']}{told}{others}"


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
        for epoch in [latest(row["history"], measure) or {}] if final else row["history"]:
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
        commands = [shlex.join(["torchdeq-ep", "sweep", *command]) for command in _commands(sweep)]
        lines += [f"## {sweep['name']}", "", "```console", *(f"$ {command}" for command in commands), "```", ""]
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
    return "\n".join(lines).rstrip() + "\n"


def _commands(sweep: dict[str, Any]) -> list[list[str]]:
    """All that have added runs to a study."""
    found: list[list[str]] = sweep.get("commands") or [sweep["command"]]
    return found


def write_page(page: Path, sweeps: Sequence[dict[str, Any]]) -> None:
    """Write the tables of sweeps below what a page has of its own.

    Args:
        page: A file in Markdown. What it has before the line `MARK` is kept; all of it, if it has no such line.
        sweeps: What `results.json` of each holds.
    """
    before = page.read_text(encoding="utf-8") if page.is_file() else _TITLE
    head = before.partition(MARK)[0].rstrip("\n")
    write_text(page, f"{head}\n\n{MARK}\n\n{to_markdown(sweeps)}")


_TABLE_HEAD = (
    "| gradient | initial angle | seeds | epochs | test error | of each seed | cosine | symmetry | seconds per step |"
)


def _line(name: str, angle: float | None, rows: Sequence[RunRow]) -> str:
    last = [row["history"][-1] for row in rows if row["history"]]
    tested = [latest(row["history"], "test/error") or row["history"][-1] for row in rows if row["history"]]

    def cell(measure: str, digits: int, unit: str = "") -> str:
        found = [(latest(row["history"], measure) or {}).get(measure, math.nan) for row in rows]
        values = [value for value in found if math.isfinite(value)]
        return Spread.of(values).text(digits, unit) if values else "-"

    speeds = [epoch["seconds"] / epoch["step"] for epoch in last]
    cells = [
        name,
        "-" if angle is None else f"{angle:g}°",
        str(len(last)),
        f"{max((epoch['epoch'] for epoch in tested), default=0):g}",
        cell("test/error", 2, " %"),
        ", ".join(f"{epoch['test/error']:.2f}" for epoch in tested if "test/error" in epoch) or "-",
        cell("alignment/cosine", 3),
        cell("alignment/symmetry", 3),
        Spread.of(speeds).text(3) if speeds else "-",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Write one page of several sweeps: `python -m torchdeq_ep_lightning.report PAGE RESULTS.json ...`.

    Args:
        arguments: The page, and the results of each sweep.

    Returns:
        The exit code: 2 if something cannot be read or written.
    """
    if len(arguments) < 2 or arguments[0].endswith(".json"):
        sys.stderr.write("usage: python -m torchdeq_ep_lightning.report PAGE.md RESULTS.json ...\n")
        return 2
    page, *files = map(Path, arguments)
    try:
        write_page(page, [_results(path) for path in files])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"torchdeq_ep_lightning.report: {error}\n")
        return 2
    return 0


def _results(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"name", "command", "runs"} <= found.keys():
        raise ValueError(f"{path} is not the results.json of a sweep.")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
