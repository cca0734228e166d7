"""Draw the newest recorded run of the benchmarks: time over torchdeq's, by model and mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchdeq_ep.measuring import COLOURS, INK, SHAPES, dress, new_figure, save

HERE = Path(__file__).parent
RUNS = HERE.parent / "results" / "benchmarks"
SHOWN = ("ift", "ep", "ep-one-sided", "aep", "hep:n_points=4")


def rows(run: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """What one group of benchmarks found."""
    return [benchmark["extra_info"] for benchmark in run["benchmarks"] if benchmark["group"] == group]


def panel(axes: Any, found: list[dict[str, Any]], measure: str, title: str) -> None:
    """One dot for each model and mode, on a line for each model."""
    dress(axes)
    names = list(dict.fromkeys(label(row) for row in found))
    for mode, colour, shape in zip(SHOWN, COLOURS[1:], SHAPES, strict=False):
        points = [(row[measure], names.index(label(row))) for row in found if row["backward"] == mode]
        if points:
            axes.plot(*zip(*points, strict=True), shape, color=colour, label=mode, linestyle="none")
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize="medium", color=INK)


def label(row: dict[str, Any]) -> str:
    """The name of a model in the picture."""
    parts = [row["model"], row.get("batch"), "regression" if row.get("task") == "regression" else None]
    return ", ".join(str(part) for part in parts if part)


def main() -> None:
    """Draw the figure."""
    run = json.loads(max(RUNS.glob("*.json")).read_text(encoding="utf-8"))
    untrained, trained = rows(run, "against torchdeq"), rows(run, "trained")
    figure = new_figure(9.0, 5.0)
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[7, 4])
    panel(figure.add_subplot(grid[0, 0]), untrained, "ratio", "time over torchdeq's, at equal accuracy")
    panel(figure.add_subplot(grid[0, 1]), untrained, "memory_ratio", "peak memory over torchdeq's")
    panel(figure.add_subplot(grid[1, 0]), trained, "ratio", "trained models: time, at default options")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", frameon=False, labelcolor=INK, title="mode")
    save(figure, HERE / "benchmarks.svg")


if __name__ == "__main__":
    main()
