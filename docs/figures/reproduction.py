"""Error against steps of the rows of Table 1: `reproduction.svg` beside it, and a table for docs/reproduction.md.

`make figures` runs it. `python docs/figures/reproduction.py RUNS` first gathers the logs of runs into
`docs/results/reproduction/directions.json`: `RUNS` is the folder `runs` of a sweep, whose runs need not be finished.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from torchdeq_ep.measuring import COLOURS, SHAPES, dress, new_figure, save, write_text

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "reproduction"
DIRECTIONS, RECORD = RESULTS / "directions.json", RESULTS / "table1.json"
KEPT = ("test/error", "train/error", "nudge/unconverged", "nudge/iterations", "free/iterations")
LARGE = {
    "ep-one-sided:direction=up,beta=0.5": "one-sided, up",
    "ep-one-sided:beta=0.5": "one-sided, down",
    "ep:beta=0.5": "symmetric",
    "hep:n_points=4,beta=0.5": "four points",
    "ift": "exact",
}
"""The rows that are drawn, and what they are called."""

Run = dict[str, Any]


def gather(runs: Path) -> list[Run]:
    """What the logs of runs say at the end of each epoch."""
    found = []
    for config in sorted(runs.glob("*/config.yaml")):
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        epochs: dict[int, dict[str, float]] = {}
        for log in sorted(config.parent.glob("csv/version_*/metrics.csv")):
            with log.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    values = {name: float(row[name]) for name in KEPT if row.get(name)}
                    if values and row["epoch"]:
                        epochs.setdefault(int(row["step"]) + 1, {}).update(values)
        history = [{"step": step, **epochs[step]} for step in sorted(epochs) if "test/error" in epochs[step]]
        if history:
            found.append({"backward": settings["backward"], "seed": settings["seed_everything"], "history": history})
    return found


def table(runs: Sequence[Run]) -> str:
    """Test error of each run by the number of steps, in Markdown."""
    steps = sorted({row["step"] for run in runs for row in run["history"]})
    heads = ["nudge", "seed", *(f"{step} steps" for step in steps), "missed its tolerance"]
    lines = [heads, ["---"] * len(heads)]
    for run in sorted(runs, key=lambda run: (run["seed"], _place(run["backward"]))):
        errors = {row["step"]: row["test/error"] for row in run["history"]}
        missed = run["history"][-1].get("nudge/unconverged", math.nan)
        cells = [f"{errors[step]:.1f} %" if step in errors else "-" for step in steps]
        share = f"{missed:.0%}" if math.isfinite(missed) else "-"
        lines.append([f"`{run['backward']}`", str(run["seed"]), *cells, share])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _place(backward: str) -> tuple[int, str]:
    return (list(LARGE).index(backward) if backward in LARGE else len(LARGE)), backward


def curves(runs: Sequence[Run], measure: str) -> dict[str, list[tuple[int, float]]]:
    """Means over the seeds by the number of steps, of the rows that are drawn."""
    points: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        if run["backward"] in LARGE:
            for row in run["history"]:
                if measure in row:
                    points.setdefault(run["backward"], {}).setdefault(row["step"], []).append(row[measure])
    return {name: [(step, fmean(values)) for step, values in sorted(points[name].items())] for name in points}


def draw(panels: Sequence[tuple[str, dict[str, list[tuple[int, float]]]]], path: Path) -> None:
    """One panel beside the other, each row in its colour."""
    figure = new_figure(9.6, 4.2)
    figure.set_layout_engine("constrained")
    for k, (title, drawn) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), k)
        dress(axes)
        for place, (backward, name) in enumerate(LARGE.items()):
            if backward in drawn:
                xs, ys = zip(*drawn[backward], strict=True)
                axes.plot(
                    xs, ys, color=COLOURS[place + 1], marker=SHAPES[place], markersize=5, linewidth=1.8, label=name
                )
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set_xlabel("steps")
        axes.set_ylim(bottom=0)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """Gather if there is something to, print the table, draw."""
    if arguments:
        found = gather(Path(arguments[0]))
        if not found:
            sys.stderr.write(
                f"{arguments[0]} holds no run with a test error: the folder 'runs' of a sweep is wanted.\n"
            )
            return 2
        write_text(DIRECTIONS, json.dumps({"recipe": "table1", "runs": found}, indent=1) + "\n")
    runs = json.loads(DIRECTIONS.read_text(encoding="utf-8"))["runs"]
    record = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
    sys.stdout.write(table(runs))
    panels = [
        ("test error in percent, nudges of 0.5, as the code nudges", curves(runs, "test/error")),
        ("training error in percent, nudges of 0.5, three seeds", curves(record, "train/error")),
    ]
    draw(panels, HERE / "reproduction.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
