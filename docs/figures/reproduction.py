"""Error against steps of the rows of Table 1: `reproduction.svg` beside it, and a table for docs/reproduction.md.

`make figures` runs it. `python docs/figures/reproduction.py RUNS ..` first gathers the logs of runs into
`docs/results/reproduction/directions.json`: `RUNS` is the folder `runs` of a sweep, whose runs need not be finished. Of
two runs of one nudge and seed, the longer one counts.
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
DIRECTIONS = RESULTS / "directions.json"
KEPT = ("test/error", "train/error", "nudge/unconverged", "nudge/iterations", "free/iterations")
NAMES = {
    "ep-one-sided:direction=up": "one-sided, up",
    "ep-one-sided": "one-sided, down",
    "ep": "symmetric",
    "hep:n_points=4": "four points",
    "ift": "exact",
}
"""What gradients are called, in the order of the table."""
AMPLITUDES = (0.5, 0.05)
COLUMNS = (1000, 2000, 4000, 6000, 12000)
"""Steps in the table: of those that a run has."""

Run = dict[str, Any]


def gather(folders: Sequence[Path]) -> list[Run]:
    """What the logs of runs say at the end of each epoch, in the order of the table."""
    found: dict[tuple[str, int], Run] = {}
    for config in (config for folder in folders for config in sorted(folder.glob("*/config.yaml"))):
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        epochs: dict[int, dict[str, float]] = {}
        for log in sorted(config.parent.glob("csv/version_*/metrics.csv")):
            with log.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    values = {name: float(row[name]) for name in KEPT if row.get(name)}
                    if values and row["epoch"]:
                        epochs.setdefault(int(row["step"]) + 1, {}).update(values)
        history = [{"step": step, **epochs[step]} for step in sorted(epochs) if "test/error" in epochs[step]]
        run = {"backward": settings["backward"], "seed": settings["seed_everything"], "history": history}
        key = (run["backward"], run["seed"])
        if len(history) > len(found[key]["history"] if key in found else []):
            found[key] = run
    return sorted(found.values(), key=lambda run: (_place(run), run["seed"]))


def named(run: Run) -> tuple[str, float | None]:
    """The gradient of a run, and its amplitude, which the exact one has not."""
    mode, _, options = run["backward"].partition(":")
    values = dict(option.split("=") for option in options.split(",") if option)
    beta = values.pop("beta", None)
    return ":".join([mode, *(f"{name}={value}" for name, value in values.items())]), beta and float(beta)


def _place(run: Run) -> tuple[int, int]:
    name, beta = named(run)
    return [*AMPLITUDES, None].index(beta), list(NAMES).index(name)


def table(runs: Sequence[Run]) -> str:
    """Test errors of each nudge by the number of steps, one for each seed, in Markdown."""
    steps = [step for step in COLUMNS if any(row["step"] == step for run in runs for row in run["history"])]
    heads = ["nudge", "amplitude", "seeds", *(f"{step:,} steps" for step in steps), "missed its tolerance"]
    lines = [heads, ["---"] * len(heads)]
    for key in dict.fromkeys(named(run) for run in runs):
        group = [run for run in runs if named(run) == key]
        errors = [{row["step"]: row["test/error"] for row in run["history"]} for run in group]
        cells = [", ".join(f"{found[step]:.1f}" if step in found else "-" for found in errors) for step in steps]
        missed = [run["history"][-1].get("nudge/unconverged", math.nan) for run in group]
        share = f"{fmean(missed):.0%}" if math.isfinite(fmean(missed)) else "-"
        lines.append([NAMES[key[0]], str(key[1] or "-"), ", ".join(str(run["seed"]) for run in group), *cells, share])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw(runs: Sequence[Run], path: Path) -> None:
    """A panel for each amplitude, a line for each run, a colour for each nudge; exact gradients in both."""
    figure = new_figure(9.6, 4.2)
    figure.set_layout_engine("constrained")
    for k, amplitude in enumerate(AMPLITUDES, start=1):
        axes = figure.add_subplot(1, len(AMPLITUDES), k)
        dress(axes)
        for run in runs:
            name, beta = named(run)
            if beta in (amplitude, None):
                place = list(NAMES).index(name)
                xs, ys = zip(*((row["step"], row["test/error"]) for row in run["history"]), strict=True)
                style = {"color": COLOURS[place + 1], "marker": SHAPES[place], "markersize": 4, "linewidth": 1.4}
                axes.plot(xs, ys, alpha=0.8, label=NAMES[name], **style)
        axes.set_title(f"test error in percent, nudges of {amplitude:g}", loc="left", fontsize=10.5)
        axes.set_xlabel("steps")
        axes.set_ylim(bottom=0)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    order = [name for name in NAMES.values() if name in handles]
    figure.legend(
        [handles[name] for name in order], order, loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """Gather if there is something to, print the table, draw."""
    if arguments:
        found = gather([Path(folder) for folder in arguments])
        if not found:
            sys.stderr.write(
                f"{' '.join(arguments)} holds no run with a test error: the folder 'runs' of a sweep is wanted.\n"
            )
            return 2
        write_text(DIRECTIONS, json.dumps({"recipe": "table1", "runs": found}, indent=1) + "\n")
    runs = json.loads(DIRECTIONS.read_text(encoding="utf-8"))["runs"]
    sys.stdout.write(table(runs))
    draw(runs, HERE / "reproduction.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
