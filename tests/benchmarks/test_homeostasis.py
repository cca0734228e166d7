"""What homeostasis adds to a training step, beside the products that it is made of, and what probes in chunks save.

Nothing is asserted about time. `extra_info` holds ratios, medians over nine rounds: the time added, over that of
`probes` products with `J`, with `J^T`, and their backward pass; and over a training step without homeostasis.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import pytest
import torch
import torchdeq
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from torchdeq_ep.host.homeostasis import register_homeostasis
from torchdeq_ep.jacobian import symmetry_penalty
from torchdeq_ep.measuring.comparison import peak_memory

PROBES = 5


class Block(nn.Module):
    """A DEQ over one layer: dense, or two convolutions with a group norm between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "dense":
            self.start = torch.randn(50, 522)
            self.layer: nn.Module = nn.Sequential(nn.Linear(522, 522), nn.Tanh())
        else:
            c = 32
            self.start = torch.randn(8, c, 16, 16)
            convolutions = [nn.Conv2d(c, c, 3, padding=1) for _ in range(2)]
            self.layer = nn.Sequential(convolutions[0], nn.GroupNorm(8, c), nn.Softplus(), convolutions[1], nn.Tanh())
        self.deq = torchdeq.get_deq(ift=True, f_max_iter=20, f_tol=1e-5, b_max_iter=20, b_tol=1e-5)

    def f(self, z: Tensor) -> Tensor:
        value: Tensor = 0.3 * self.layer(z) + 0.1 * self.start
        return value

    def forward(self) -> Tensor:
        states, _ = self.deq(self.f, torch.zeros_like(self.start))
        state: Tensor = states[-1]
        return state


def products(model: Block) -> None:
    """The naive parts: `probes` times a product with `J`, one with `J^T`, and the backward pass through both."""
    z = torch.zeros_like(model.start)
    total = torch.zeros(())
    for _ in range(PROBES):
        probe = torch.randn_like(z)
        _, forward = torch.func.jvp(model.f, (z,), (probe,))
        point = z.clone().requires_grad_()
        (adjoint,) = torch.autograd.grad(model.f(point), point, probe, create_graph=True)
        total = total + (forward - adjoint).square().sum()
    total.backward()


def seconds(*calls: Callable[[], None], rounds: int = 9) -> list[tuple[float, ...]]:
    """The times of all calls in each round; they take turns, so that other load on the machine meets them alike."""
    times = []
    for _ in range(rounds):
        stamps = [time.perf_counter()]
        for call in calls:
            call()
            stamps.append(time.perf_counter())
        times.append(tuple(end - start for start, end in pairwise(stamps)))
    return times


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_training_step(benchmark: BenchmarkFixture, kind: str) -> None:
    torch.manual_seed(0)
    model = Block(kind)

    def plain() -> None:
        model().square().mean().backward()

    def regularised() -> None:
        with register_homeostasis(model, probes=PROBES) as homeostasis:
            (model().square().mean() + homeostasis.penalty()).backward()

    benchmark.group = "homeostasis"
    benchmark.pedantic(regularised, rounds=5, warmup_rounds=1)
    times = seconds(plain, regularised, lambda: products(model))
    benchmark.extra_info.update(
        kind=kind,
        added_to_products=median((within - without) / parts for without, within, parts in times),
        added_to_step=median((within - without) / without for without, within, _ in times),
    )


@pytest.mark.parametrize("chunk", [1, 2])
def test_probes_in_chunks(benchmark: BenchmarkFixture, chunk: int) -> None:
    """Peak memory and time of a penalty and its gradient, over those with all probes at once."""
    torch.manual_seed(0)
    model = Block("convolutional")
    z = model().detach()

    def at_once() -> None:
        symmetry_penalty(model.f, z, PROBES).backward()

    def in_chunks() -> None:
        symmetry_penalty(model.f, z, PROBES, chunk=chunk).backward()

    benchmark.group = "homeostasis in chunks"
    benchmark.pedantic(in_chunks, rounds=5, warmup_rounds=1)
    times = seconds(at_once, in_chunks)
    memory = [peak_memory(call, z.device) for call in (at_once, in_chunks)]
    benchmark.extra_info.update(
        chunk=chunk,
        time=median(parts / whole for whole, parts in times),
        memory=memory[1] / memory[0],
        memory_of_states=[size / (z.element_size() * z.numel()) for size in memory],
    )
