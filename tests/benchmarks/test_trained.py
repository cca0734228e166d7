"""Backward passes on ordinary models after training, where samples differ, at the options that come by default.

Untrained models have samples that are alike. These were trained by torchdeq for three epochs; the reference is
torchdeq's implicit differentiation as the models are configured, thirty plain steps. Products with `J^T` are counted to
a residual of 1e-3 over the whole state, with weights for each sample and with one set for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ordinary
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from test_backward import compare, quiet
from torch import Tensor, nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.extend import Equilibrium
from torchdeq_ep.state import Memory

CACHE = Path(__file__).parents[2] / "build" / "ordinary"
EPOCHS = 3
FIRST = 16


@cache
def trained(kind: str, seed: int = 0) -> nn.Module:
    """A model trained by torchdeq's own gradients; its weights are kept in `build/ordinary`."""
    model, file = ordinary.make(kind, seed), CACHE / f"{kind}-{seed}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file))
        return model
    ordinary.train(model, kind, seed, EPOCHS, on_step=lambda step: None)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def loss_of(model: nn.Module) -> Tensor:
    """The loss on a batch that comes next in the training."""
    images, labels = next(ordinary.digits().batches(seed=100, epochs=1))
    return functional.cross_entropy(model(images), labels)


@dataclass(frozen=True)
class _Kept(tep.ImplicitDifferentiation):
    """Implicit differentiation that keeps the equilibrium."""

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, tep.NudgeReport]:
        object.__setattr__(self, "kept", equilibrium)
        return super().solve(equilibrium)


def products(model: nn.Module, rows: bool) -> int:
    """Products with `J^T` to a residual of 1e-3."""
    mode = _Kept()
    with tep.use_backward(model, mode), quiet():
        loss_of(model).backward()
    kept: Equilibrium = vars(mode)["kept"]
    equilibrium = replace(kept, memory=Memory(), rows=kept.rows if rows else None)
    with quiet():
        _, report = tep.ImplicitDifferentiation(tol=1e-3, max_iter=200).solve(equilibrium)
    return report.iterations


@pytest.mark.parametrize("name", ["ift", "gmres", "one-step", "ep", "ep-one-sided", "aep"])
@pytest.mark.parametrize("kind", ["cnn", "pre-norm", "two-scale"])
def test_trained_model(benchmark: BenchmarkFixture, kind: str, name: str) -> None:
    benchmark.group = "trained"
    model = trained(kind)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = loss_of(model)
    handle = tep.use_backward(model, name)
    loss = loss_of(model)

    def gradient(of: Tensor) -> Any:
        return torch.autograd.grad(of, parameters, retain_graph=True, allow_unused=True)

    with quiet():
        for _ in range(FIRST):  # in which more is measured than in a training step
            gradient(loss)
    compare(benchmark, lambda: gradient(loss), lambda: gradient(reference))
    (report,) = handle.last.values()
    handle.remove()
    benchmark.extra_info.update(
        model=kind,
        backward=name,
        calls=report.calls,
        residual=report.residual,
        rows_left=report.rows_left,
        products=products(model, rows=True),
        joint_products=products(model, rows=False),
    )
