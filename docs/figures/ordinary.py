"""Ordinary models trained through the switch: each in every mode, beside torchdeq's own implicit differentiation.

`make ordinary` runs this. Results are kept in `docs/results/ordinary.json`, and a run that is there is not repeated.
From them it writes the table of `docs/ordinary.md` and draws `ordinary.svg` beside this file.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdeq.solver import get_solver, register_solver

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning
from torchdeq_ep.measuring import COLOURS, INK, dress, new_figure, save, write_text
from torchdeq_ep.measuring.files import plain
from torchdeq_ep.measuring.style import FAINT
from torchdeq_ep.modes import Mode, NudgeReport
from torchdeq_ep.state import Equilibrium, Memory, cosine

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "benchmarks"), str(Path(__file__).parent)]
import ordinary as models  # noqa: E402  the module of that folder, not this script
from pages import insert  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "results" / "ordinary.json", ROOT / "docs" / "ordinary.md"
TRAINED = ROOT / "build" / "ordinary"
BEGIN, END = "<!-- The table is written by `make ordinary`. -->", "<!-- End of the table. -->"
EPOCHS = 3
TORCHDEQ = "torchdeq"
MODES = (TORCHDEQ, "ift", "ep", "ep-one-sided", "aep", "hep")
ANALYTIC = ("cnn-gelu", "post-norm", "pre-norm")
"""Models without a kink, which complex nudges accept."""
HEP_SEEDS = 2
"""A step takes four times as long."""
SHOWN_MODES = {TORCHDEQ: "torchdeq's IFT"}

Run = dict[str, Any]
Key = tuple[str, str, int, int]


def plan() -> Iterator[tuple[str, str, int]]:
    """What is run unless the command says otherwise: model, mode and seed, the most telling first."""
    seeds = {"cnn": 5, "cnn-gelu": 5}
    runs = [(kind, mode, seed) for kind in models.MODELS for seed in range(seeds.get(kind, 2)) for mode in MODES]
    turn = {"ep": 1, "ep-one-sided": 2, "hep": 3}
    runs.sort(key=lambda run: turn.get(run[1], 0))
    return (run for run in runs if run[1] != "hep" or (run[0] in ANALYTIC and run[2] < HEP_SEEDS))


@dataclass
class Recorder:
    """torchdeq's default solver of the backward pass, which counts its steps and keeps its last vector."""

    steps: int = 0
    vector: Tensor | None = None

    def __call__(self, func: Any, x0: Tensor, **options: Any) -> Any:
        def counted(x: Tensor) -> Tensor:
            self.steps += 1
            return func(x)  # type: ignore[no-any-return]

        result = get_solver("fixed_point_iter")(counted, x0, **options)
        self.vector = result[0]
        return result


@dataclass(frozen=True)
class Aligned(Mode):
    """A mode that compares the vector of another, or one that is given, with the exact adjoint, which it returns."""

    other: Mode | Tensor
    found: dict[str, float] = field(default_factory=dict)

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        if isinstance(self.other, Tensor):  # torchdeq takes the Jacobian one step further on
            with torch.no_grad():
                value = equilibrium.value
                equilibrium = replace(equilibrium, z=value, value=equilibrium.f(value).clone())
        exact, report = _tight().solve(replace(equilibrium, memory=Memory()))
        rows, height = equilibrium.rows, equilibrium.rows.count if equilibrium.rows else 1
        if isinstance(self.other, Tensor):
            vector = self.other.reshape(height, -1)
        else:
            solved = self.other.solve(replace(equilibrium, memory=Memory()))[0]
            vector = solved.reshape(1, -1) if rows is None else rows.split(solved.unsqueeze(0))
        reference = exact.reshape(1, -1) if rows is None else rows.split(exact.unsqueeze(0))
        each = functional.cosine_similarity(vector, reference, dim=1)
        self.found.update(
            alignment=cosine(vector, reference),
            alignment_of_median_sample=float(each.median()),
            reference_residual=report.residual,
        )
        return exact, report

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        raise NotImplementedError


def _tight() -> Mode:
    return tep.ImplicitDifferentiation(tol=1e-4, max_iter=200)


def run(kind: str, mode: str, seed: int, epochs: int) -> Run:
    """Train one model in one mode, and measure."""
    recorder = Recorder()
    register_solver("recorded", recorder)
    model = models.make(kind, seed, b_solver="recorded")
    handle = None if mode == TORCHDEQ else tep.use_backward(model, mode)
    calls: list[int] = []

    def after(_: int) -> None:
        if handle is None:
            calls.append(recorder.steps)
            recorder.steps = 0
        else:
            calls.append(sum(report.calls for report in handle.last.values()))

    result: Run = {"model": kind, "mode": mode, "seed": seed, "epochs": epochs, "exception": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wall, processor = time.perf_counter(), time.process_time()
        try:
            models.train(model, kind, seed, epochs, on_step=after)
        except Exception as error:
            result["exception"] = f"{type(error).__name__}: {error}"
        result.update(seconds=time.perf_counter() - wall, processor_seconds=time.process_time() - processor)
    kinds = [warning.category.__name__ for warning in caught if issubclass(warning.category, EPWarning)]
    result.update(
        steps=len(calls),
        accuracy=models.accuracy(model),
        calls_per_step=mean(calls) if calls else None,
        warnings=dict(Counter(kinds)),
        summary=handle.summary() if handle else None,
    )
    if handle:
        handle.remove()
    elif epochs == EPOCHS:
        TRAINED.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), TRAINED / f"{kind}-{seed}.pt")
    result.update(_alignment(model, mode, seed, epochs, recorder))
    return result


def _alignment(model: nn.Module, mode: str, seed: int, epochs: int, recorder: Recorder) -> dict[str, float]:
    """How the error vector on the last batch compares with the exact one, once the model is trained."""
    *_, (images, labels) = models.digits().batches(seed, epochs)

    def backward() -> None:
        functional.cross_entropy(model(images), labels).backward()

    other: Any = recorder.vector
    if mode == TORCHDEQ:
        backward()
        other = recorder.vector
    else:
        other = tep.get_backward(mode)
    aligned = Aligned(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with tep.use_backward(model, aligned):
                backward()
        except tep.errors.EPError as error:
            sys.stderr.write(f"no alignment: {error}\n")
    return aligned.found


def _source() -> str:
    """A digest of the package, which tells whether two runs had the same code."""
    files = sorted(Path(tep.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def measure(wanted: Iterable[tuple[str, str, int]], epochs: int, again: bool = False) -> list[Run]:
    """The runs that are there, and after them those that are wanted and are not."""
    runs: list[Run] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    done, source = {_key(found) for found in runs}, _source()
    for kind, mode, seed in wanted:
        key = (kind, mode, seed, epochs)
        if key in done and not again:
            continue
        found = run(kind, mode, seed, epochs)
        found["source"] = source
        runs = [*(earlier for earlier in runs if _key(earlier) != key), found]
        machine = {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "torchdeq_ep": tep.__version__,
        }
        write_text(RESULTS, json.dumps(plain({"name": "ordinary", "machine": machine, "runs": runs}), indent=1) + "\n")
        state = found["exception"] or f"{100 * found['accuracy']:.1f} % in {found['processor_seconds']:.0f} s"
        sys.stdout.write(f"{kind:10} {mode:13} {seed}  {state}\n")
        sys.stdout.flush()
    return [found for found in runs if found["epochs"] == epochs]


def _key(found: Run) -> Key:
    return found["model"], found["mode"], found["seed"], found["epochs"]


def grouped(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Runs by model and mode, in the order of the plan."""
    return {
        kind: {
            mode: sorted(found, key=_key)
            for mode in MODES
            if (found := [r for r in runs if (r["model"], r["mode"]) == (kind, mode)])
        }
        for kind in models.MODELS
        if any(found["model"] == kind for found in runs)
    }


def table(runs: Sequence[Run]) -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| model | mode | test accuracy, % | beside torchdeq's | seeds | seconds | calls a step | alignment | of the "
        "median sample |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, modes in grouped(runs).items():
        own = {found["seed"]: found["accuracy"] for found in modes.get(TORCHDEQ, [])}
        for mode, found in modes.items():
            paired = [r["accuracy"] - own[r["seed"]] for r in found if r["seed"] in own]
            beside = "" if mode == TORCHDEQ or not paired else f"{100 * mean(paired):+.1f}"
            lines.append(
                "| "
                + " | ".join(
                    (
                        f"`{kind}`",
                        SHOWN_MODES.get(mode, f"`{mode}`"),
                        f"{100 * mean(r['accuracy'] for r in found):.1f}",
                        beside,
                        str(len(found)),
                        f"{mean(r['processor_seconds'] for r in found):.2g}",
                        f"{mean(r['calls_per_step'] for r in found):.0f}",
                        _average(found, "alignment"),
                        _average(found, "alignment_of_median_sample"),
                    )
                )
                + " |"
            )
    return "\n".join(lines)


def _average(found: Sequence[Run], name: str) -> str:
    values = [r[name] for r in found if r.get(name) is not None]
    return f"{mean(values):.3f}" if values else "—"


def draw(runs: Sequence[Run], path: Path) -> None:
    """One panel a model: the accuracy of each seed, and the mean, beside torchdeq's."""
    panels = grouped(runs)
    columns, rows = 4, (len(panels) + 3) // 4
    figure = new_figure(11.0, 3.0 * rows)
    for index, (kind, modes) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        dress(axes)
        axes.grid(visible=False, axis="x")
        for mode, found in modes.items():
            at, colour = MODES.index(mode), COLOURS[MODES.index(mode)] if mode != "hep" else COLOURS[7]
            heights = [100 * r["accuracy"] for r in found]
            axes.plot([at] * len(heights), heights, "o", color=colour, markersize=4, alpha=0.55, mec="none")
            axes.plot([at - 0.3, at + 0.3], [mean(heights)] * 2, color=colour, linewidth=2.4)
            if mode == TORCHDEQ:
                axes.axhline(mean(heights), color=FAINT, linewidth=1, linestyle="--", zorder=0)
        axes.set_xlim(-0.6, len(MODES) - 0.4)
        axes.set_xticks(range(len(MODES)), MODES, rotation=90, fontsize=9)
        axes.set_title(kind, loc="left", color=INK, fontsize=12)
        if index % columns == 0:
            axes.set_ylabel("test accuracy, %", color=INK)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.95, bottom=0.17, wspace=0.24, hspace=0.62)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, write the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(models.MODELS), default=list(models.MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, help="by default 0 to 4 for the cnn, 0 and 1 for the others")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of 29 steps")
    parser.add_argument("--again", action="store_true", help="repeat runs that are there")
    parser.add_argument("--only-write", action="store_true", help="run nothing: write the table and draw the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [
        (kind, mode, seed)
        for kind, mode, seed in (
            plan()
            if options.seeds is None
            else ((k, m, s) for k in options.models for s in options.seeds for m in options.modes)
        )
        if kind in options.models and mode in options.modes and (mode != "hep" or kind in ANALYTIC)
    ]
    runs = measure([] if options.only_write else chosen, options.epochs, options.again)
    text = table(runs)
    sys.stdout.write(text + "\n")
    if options.epochs != EPOCHS:
        return
    if PAGE.exists():
        write_text(PAGE, insert(PAGE.read_text(), BEGIN, END, text))
    draw(runs, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
