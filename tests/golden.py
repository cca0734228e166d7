"""What every mode makes of the benchmark models, bit by bit: recorded before a change of structure, compared after it.

    python tests/golden.py record build/golden.json
    python tests/golden.py compare build/golden.json

Gradients are the same to the last bit on one machine with one version of torch only, so the record is not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from models import Case, make

import torchdeq_ep as tep

BATCHES = {"dense": 20, "convolutional": 2, "attention": 2, "graph": None, "tiny": 3}
SPECS = [*tep.available_backwards(), "ep:batching=vmap", "hep:n_points=6", "ep:max_iter=3", "ep:beta=1e-9"]
SPECS += [f"{mode}:solver={solver}" for mode in ("ift", "ep") for solver in ("plain", "anderson", "broyden")]


def observe(case: Case, spec: str) -> dict[str, Any]:
    """The gradient of one mode as a digest, its calls of the map, what it reports and what it warns of."""
    calls = 0
    step = case.model.recurrence if hasattr(case.model, "recurrence") else case.model.step

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return step(*arguments)

    reports = []
    torch.manual_seed(0)
    name = "recurrence" if hasattr(case.model, "recurrence") else "step"
    with warnings.catch_warnings(record=True) as caught, tep.use_backward(case.model, spec):
        warnings.simplefilter("always")
        setattr(case.model, name, counted)
        try:
            gradient = case.gradient(case.loss(lambda info: reports.append(info["report"])))
        except tep.errors.EPError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            delattr(case.model, name)
    report = reports[0]
    return {
        "gradient": hashlib.sha256(gradient.numpy().tobytes()).hexdigest(),
        "calls of f": calls,
        "report": {name: repr(getattr(report, name)) for name in REPORTED},
        "warnings": [str(warning.message) for warning in caught if issubclass(warning.category, tep.errors.EPWarning)],
    }


REPORTED = ("beta", "nudge", "calls", "iterations", "residual", "tol", "converged", "batching", "retries", "trace")


def observations() -> dict[str, Any]:
    """One for each model, dtype and mode."""
    torch.set_num_threads(1)
    found = {}
    for kind, batch in BATCHES.items():
        for dtype in ("float32", "float64"):
            case = make(kind, batch)
            case = case.double() if dtype == "float64" else case
            for spec in SPECS:
                found[f"{kind}, {dtype}, {spec}"] = observe(case, spec)
                print(f"{kind}, {dtype}, {spec}", flush=True)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The observations that are not the same, and in what."""
    return [
        f"{name}: {key}: {before[name].get(key)} -> {after.get(name, {}).get(key)}"
        for name in before
        for key in {**before[name], **after.get(name, {})}
        if before[name].get(key) != after.get(name, {}).get(key)
    ]


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    now = observations()
    if options.action == "record":
        options.file.parent.mkdir(exist_ok=True)
        options.file.write_text(json.dumps(now, indent=1))
        return 0
    changed = differences(json.loads(options.file.read_text()), now)
    print("\n".join(changed) or f"{len(now)} observations, all the same")
    return len(changed) > 0


if __name__ == "__main__":
    sys.exit(main())
