"""Models of torchdeq's own zoo, switched: their gradient in every mode, beside the one they were published with.

`make zoo ZOO=path` runs this on a checkout of https://github.com/locuslab/torchdeq, each model in a process of its own.
It keeps the figures in `docs/results/zoo.json` and writes the tables of `docs/zoo.md` from them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning
from torchdeq_ep.measuring import Comparison, capture, write_text
from torchdeq_ep.measuring.files import plain
from torchdeq_ep.state import cosine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import zoo_models as zoo  # noqa: E402
from pages import insert  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "results" / "zoo.json", ROOT / "docs" / "zoo.md"
BEGIN, END = "<!-- The {} table is written by `make zoo`. -->", "<!-- End of the {} table. -->"
MODES = ("ift", "aep", "ep", "one-step")
STEPS, TRAINED = 3, 20
LONG = 1000
"""Milliseconds after which no further step is timed."""
EXACT = 0.01
"""An adjoint with a smaller residual can be compared with, and so can a gradient of `ift` with a smaller error."""
AT_REST = 0.01
"""A free phase that stops at a larger relative residual is at no equilibrium whose Jacobian could be trained."""
Found = dict[str, Any]


def measure(name: str, checkout: Path) -> Found:
    """All figures of one model; in a process of its own, since the zoo's packages share names."""
    entry = zoo.ZOO[name]
    found: Found = {"model": name, "family": entry.family, "options": entry.options, "error": None, "modes": {}}
    try:
        built = entry.make(checkout)
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-2)}
    found["done"] = built.done
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = tep.compare(built.model, built.batch, built.loss, list(MODES), repeats=1)
    found.update(
        reference=table.reference,
        reference_residual=table.reference_residual,
        free_residual=table.free_residual,
        spectral_radius=table.spectral_radius,
        state_entries=table.state_entries,
        own=_own(built, table),
    )
    milliseconds = _time(built)
    for row in table.rows:
        found["modes"][row.backward] = {
            "gradient_error": row.gradient_error,
            "gradient_cosine": row.gradient_cosine,
            "usable": row.usable,
            "own_milliseconds": milliseconds,
            **_steps(built, row.backward),
        }
    is_trainable = table.free_residual < AT_REST and not built.frozen
    found["homeostasis"] = _homeostasis(built) if is_trainable else {}
    return found


def _gradient(built: zoo.Built) -> list[Tensor]:
    """Of one step, from the same random state every time."""
    torch.manual_seed(zoo.SEED)
    built.model.zero_grad()
    built.loss(built.model, built.batch).backward()
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in _parameters(built.model)]


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _own(built: zoo.Built, table: Comparison) -> Found:
    """How the gradient that the model was published with compares with the exact one, and with that of `ift`."""
    with (
        capture.trying(built.model, built.batch, built.loss, _parameters(built.model)) as trial,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        exact, _ = trial.gradient(tep.get_backward("ift"))
        without, _ = trial.gradient(lambda f, z, g: torch.zeros_like(z))
        own, _ = trial.gradient(None)
    reached = [k for k, pair in enumerate(zip(exact, without, strict=True)) if not torch.equal(*pair)]
    joined = [torch.cat([gradient[k].flatten() for k in reached]) for gradient in (own, exact)]
    error, _ = table.own_errors
    is_exact = table.rows[0].gradient_error < EXACT
    return {"gradient_error": error, "gradient_cosine": cosine(*joined) if is_exact else math.nan}


def _steps(built: zoo.Built, mode: str) -> Found:
    """A few steps as in training: what they cost beside steps of the model's own, and what is said."""
    state = {key: value.clone() for key, value in built.model.state_dict().items()}
    result: Found = {"error": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with tep.use_backward(built.model, mode) as handle:
                _gradient(built)
                result["milliseconds"] = _time(built)
        except tep.errors.EPError as error:
            result["error"] = capture.short(error)
    built.model.load_state_dict(state)
    said = [warning.message for warning in caught if issubclass(warning.category, EPWarning)]
    result["warnings"] = dict(Counter(type(message).__name__ for message in said))
    result["said"] = list(dict.fromkeys(capture.short(message) for message in said))
    reports = list(handle.last.values())
    if reports:
        result.update(
            calls=sum(report.calls for report in reports),
            adjoint_residual=max(report.adjoint_residual for report in reports),
            inconsistency=max(report.inconsistency for report in reports),
            summary=handle.summary(),
        )
    return result


def _time(built: zoo.Built) -> float:
    times: list[float] = []
    while len(times) < STEPS and sum(times) < LONG:
        start = time.perf_counter()
        _gradient(built)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _homeostasis(built: zoo.Built) -> Found:
    """What `ep` is worth after some steps on the batch, without homeostasis and with it."""
    start = {key: value.clone() for key, value in built.model.state_dict().items()}
    result: Found = {}
    for key, weight in (("without", None), ("with", "auto")):
        built.model.load_state_dict(start)
        optimizer = torch.optim.Adam(_parameters(built.model), 1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with tep.use_backward(built.model, "ep", homeostasis=weight) as handle:
                    for _ in range(TRAINED):
                        optimizer.zero_grad()
                        loss = built.loss(built.model, built.batch)
                        loss.backward()
                        optimizer.step()
                (row,) = tep.compare(built.model, built.batch, built.loss, "ep", repeats=1).rows
                residuals = [report.adjoint_residual for report in handle.last.values()]
                result[key] = {
                    "loss": float(loss),
                    "gradient_error": row.gradient_error,
                    "gradient_cosine": row.gradient_cosine,
                    "adjoint_residual": max(residuals, default=math.nan),
                    "error": row.error or None,
                }
            except Exception as error:
                result[key] = {"error": capture.short(error)}
    built.model.load_state_dict(start)
    return result


def run(names: Sequence[str], checkout: Path) -> list[Found]:
    """Measure these models, and keep what is there of others."""
    kept = {found["model"]: found for found in _load()}
    for name in names:
        command = [sys.executable, __file__, str(checkout), "--measure", name]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        *_, last = finished.stdout.splitlines() or [""]
        try:
            kept[name] = json.loads(last)
        except json.JSONDecodeError:
            sys.exit(f"{name} ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
        sys.stdout.write(f"{name:20} {kept[name]['error'] or 'measured'}\n")
        sys.stdout.flush()
        models = [kept[name] for name in zoo.ZOO if name in kept]
        machine = {"cpu": platform.machine(), "threads": 1, "torch": torch.__version__, "torchdeq_ep": tep.__version__}
        write_text(RESULTS, json.dumps({"name": "zoo", "machine": machine, "models": models}, indent=1) + "\n")
    return _load()


def _load() -> list[Found]:
    return json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else []


def tables(models: Sequence[Found]) -> dict[str, str]:
    """The tables of the page, by name, in Markdown."""
    return {
        "model": _of_models(models),
        "mode": _of_modes(models),
        "homeostasis": _of_homeostasis(models),
        "build": _of_builds(models),
    }


def _of_models(models: Sequence[Found]) -> str:
    lines = [
        "| model | family | needed to be switched | entries of the state | free phase stops at | spectral radius | "
        "error of its own backward | cosine |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for found in models:
        cells = [f"`{found['model']}`", found["family"]]
        if found["error"]:
            cells += [f"could not be built: {found['error']}", *[""] * 5]
        else:
            refused = [f"`{mode}` refuses it" for mode, row in found["modes"].items() if row["error"]]
            cells += [
                "; ".join(["nothing", *refused]),
                f"{found['state_entries']:,}",
                _figure(found["free_residual"]),
                _figure(found["spectral_radius"], ".2f"),
                _figure(found["own"]["gradient_error"]) if _is_known(found) else "unknown",
                _figure(found["own"]["gradient_cosine"], ".3f") if _is_known(found) else "",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    measured = {found["model"] for found in models}
    for name, entry in zoo.ZOO.items():
        if name not in measured:
            lines.append(f"| `{name}` | {entry.family} | its figures are still to be measured | | | | | |")
    return "\n".join(lines)


def _of_modes(models: Sequence[Found]) -> str:
    lines = [
        "| model | mode | error | cosine | adjoint residual reported | calls | ms a step | torchdeq's own, ms | said |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for found in models:
        is_known = _is_known(found)
        for mode, row in found["modes"].items():
            said = [f"`{name}`" for name in row["warnings"]]
            if row["error"]:
                said.append(f"`{row['error'].partition(':')[0]}`")
            cells = [
                f"`{found['model']}`",
                f"`{mode}`",
                _figure(row["gradient_error"]) if is_known else "unknown",
                _figure(row["gradient_cosine"], ".3f") if is_known else "",
                _figure(row.get("adjoint_residual")),
                _figure(row.get("calls"), "d"),
                _figure(row.get("milliseconds"), ".0f"),
                _figure(row["own_milliseconds"], ".0f"),
                ", ".join(said),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_known(found: Found) -> bool:
    """Whether the exact gradient was found, with which others are compared."""
    return found["reference_residual"] < EXACT


def _of_homeostasis(models: Sequence[Found]) -> str:
    lines = [
        f"| model | error of `ep` after {TRAINED} steps | with homeostasis | cosine | with homeostasis |",
        "|---|---:|---:|---:|---:|",
    ]
    for found in models:
        if not found.get("homeostasis"):
            continue
        runs = [found.get("homeostasis", {}).get(key, {}) for key in ("without", "with")]
        figures = [
            _figure(run.get(name), form)
            for name, form in (("gradient_error", ".2g"), ("gradient_cosine", ".3f"))
            for run in runs
        ]
        failed = [f": {run['error']}" for run in runs if run["error"]]
        lines.append(f"| `{found['model']}`{''.join(dict.fromkeys(failed))} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _of_builds(models: Sequence[Found]) -> str:
    lines = ["| model | options, as its script has them | done so that it runs here |", "|---|---|---|"]
    for found in models:
        done = found["error"] or ". ".join(found["done"]) or "nothing"
        lines.append(f"| `{found['model']}` | `{found['options']}` | {done} |")
    return "\n".join(lines)


def _figure(value: float | None, form: str = ".2g") -> str:
    return "" if value is None else format(value, form)


def filled(page: str, models: Sequence[Found]) -> str:
    """The page with these tables between their marks."""
    for name, table in tables(models).items():
        page = insert(page, BEGIN.format(name), END.format(name), table)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of torchdeq's repository, with its folder deq-zoo")
    parser.add_argument("--models", nargs="+", choices=list(zoo.ZOO), default=list(zoo.ZOO))
    parser.add_argument("--measure", choices=list(zoo.ZOO), help="only this model, in this process, as a line of JSON")
    options = parser.parse_args(arguments)
    if not (options.checkout / "deq-zoo").is_dir():
        parser.error(f"{options.checkout} has no folder deq-zoo: git clone https://github.com/locuslab/torchdeq")
    torch.set_num_threads(1)
    if options.measure:
        sys.stdout.write("\n" + json.dumps(plain(measure(options.measure, options.checkout.resolve()))) + "\n")
        return
    models = run(options.models, options.checkout)
    write_text(PAGE, filled(PAGE.read_text(), models))


if __name__ == "__main__":
    main()
