"""`torchdeq-ep sweep`: a recipe over any of its keys, by one worker or many; one study, its figures and tables."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_choice, check_count, write_text
from torchdeq_ep_lightning import studies
from torchdeq_ep_lightning.axes import draw, grid, read_axes, specs_of
from torchdeq_ep_lightning.report import save_figures, write_page
from torchdeq_ep_lightning.training import check, find_recipe
from torchdeq_ep_lightning.trial import end_with_parent, train_apart

RESULTS = "results.json"
SAMPLERS = ("grid", "random", "tpe")
PRUNERS: dict[str, Callable[[], Any]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}
# Options that one worker may have otherwise than another. Images are compared by what they are.
_OF_A_MACHINE = ("--data.source", "--data.cache", "--data.workers", "--checkpoint_every", "--quiet")
_OF_THE_IMAGES = {f"data.{name}" for name in ("source", "train_split", "test_split", "image_column", "label_column")}
_LONGEST_NAME = 120
_WAIT = 0.5
_INTERRUPTED = 130


@dataclass(frozen=True)
class Sweep:
    """What all workers of a sweep do.

    Args:
        recipe: Name of a recipe, or the path of a YAML file.
        study: Name of the study.
        storage: Path or URL of its storage.
        out: Directory of the runs, the figures and the tables.
        overrides: Options of every run.
        axes: Values by key.
        sampler: One of `SAMPLERS`.
        trials: How many runs a sampler makes.
        pruner: One of `PRUNERS`.
        measure: What is minimised, and pruned by.
    """

    recipe: str
    study: str
    storage: str
    out: Path
    overrides: tuple[str, ...]
    axes: dict[str, list[str]]
    sampler: str
    trials: int
    pruner: str
    measure: str

    def open(self) -> tuple[optuna.Study, Any]:
        """The study and its storage."""
        storage = studies.open_storage(self.storage)
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        kind = samplers.get(self.sampler, optuna.samplers.RandomSampler)
        # Of the runs that are on their way, which TPE else would not know.
        options: dict[str, Any] = {"constant_liar": True} if self.sampler == "tpe" else {}
        return studies.open_study(self.study, storage, kind(**options), PRUNERS[self.pruner]()), storage

    def cells(self) -> list[dict[str, str]]:
        """The runs of a grid."""
        return grid(self.axes) if self.sampler == "grid" else []

    def options(self, cell: dict[str, str]) -> list[str]:
        """The options of `train` for a run."""
        own = list(itertools.chain.from_iterable((f"--{key}", value) for key, value in cell.items()))
        if "homeostasis.weight" in cell:
            own += ["--homeostasis.enabled", "false" if cell["homeostasis.weight"] == "0" else "true"]
        return [*self.overrides, *own, "--out", str(self.out / "runs" / run_name(cell)), "--quiet", "true"]


def run_name(cell: dict[str, str]) -> str:
    """A name for the directory of a run.

    Args:
        cell: Its options.

    Example:
        >>> run_name({"backward": "hep:n_points=4", "model.angle": "90", "seed": "1"})
        'hep_n_points=4-angle90-seed1'
    """
    parts = [value if key == "backward" else f"{key.rpartition('.')[2]}{value}" for key, value in cell.items()]
    text = "".join(c if c.isalnum() or c in "-._=" else "_" for c in "-".join(parts))
    if len(text) <= _LONGEST_NAME:
        return text or "run"
    return f"{text[:_LONGEST_NAME]}-{hashlib.sha256(studies.identity(cell).encode()).hexdigest()[:8]}"


def main(arguments: Sequence[str]) -> int:
    """Run `torchdeq-ep sweep`.

    Args:
        arguments: What follows `sweep`.

    Returns:
        The exit code: 0, 1 if a run failed, or 130 after Ctrl-C.
    """
    options, rest = _parser().parse_known_args(arguments)
    sweep = _read(options, rest)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    first = sweep.cells()[:1] or [{key: values[0] for key, values in sweep.axes.items() if ".." not in values[0]}]
    data = check(sweep.recipe, sweep.options(first[0]))
    study, storage = sweep.open()
    begun = studies.is_begun(study)
    is_one_set = not _OF_THE_IMAGES & sweep.axes.keys()
    _refuse_another(study, sweep, data.fingerprint() if is_one_set else "", begun)
    studies.ask_for(study, storage, sweep.cells(), options.retry or not begun)
    try:
        if options.jobs > 1:
            _work_together(sweep, options.jobs)
        _work(sweep)
    except KeyboardInterrupt:
        sys.stderr.write("\ntorchdeq-ep: stopped by Ctrl-C; the same command goes on where each run was.\n")
        return _INTERRUPTED
    rows = rows_of(study)
    written = _write(sweep, rows, _commands(study, list(arguments)))
    sys.stdout.write(f"written: {'  '.join(map(str, written))}\n")
    failed = [row for row in rows if row["failure"]]
    if failed:
        sys.stderr.write(
            f"torchdeq-ep: {len(failed)} of {len(rows)} runs failed, the first one because of "
            f"{failed[0]['failure'].partition(chr(10))[0]}\n--retry with the same command trains them once more.\n"
        )
    return int(bool(failed))


def _commands(study: optuna.Study, arguments: list[str]) -> list[list[str]]:
    """All commands that have added runs to a study, this one the last."""
    known: list[list[str]] = [command for command in study.user_attrs.get("commands", []) if command != arguments]
    study.set_user_attr("commands", [*known, arguments])
    return [*known, arguments]


def _read(options: argparse.Namespace, rest: list[str]) -> Sweep:
    find_recipe(options.recipe)
    for name in ("jobs", "trials"):
        check_count(f"--{name}", getattr(options, name), 0 if name == "trials" else 1)
    check_choice("--sampler", options.sampler, SAMPLERS)
    check_choice("--pruner", options.pruner, PRUNERS)
    fixed, more = read_axes(rest)
    axes = {"seed": [str(seed) for seed in options.seed], "backward": specs_of(options.backward, options.beta)}
    if options.angle:
        axes["model.angle"] = [f"{angle:g}" for angle in options.angle]
    if options.homeostasis:
        axes["homeostasis.weight"] = [f"{weight:g}" for weight in options.homeostasis]
    if options.sampler == "grid" and options.trials:
        raise InvalidOptionError("--trials N goes with --sampler random or tpe: a grid has as many runs as points.")
    if options.sampler != "grid" and not options.trials:
        raise InvalidOptionError(
            f"--sampler {options.sampler} goes with --trials N, which says how many runs it makes."
        )
    stem = Path(options.recipe).stem
    out = Path(options.out or Path("sweeps") / stem)
    return Sweep(
        options.recipe,
        options.study or out.name,
        options.storage or str(out / "study.journal"),
        out,
        tuple(fixed),
        axes | more,
        options.sampler,
        options.trials,
        options.pruner,
        options.measure,
    )


def _refuse_another(study: optuna.Study, sweep: Sweep, images: str, begun: bool) -> None:
    """A study is of one recipe and of the same options for every run: what is to differ is swept over."""
    now = {"recipe": Path(sweep.recipe).stem, "measure": sweep.measure, "images": images}
    for token, following in itertools.pairwise([*sweep.overrides, ""]):
        if token.startswith("--") and token not in _OF_A_MACHINE:
            now[token] = following
    before = study.user_attrs.get("options") if begun else None
    if before is None:
        study.set_user_attr("options", now)
        return
    before.setdefault("images", images)  # of a study of an earlier version
    if before == now:
        return
    key = min(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    differs = f"{key}={before.get(key)!r} in every run, not {now.get(key)!r}"
    raise InvalidOptionError(
        f"the study {sweep.study!r} in {sweep.storage} has {'other images' if key == 'images' else differs}: give "
        "another --study or --out. What a study is to go over has several values from its first command on."
    )


def _work_together(sweep: Sweep, jobs: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchdeq_ep_lightning.sweep"])
    workers = [context.Process(target=_work_apart, args=(sweep,)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _work_apart(sweep: Sweep) -> None:
    end_with_parent()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with contextlib.suppress(KeyboardInterrupt):
        _work(sweep)


def _work(sweep: Sweep) -> None:
    """Train what waits until nothing does, and nobody else's run can come back."""
    study, storage = sweep.open()
    while True:
        for number in studies.put_back(study, storage):
            sys.stdout.write(f"the worker of run {number} is gone: it waits for another\n")
        studies.ask_for(study, storage, sweep.cells())
        trial = studies.claim(study, storage) or _drawn(study, sweep)
        if trial is not None:
            _train(study, trial, sweep)
        elif not studies.state_of(study, TrialState.RUNNING, TrialState.WAITING):
            return
        else:
            time.sleep(_WAIT)


def _drawn(study: optuna.Study, sweep: Sweep) -> Trial | None:
    """A further run of a sampler, if there are to be more."""
    if sweep.sampler == "grid":
        return None
    counted = [trial for trial in studies.state_of(study) if not studies.is_returned(trial)]
    if len(counted) >= sweep.trials:
        return None
    trial = study.ask()
    if studies.is_surplus(study, trial, sweep.trials):
        return None
    seeds = sweep.axes["seed"]
    try:
        drawn = draw(trial, {key: values for key, values in sweep.axes.items() if key != "seed"})
    except ValueError as error:
        study.tell(trial, state=TrialState.FAIL)
        raise InvalidOptionError(
            f"the study {sweep.study!r} draws from other values ({error}): give another --study or --out."
        ) from error
    trial.set_user_attr(studies.CELL, {"seed": seeds[trial.number % len(seeds)], **drawn})
    return trial


def _train(study: optuna.Study, trial: Trial, sweep: Sweep) -> None:
    cell: dict[str, str] = trial.user_attrs[studies.CELL]
    _show_parameters(trial, cell, sweep)
    done = sum(other.state.is_finished() for other in studies.state_of(study) if not studies.is_returned(other))
    total = len(studies.state_of(study)) if sweep.sampler == "grid" else sweep.trials
    total -= sum(map(studies.is_returned, studies.state_of(study))) if sweep.sampler == "grid" else 0
    sys.stdout.write(f"[{done + 1}/{total}] {run_name(cell)}\n")
    sys.stdout.flush()

    def on_epoch(history: list[dict[str, float]]) -> bool:
        value = history[-1].get(sweep.measure)
        if value is None or sweep.pruner == "none":
            return False
        trial.report(value, int(history[-1]["epoch"]))
        return trial.should_prune()

    with studies.alive(trial):
        outcome, value = train_apart(sweep.recipe, sweep.options(cell), on_epoch)
        studies.finish(study, trial, outcome, value, sweep.measure)
    if outcome != "done":
        said = value.partition("\n")[0] if outcome == "failed" else f"after {len(value)} epochs"
        sys.stdout.write(f"  {outcome}: {said}\n")


def _show_parameters(trial: Trial, cell: dict[str, str], sweep: Sweep) -> None:
    """Give a trial that waited its parameters, which samplers and Optuna's own tools look at."""
    if trial.params:
        return
    for key, values in sweep.axes.items():
        # Values of an earlier sweep of the study may be others; what the run is does not depend on this.
        if cell.get(key) in values or (key in cell and sweep.sampler != "grid"):
            with contextlib.suppress(ValueError):
                draw(trial, {key: values})


def rows_of(study: optuna.Study) -> list[dict[str, Any]]:
    """The runs of a study that are done, for tables and figures.

    Args:
        study: The study.

    Returns:
        One row for each: its options, its measurements of each epoch, and why it failed, if it did.
    """
    rows: dict[str, dict[str, Any]] = {}
    for trial in studies.state_of(study):
        cell = trial.user_attrs.get(studies.CELL)
        if cell is None or not trial.state.is_finished() or studies.is_returned(trial):
            continue
        own = dict(cell)
        weight, angle = own.pop("homeostasis.weight", None), own.pop("model.angle", None)
        rows[studies.identity(cell)] = {
            "backward": own.pop("backward"),
            "angle": None if angle is None else float(angle),
            "homeostasis": weight if weight in (None, "auto") else float(weight),
            "seed": int(own.pop("seed")),
            "axes": own,
            "history": trial.user_attrs.get(studies.HISTORY, []),
            "failure": trial.user_attrs.get(studies.FAILURE, ""),
        }
    return sorted(rows.values(), key=lambda row: (row["seed"], row["backward"], repr(row)[:200]))


def _write(sweep: Sweep, rows: list[dict[str, Any]], commands: list[list[str]]) -> list[Path]:
    results, document = sweep.out / RESULTS, sweep.out / "results.md"
    sweep.out.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {"name": sweep.study, "recipe": sweep.recipe, "overrides": list(sweep.overrides)}
    plain |= {"command": commands[-1], "commands": commands, "runs": rows}
    write_text(results, json.dumps(plain, indent=1) + "\n")
    write_page(document, [plain])
    return [results, document, *save_figures(rows, Path(sweep.recipe).stem, sweep.out)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchdeq-ep sweep",
        description="Train a recipe over any of its keys: --KEY VALUE VALUE ... takes each, --KEY LOW..HIGH draws from "
        "a range, and an option with one value goes to every run, as for train. What has been trained is kept, and the "
        "same command, started again or elsewhere, does the rest.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or the path of a YAML file")
    parser.add_argument("--backward", nargs="+", default=["ift", "ep"], metavar="MODE", help="default: ift ep")
    parser.add_argument(
        "--beta", nargs="+", type=float, default=[], metavar="B", help="amplitudes, of modes that name none"
    )
    parser.add_argument("--angle", nargs="+", type=float, default=[], metavar="DEG", help="initial angles")
    parser.add_argument(
        "--homeostasis", nargs="+", type=float, default=[], metavar="W", help="weights; 0 is without homeostasis"
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--out", metavar="DIR", help="default: sweeps/RECIPE")
    parser.add_argument("--study", metavar="NAME", help="name of the study (default: that of the directory)")
    parser.add_argument(
        "--storage", metavar="URL", help="of a database, or the path of a file (default: study.journal in DIR)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="workers on this machine (default: 1)")
    parser.add_argument("--sampler", default="grid", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: grid)")
    parser.add_argument("--trials", type=int, default=0, metavar="N", help="runs of a sampler, over all workers")
    parser.add_argument("--pruner", default="none", metavar="NAME", help=f"{', '.join(PRUNERS)} (default: none)")
    parser.add_argument(
        "--measure", default="test/error", metavar="NAME", help="what is minimised, and pruned by (default: test/error)"
    )
    parser.add_argument("--retry", action="store_true", help="train runs again that failed")
    return parser
