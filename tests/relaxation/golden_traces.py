"""Maps on which the loop goes through all of its phases, and the residuals it must measure on them.

`python tests/relaxation/golden_traces.py` writes them anew, which is right only if the loop is meant to be another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.relaxation import Relaxation, iterate

RECORD = Path(__file__).with_name("golden_traces.json")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _linear(radius: float, **options: Any) -> Callable[[], Relaxation]:
    offset = _random(2, 12, seed=1)
    diagonal = torch.linspace(-0.3, radius, 12, dtype=torch.float64)

    def run() -> Relaxation:
        return iterate(lambda z: diagonal * z + offset, torch.zeros_like(offset), **{"scale": 4.0, **options})

    return run


def _tanh(norm: float, seed: int, **options: Any) -> Callable[[], Relaxation]:
    weight = _random(12, 12, seed=seed)
    weight = norm * (weight + weight.T) / torch.linalg.matrix_norm(weight + weight.T, 2)
    offset = 0.1 * _random(1, 12, seed=seed + 1)
    return lambda: iterate(lambda z: torch.tanh(z @ weight + offset), torch.zeros_like(offset), **options)


CASES: dict[str, Callable[[], Relaxation]] = {
    "fast": _linear(0.5, tol=1e-8),
    "slow, mixed": _linear(0.999, tol=1e-9, max_iter=300),
    "plain, with steps unseen": _linear(0.9, tol=1e-6, max_iter=300, memory=1),
    "short memory": _linear(0.99, tol=1e-8, max_iter=300, memory=3),
    "to its floor": _linear(0.95, tol=0.0, floor=1e-10, max_iter=300),
    "out of steps": _linear(0.999, tol=1e-12, max_iter=9),
    "diverging, plain": _linear(2.0, tol=1e-6, memory=1),
    "beyond one, accelerated": _linear(1.5, tol=1e-8, max_iter=200),
    "rows of their own scale": _linear(0.9, tol=1e-8, scale=lambda value: torch.linalg.vector_norm(value, dim=1)),
    **{f"stalling, {seed}": _tanh(2.5, seed, tol=1e-8, max_iter=160) for seed in range(6)},
}


def observed(result: Relaxation) -> dict[str, Any]:
    """What is compared."""
    return {
        "steps": result.steps,
        "diverged": result.diverged,
        "residual": result.residual,
        "trace": list(result.trace),
        "value": float(result.value.norm()),
    }


if __name__ == "__main__":
    RECORD.write_text(json.dumps({name: observed(run()) for name, run in CASES.items()}, indent=1) + "\n")
