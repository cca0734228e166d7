"""Error against steps of the rows of Table 1: `reproduction.svg` beside it, and two tables of docs/reproduction.md.

`make figures` runs it. `python docs/figures/reproduction.py RUNS ..` first adds the logs of runs to
`docs/results/reproduction/directions.json`: `RUNS` is the folder `runs` of a sweep, whose runs need not be finished;
those that are have their times as well. Of two runs of one nudge and seed, the longer one counts, and of two of the
same length the one that is given.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from torchdeq_ep.measuring import COLOURS, SHAPES, dress, new_figure, save, write_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pages import insert, markdown  # noqa: E402

PAGE = HERE.parent / "reproduction.md"
BEGIN, END = "<!-- The table is written by docs/figures/reproduction.py. -->", "<!-- End of the table. -->"
BEGIN_MEANS, END_MEANS = "<!-- The means are written by docs/figures/reproduction.py. -->", "<!-- End of the means. -->"
RESULTS = HERE.parent / "results" / "reproduction"
DIRECTIONS = RESULTS / "directions.json"
KEPT = ("test/error", "train/error", "nudge/unconverged", "nudge/iterations", "free/iterations")
NAMES = {
    "ep-one-sided:direction=up": "one-sided, up",
    "ep-one-sided": "one-sided, down",
    "ep": "symmetric",
    "hep:n_points=4": "four points",
    "hep:n_points=6": "six points",
    "hep-online:n_points=4,steps=60,periods=5": "online, four points",
    "ift": "exact",
}
"""What gradients are called, in the order of the table; others have their own names, and come last."""
AMPLITUDES = ("0.5", "0.05")
EXACT = ""
"""The amplitude of a gradient that has none."""
COLUMNS = (1000, 2000, 4000, 6000, 12000)
"""Steps in the table: of those that a run has."""

Run = dict[str, Any]


def gather(folders: Sequence[Path], recorded: Sequence[Run] = ()) -> list[Run]:
    """What the logs of runs say at the end of each epoch, beside what is recorded, in the order of the table."""
    found = {(run["backward"], run["seed"]): run for run in recorded}
    for config in (config for folder in folders for config in sorted(folder.glob("*/config.yaml"))):
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        epochs: dict[int, dict[str, float]] = {}
        for log in sorted(config.parent.glob("csv/version_*/metrics.csv")):
            with log.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    values = {name: float(row[name]) for name in KEPT if row.get(name)}
                    if values and row["epoch"]:
                        epochs.setdefault(int(row["step"]) + 1, {}).update(values)
        if (result := config.parent / "result.json").is_file():
            for row in json.loads(result.read_text(encoding="utf-8"))["history"]:
                epochs.setdefault(row["step"], {})["seconds"] = row["seconds"]
        history = [{"step": step, **epochs[step]} for step in sorted(epochs) if "test/error" in epochs[step]]
        run = {"backward": settings["backward"], "seed": settings["seed_everything"], "history": history}
        key = (run["backward"], run["seed"])
        if history and len(history) >= len(found[key]["history"] if key in found else []):
            found[key] = run
    return sorted(found.values(), key=lambda run: (_place(run), run["seed"]))


def named(run: Run) -> tuple[str, str]:
    """The gradient of a run, and its amplitude, as they were asked for."""
    mode, _, options = run["backward"].partition(":")
    values = dict(option.split("=") for option in options.split(",") if option)
    beta = values.pop("beta", EXACT)
    others = ",".join(f"{name}={value}" for name, value in values.items())
    return f"{mode}:{others}" if others else mode, beta


def _place(run: Run) -> tuple[int, str, int, str]:
    name, beta = named(run)
    amplitudes, names = [*AMPLITUDES, EXACT], list(NAMES)
    return (
        amplitudes.index(beta) if beta in amplitudes else len(amplitudes),
        beta,
        names.index(name) if name in names else len(names),
        name,
    )


def _name(run: Run) -> str:
    name, beta = named(run)
    return ", ".join(part for part in (NAMES.get(name, f"`{name}`"), beta) if part)


def means(runs: Sequence[Run]) -> str:
    """Mean test error and deviation over seeds after the most steps that all of them have, in Markdown."""
    amplitudes = [beta for beta in AMPLITUDES if any(named(run)[1] == beta for run in runs)]
    heads = ["nudge", *(part for beta in amplitudes for part in (f"test error at {beta}", "steps", "ms a step"))]
    lines = [heads, ["---"] * len(heads)]
    for name in NAMES:
        group = [run for run in runs if named(run)[0] == name]
        if group:
            cells = [_mean([run for run in group if named(run)[1] in (beta, EXACT)]) for beta in amplitudes]
            lines.append([NAMES[name], *(cell for part in cells for cell in part)])
    return markdown(lines)


def _mean(group: Sequence[Run]) -> list[str]:
    if not group:
        return ["-"] * 3
    errors = [{row["step"]: row["test/error"] for row in run["history"]} for run in group]
    step = max(set.intersection(*map(set, errors)))
    last = [found[step] for found in errors]
    deviation = f" ± {stdev(last):.1f}" if len(last) > 1 else ""
    timed = [run["history"][-1] for run in group if "seconds" in run["history"][-1]]
    times = f"{1000 * fmean(row['seconds'] / row['step'] for row in timed):.0f}" if timed else "-"
    return [f"{fmean(last):.1f}{deviation}", f"{step:,}", times]


def table(runs: Sequence[Run]) -> str:
    """Test errors of each nudge by the number of steps, one for each seed, in Markdown."""
    steps = [step for step in COLUMNS if any(row["step"] == step for run in runs for row in run["history"])]
    heads = ["nudge", "seeds", *(f"{step:,} steps" for step in steps), "missed"]
    lines = [heads, ["---"] * len(heads)]
    for name in dict.fromkeys(_name(run) for run in runs):
        group = [run for run in runs if _name(run) == name]
        errors = [{row["step"]: row["test/error"] for row in run["history"]} for run in group]
        cells = [", ".join(f"{found[step]:.1f}" if step in found else "-" for found in errors) for step in steps]
        missed = fmean(run["history"][-1].get("nudge/unconverged", math.nan) for run in group)
        share = f"{missed:.0%}" if math.isfinite(missed) else "-"
        lines.append([name, ", ".join(str(run["seed"]) for run in group), *cells, share])
    return markdown(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    """A panel for each amplitude, a line for each run, a colour for each nudge; exact gradients in both."""
    figure = new_figure(9.6, 4.2)
    figure.set_layout_engine("constrained")
    for k, amplitude in enumerate(AMPLITUDES, start=1):
        axes = figure.add_subplot(1, len(AMPLITUDES), k)
        dress(axes)
        for run in runs:
            name, beta = named(run)
            if beta in (amplitude, EXACT) and name in NAMES:
                place = list(NAMES).index(name)
                xs, ys = zip(*((row["step"], row["test/error"]) for row in run["history"]), strict=True)
                style = {"color": COLOURS[place + 1], "marker": SHAPES[place], "markersize": 4, "linewidth": 1.4}
                axes.plot(xs, ys, alpha=0.8, label=NAMES[name], **style)
        axes.set_title(f"test error in percent, nudges of {amplitude}", loc="left", fontsize=10.5)
        axes.set_xlabel("steps")
        axes.set_ylim(bottom=0)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    order = [name for name in NAMES.values() if name in handles]
    figure.legend(
        [handles[name] for name in order], order, loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """Gather if there is something to, write the table, draw."""
    runs = json.loads(DIRECTIONS.read_text(encoding="utf-8"))["runs"]
    if arguments:
        found = gather([Path(folder) for folder in arguments])
        if not found:
            sys.stderr.write(
                f"{' '.join(arguments)} holds no run with a test error: the folder 'runs' of a sweep is wanted.\n"
            )
            return 2
        runs = gather([Path(folder) for folder in arguments], runs)
        write_text(DIRECTIONS, json.dumps({"recipe": "table1", "runs": runs}, indent=1) + "\n")
    page = insert(PAGE.read_text(encoding="utf-8"), BEGIN_MEANS, END_MEANS, means(runs))
    write_text(PAGE, insert(page, BEGIN, END, table(runs)))
    draw(runs, HERE / "reproduction.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
