"""`docs/benchmarks.md` from a recorded run: `python docs/_benchmarks.py docs/results/benchmarks/RUN.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "benchmarks.md"
RUNS = HERE / "results" / "benchmarks"

Row = dict[str, Any]

INTRODUCTION = """# Benchmarks

This page is made from [`{file}`](results/benchmarks/{file}), a run of `make bench` on {date}, by
`docs/_benchmarks.py`. Machine: {cpu}, {cores} cores, {threads} thread(s), torch {torch}, {gpu}.

All figures are ratios. Before each timed run comes a run of what it is compared with, so that other load on the machine
meets both; a ratio is that of the medians. Yours will differ: `make bench` writes `build/benchmark.json`, and
`python docs/_benchmarks.py build/benchmark.json` prints this page for it.

![Time and peak memory of each backward over those of torchdeq, by model; the line is at 1](figures/benchmarks.svg)
"""

SECTIONS = {
    "against torchdeq": """## Against torchdeq's implicit differentiation

One backward pass, from the loss to the gradient of all parameters. The reference is torchdeq's IFT with whichever of
its own solvers is fastest on that model. Each backward runs at the loosest tolerance at which its gradient is within
1e-3 of its limit in double precision: the exact gradient for `ift`, `aep` and torchdeq, that of vanishing nudges for
the others. `error` is what it reached; where it is above 1e-3, no tolerance was enough, since a one-sided nudge has a
truncation error of its own. Below 1 is faster, or less memory, than torchdeq. `of gradients` is the peak memory of the
parameter gradients alone, which every backward needs, over that of torchdeq's whole backward: no backward is below it.

Which of the two wins depends on the loss. EP solves with `J`, implicit differentiation with `J^T`, from the same
cotangent. If the map ends in a norm, as the convolutional block does, `J^T` removes the components of the cotangent
that the norm ignores in its first step, and `J` does not. With the regression loss, whose cotangent has much of them,
implicit differentiation needs far fewer steps.
""",
    "trained": """## Trained models

[Ordinary models](ordinary.md) after three epochs of training by torchdeq, at the options that come by default, over
torchdeq's implicit differentiation as the models are configured: thirty plain steps, whatever they reach. The first
passes, in which [more is measured](certificate.md#nudge-error), are left out. Samples differ there, and those whose
free phase stopped early are left where that warrants no more; `residual` is that of the whole batch. The last two
columns are the products with `J^T` to a residual of 1e-3, with weights for each sample and with one set for all.
""",
    "overhead": """## Overhead

A nudged solve (one-sided, to 1e-3) over the same calls of the bare map, at the states that the solve visited. `plain`
does not accelerate, `auto` is the default: it costs more per call and makes fewer calls. The last column is the time of
the solve in calls of the map.
""",
    "training gradient": """## One training gradient

The dense network, batch 50: free phase, nudged phases and parameter gradients together, in calls of the bare map. The
tolerances are the loosest with which the error is no larger than that of the papers' scheme of 150 free and 20 nudged
plain steps. A one-sided nudge cannot get there, and runs at the tightest ones.
""",
    "training step": """## A training step of the papers' network

Of the recipe [`table1`](train.md#recipes) on digits of 28 x 28 pixels, after 300 steps of training: free phase, nudged
phases, gradients and optimiser, in calls of the bare map, in time of the processor. `calls` are those of the nudged
phases of the last step.
""",
    "compiled map": """A call of that network's map compiled by `torch.compile` over an eager one, batch 50:
""",
    "scaling with N": """## Scaling

The time of a contour over that of four points, to 1e-4, on the dense network:
""",
    "scaling with batch": """The time of a symmetric solve over that at batch 50, to 1e-4, on the dense network:
""",
    "memory over iterations": """Peak memory of a symmetric solve that never converges, in units of the state:
""",
    "tiny": """## A tiny model

16 units and one sample, where the map costs next to nothing, over torchdeq's IFT at equal accuracy:
""",
    "certificate": """## The certificate

A backward pass of `ep` with its [certificate](certificate.md) over the same pass without it: one `J^T v` beside the
gradients of the parameters, and a few inner products.
""",
    "homeostasis": """## Homeostasis

Time that five probes add to a training step, over that of five products with `J`, five with `J^T`, and their backward;
and over the step without.
""",
    "homeostasis in chunks": """The penalty of the convolutional block, a few probes at a time, over all five at once:
""",
}

COLUMNS: dict[str, dict[str, str]] = {
    "against torchdeq": {
        "model": "model",
        "batch": "batch",
        "task": "task",
        "backward": "backward",
        "ratio": "time",
        "memory_ratio": "peak memory",
        "memory_ratio_of_gradients": "of gradients",
        "calls": "calls",
        "reference_calls": "calls of torchdeq",
        "reference": "fastest of torchdeq",
        "error": "error",
    },
    "trained": {
        "model": "model",
        "backward": "backward",
        "ratio": "time",
        "calls": "calls",
        "residual": "residual",
        "rows_left": "samples left",
        "products": "products",
        "joint_products": "with one set",
    },
    "overhead": {
        "model": "model",
        "solver": "solver",
        "ratio": "time / bare calls",
        "calls": "calls",
        "total": "total",
    },
    "training gradient": {
        "backward": "backward",
        "bare_calls": "bare calls",
        "error": "error",
        "error_of_170_steps": "error of 150 + 20 steps",
        "f_tol": "free tolerance",
        "tol": "nudged tolerance",
    },
    "training step": {"backward": "backward", "bare_calls": "bare calls", "target": "aim", "calls": "calls"},
    "compiled map": {"of_eager": "time"},
    "scaling with N": {"n_points": "N", "ratio": "time", "calls": "calls"},
    "scaling with batch": {"batch": "batch", "ratio": "time", "calls": "calls"},
    "memory over iterations": {"max_iter": "iterations", "states": "states"},
    "tiny": {"backward": "backward", "ratio": "time", "calls": "calls", "reference": "fastest of torchdeq"},
    "certificate": {
        "model": "model",
        "ratio": "time",
        "calls": "calls",
        "adjoint_residual": "adjoint residual",
        "nudge_error": "nudge error",
    },
    "homeostasis": {"kind": "model", "added_to_products": "over the products", "added_to_step": "over the step"},
    "homeostasis in chunks": {"chunk": "probes at a time", "time": "time", "memory": "peak memory"},
}


def page(run: dict[str, Any], file: str) -> str:
    """The Markdown of a run."""
    machine = run["machine_info"]
    gpu = machine["gpu"] or "no GPU"
    parts = [INTRODUCTION.format(**{**machine, "gpu": gpu}, file=file, date=run["datetime"][:10])]
    rows: dict[str, list[Row]] = {}
    for benchmark in run["benchmarks"]:
        info = dict(benchmark["extra_info"])
        if "total" in COLUMNS.get(benchmark["group"], {}):
            info["total"] = info["ratio"] * info["calls"]
        rows.setdefault(benchmark["group"], []).append(info)
    for group, text in SECTIONS.items():
        if group in rows:
            parts += [text, table(COLUMNS[group], rows[group])]
    return "\n".join(parts)


def table(columns: dict[str, str], rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [columns.values(), ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(line(cells) for cells in lines) + "\n"


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value < 0.005:
        return f"{value:.0e}"
    return f"{value:.2f}" if value < 20 else f"{value:.0f}"


def newest() -> Path:
    """The newest recorded run."""
    return max(RUNS.glob("*.json"))


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    sys.stdout.write(page(json.loads(given.read_text(encoding="utf-8")), given.name))
