"""A training step of the papers' network of Table 1, in calls of its bare map: free phase to optimiser.

Nothing is asserted about time. All modes take turns with calls of the bare map on the same batch, so that other load
meets all of them; times are those of the processor, since a long call is interrupted more often than a short one.
Images are scikit-learn's digits, scaled to 28 x 28; docs/figures/steps.py does the same on MNIST.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional

STEPS, ROUNDS = 300, 15
SMALL = ["ep-one-sided:beta=0.05", "ep:beta=0.05", "hep:n_points=4,beta=0.05"]
LARGE = ["ep-one-sided:beta=0.5", "ep:beta=0.5", "hep:n_points=4,beta=0.5"]


@pytest.fixture(scope="module")
def steps(docs_script: Any) -> Any:
    """The script, which has the network, its steps and the targets."""
    return docs_script("figures/steps")


@pytest.fixture(scope="module")
def trained(steps: Any) -> Any:
    """The network of Table 1 after a number of steps with exact gradients."""
    pytest.importorskip("torchdeq_ep_lightning")
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = functional.interpolate(images, size=28, mode="bilinear")
    labels = torch.as_tensor(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    batches = [(images[rows], labels[rows]) for rows in order.split(steps.BATCH) if len(rows) == steps.BATCH]
    return steps.Training.of(batches, STEPS)


@pytest.mark.parametrize("spec", ["ift", *SMALL, *LARGE])
def test_training_step(benchmark: BenchmarkFixture, steps: Any, trained: Any, spec: str) -> None:
    benchmark.group = "training step"
    with trained.timed(spec) as (turn, times, handle):
        benchmark.pedantic(turn, rounds=ROUNDS)
        (report,) = handle.last.values()
    benchmark.extra_info.update(
        backward=spec,
        bare_calls=steps.in_bare_calls(times),
        target=steps.TARGETS.get(spec),
        bare_ms=statistics.median(times["bare"]),
        calls=report.calls,
    )


def test_compiled_map(benchmark: BenchmarkFixture, steps: Any, trained: Any) -> None:
    benchmark.group = "compiled map"
    eager, compiled = trained.bare(trained.batches[0]), trained.bare(trained.batches[0], torch.compile)
    compiled()
    before: list[float] = []

    def turn() -> None:
        before.append(steps.milliseconds(eager))

    after: list[float] = []
    benchmark.pedantic(lambda: after.append(steps.milliseconds(compiled)), setup=turn, rounds=ROUNDS)
    benchmark.extra_info.update(of_eager=statistics.median(after) / statistics.median(before))
