"""A training step of the papers' network of Table 1, in calls of its bare map: free phase to optimiser.

Nothing is asserted about time. All modes take turns with forty calls of the bare map on the same batch, so that other
load meets all of them; times are those of the processor, since a long call is interrupted more often than a short one.
The network has been trained for some steps: on an untrained one nudges converge sooner. Images are scikit-learn's
digits, scaled to 28 x 28.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from test_backward import quiet
from torch import Tensor
from torch.nn import functional

import torchdeq_ep as tep

BATCH, STEPS, ROUNDS, CALLS = 50, 300, 15, 40
TARGETS = {"ep-one-sided:beta=0.05": 75, "ep:beta=0.05": 90, "ep:beta=0.5": 160, "hep:n_points=4,beta=0.5": 300}
"""Bare calls of the map that a step should take at most, on a machine with nothing else to do."""

Batch = tuple[Tensor, Tensor]


@dataclass
class Training:
    """The network of the recipe after some steps, and batches."""

    model: Any
    batches: list[Batch]

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """One step, as Lightning makes it."""
        loss = self.model.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        self.model.backward(loss)
        optimizer.step()

    def bare(self, batch: Batch) -> Callable[[], None]:
        """Calls of the map itself, without autograd."""
        network = self.model.network
        with torch.no_grad():
            f = network.map(batch[0].flatten(1))

        @torch.no_grad()
        def run() -> None:
            u = network.initial_state(BATCH)
            for _ in range(CALLS):
                u = f(u)

        return run

    def mode(self, spec: str) -> Any:
        """A mode with the options of the recipe."""
        lightning = pytest.importorskip("torchdeq_ep_lightning")
        options = {"metric": "network.nudge_metric", "amplitude": "per-sample", "on_divergence": "accept"}
        callback = lightning.SwapBackward(spec, max_iter=20, tol=1e-2, **options)
        return callback._mode(spec, self.model.network.nudge_metric, lambda: 1.0)


@cache
def trained() -> Training:
    """The network of Table 1 after a number of steps with exact gradients."""
    lightning = pytest.importorskip("torchdeq_ep_lightning")
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = functional.interpolate(images, size=28, mode="bilinear")
    labels = torch.as_tensor(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    batches = [(images[rows], labels[rows]) for rows in order.split(BATCH) if len(rows) == BATCH]
    options = {"hidden": [256, 256, 10], "damping": 0.5, "gain": 0.5, "free_tol": 1e-3}
    training = Training(lightning.VectorFieldClassifier((1, 28, 28), 10, **options), batches)
    optimizer = torch.optim.SGD(training.model.parameters(), 0.01, 0.9)
    with tep.use_backward(training.model, "ift", tol=1e-2), quiet():
        for k in range(STEPS):
            training.step(optimizer, batches[k % len(batches)])
    return training


def seconds(call: Callable[[], object]) -> float:
    """Time of the processor that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize("spec", ["ift", *TARGETS, "hep:n_points=4,beta=0.05", "ep-one-sided:beta=0.5"])
def test_training_step(benchmark: BenchmarkFixture, spec: str) -> None:
    benchmark.group = "training step"
    training = trained()
    optimizer = torch.optim.SGD(training.model.parameters(), 1e-12, 0.9)  # the network is to stay what it is
    times: dict[str, list[float]] = {"step": [], "bare": []}
    turns = iter(range(10**6))

    def batch() -> Batch:
        return training.batches[next(turns) % len(training.batches)]

    def step() -> None:
        chosen = batch()
        times["bare"].append(seconds(training.bare(chosen)) / CALLS)
        times["step"].append(seconds(lambda: training.step(optimizer, chosen)))

    with tep.use_backward(training.model, training.mode(spec)) as handle, quiet():
        for _ in range(3):  # in the first passes more is measured
            training.step(optimizer, batch())
        benchmark.pedantic(step, rounds=ROUNDS)
        (report,) = handle.last.values()
    bare = statistics.median(times["bare"])
    benchmark.extra_info.update(
        backward=spec,
        bare_calls=statistics.median(times["step"]) / bare,
        target=TARGETS.get(spec),
        bare_ms=1e3 * bare,
        calls=report.calls,
    )
