"""Fig. 3 of the papers: error, and alignment of the error vectors, against the initial angle of the backward weights.

`make figures` draws `angles.svg` and writes a table of docs/reproduction.md. `python docs/figures/angles.py RUNS ..`
first adds finished runs to `docs/results/reproduction/angles.json`: `RUNS` is the folder `runs` of a sweep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from torchdeq_ep.measuring import COLOURS, SHAPES, dress, new_figure, save, write_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pages import insert, markdown  # noqa: E402

PAGE = HERE.parent / "reproduction.md"
BEGIN, END = "<!-- The table is written by docs/figures/angles.py. -->", "<!-- End of the table of angles. -->"
ANGLES = HERE.parent / "results" / "reproduction" / "angles.json"
KEPT = ("step", "test/error", "alignment/cosine", "alignment/symmetry", "angle")
NAMES = {"ift": "exact", "ep-infinitesimal": "infinitesimal EP"}

Run = dict[str, Any]


def gather(folders: Sequence[Path], recorded: Sequence[Run] = ()) -> list[Run]:
    """Finished runs and what is recorded; of two of one kind, angle, seed and length, the one that is given."""
    found = {_key(run): run for run in recorded}
    for result in (path for folder in folders for path in sorted(folder.glob("*/result.json"))):
        settings = yaml.safe_load((result.parent / "config.yaml").read_text(encoding="utf-8"))
        plain = json.loads(result.read_text(encoding="utf-8"))
        history = [{name: epoch[name] for name in KEPT if name in epoch} for epoch in plain["history"]]
        run = {"backward": plain["backward"], "angle": settings["model"].get("angle", 0.0), "seed": plain["seed"]}
        run |= {"images": settings["data"].get("train_limit"), "history": history}
        found[_key(run)] = run
    return sorted(found.values(), key=_key)


def _key(run: Run) -> tuple[int, int, float, int]:
    return run["history"][-1]["step"], list(NAMES).index(run["backward"]), run["angle"], run["seed"]


def groups(runs: Sequence[Run]) -> dict[tuple[int, str, float], list[Run]]:
    """Runs by length, gradient and angle."""
    found: dict[tuple[int, str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run["history"][-1]["step"], run["backward"], run["angle"]), []).append(run)
    return found


def table(runs: Sequence[Run]) -> str:
    """Errors and alignments of each gradient, by length and angle, in Markdown."""
    heads = ["steps", "initial angle", "seeds", *(f"test error, {name}" for name in NAMES.values())]
    lines = [[*heads, "cosine at the start", "cosine at the end"], ["---"] * 7]
    found = groups(runs)
    for steps, angle in sorted({(steps, angle) for steps, _, angle in found}):
        both = [found.get((steps, backward, angle), []) for backward in NAMES]
        errors = [", ".join(f"{run['history'][-1]['test/error']:.1f}" for run in part) or "-" for part in both]
        seeds = ", ".join(str(run["seed"]) for run in max(both, key=len))
        cosines = [f"{_mean(both[-1], place):.2f}" if both[-1] else "-" for place in (0, -1)]
        lines.append([f"{steps:,}", f"{angle:g}°", seeds, *errors, *cosines])
    return markdown(lines)


def _mean(runs: Sequence[Run], place: int) -> float:
    return fmean(run["history"][place]["alignment/cosine"] for run in runs)


def draw(runs: Sequence[Run], path: Path) -> None:
    """The error of the longest runs against steps, a panel for each angle."""
    longest = max(run["history"][-1]["step"] for run in runs)
    chosen = [run for run in runs if run["history"][-1]["step"] == longest]
    angles = sorted({run["angle"] for run in chosen})
    figure = new_figure(3.4 * len(angles), 3.6)
    figure.set_layout_engine("constrained")
    for k, angle in enumerate(angles, start=1):
        axes = figure.add_subplot(1, len(angles), k)
        dress(axes)
        for run in chosen:
            if run["angle"] == angle:
                place = list(NAMES).index(run["backward"])
                xs, ys = zip(*((row["step"], row["test/error"]) for row in run["history"]), strict=True)
                style = {"color": COLOURS[place + 1], "marker": SHAPES[place], "markersize": 4, "linewidth": 1.6}
                axes.plot(xs, ys, label=NAMES[run["backward"]], **style)
        axes.set_title(f"test error in percent, {angle:g}°", loc="left", fontsize=10.5)
        axes.set_xlabel("steps")
        axes.set_ylim(0, 100)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)


def main(arguments: Sequence[str]) -> int:
    """Gather if there is something to, write the table, draw."""
    runs = json.loads(ANGLES.read_text(encoding="utf-8"))["runs"] if ANGLES.is_file() else []
    if arguments:
        runs = gather([Path(folder) for folder in arguments], runs)
        write_text(ANGLES, json.dumps({"recipe": "fig3", "runs": runs}, indent=1) + "\n")
    write_text(PAGE, insert(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(runs)))
    draw(runs, HERE / "angles.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
