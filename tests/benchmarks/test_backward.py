"""How long a backward pass takes, by torchdeq's IFT, by ours and by EP, on a dense and a convolutional DEQ.

`make bench` runs these. Nothing is asserted about time. The calls of the map, the residual and the error of each
backward are recorded beside its time, because a time means little without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torchdeq
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

import torchdeq_ep as tep

BACKWARDS = ["torchdeq", "ift", "ep", "ep-one-sided", "hep:n_points=4", "hep:n_points=8"]


class Dense(nn.Module):
    """A layered network 784-256-256-10 as one state of 522 units, connected both ways, with smooth units.

    The map is the gradient of `tanh(z) . (W tanh(z) / 2 + u) / 2` with a symmetric `W`, so its Jacobian is symmetric.
    """

    sizes = (256, 256, 10)

    def __init__(self) -> None:
        super().__init__()
        self.read_in = nn.Linear(784, self.sizes[0])
        self.up = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        self.deq = torchdeq.get_deq(ift=True, f_solver="anderson", f_tol=1e-7, f_max_iter=200, b_tol=1e-6)

    def forward(self, x: Tensor, writer: Callable[[object], None] | None = None) -> Tensor:
        drive = self.read_in(x)

        def f(z: Tensor) -> Tensor:
            active = torch.tanh(z)
            a, b, c = active.split(self.sizes, dim=1)
            first, second = self.up
            field = torch.cat((drive + b @ first.weight, first(a) + c @ second.weight, second(b)), dim=1)
            return 0.5 * (1 - active**2) * field

        z_init = x.new_zeros(len(x), sum(self.sizes))
        states, _ = self.deq(f, z_init, backward_writer=writer)
        logits: Tensor = states[-1][:, -self.sizes[-1] :]
        return logits


class Convolutional(nn.Module):
    """A residual block with group norm and a smooth activation, 48 channels of 16 x 16."""

    channels = 48

    def __init__(self) -> None:
        super().__init__()
        convolution = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.read_in = convolution(3, self.channels)
        self.first = convolution(self.channels, self.channels)
        self.second = convolution(self.channels, self.channels)
        self.norms = nn.ModuleList(nn.GroupNorm(8, self.channels) for _ in range(3))
        self.read_out = nn.Linear(self.channels, 10)
        nn.init.constant_(self.norms[1].weight, 0.3)  # small enough for the map to contract
        self.deq = torchdeq.get_deq(ift=True, f_solver="anderson", f_tol=1e-6, f_max_iter=200, b_tol=1e-6)

    def forward(self, x: Tensor, writer: Callable[[object], None] | None = None) -> Tensor:
        drive = self.read_in(x)
        first_norm, second_norm, third_norm = self.norms

        def f(z: Tensor) -> Tensor:
            inner = first_norm(functional.softplus(self.first(z)))
            return third_norm(functional.softplus(0.5 * z + drive + second_norm(self.second(inner))))

        z_init = x.new_zeros(len(x), self.channels, *x.shape[2:])
        states, _ = self.deq(f, z_init, backward_writer=writer)
        logits: Tensor = self.read_out(states[-1].mean(dim=(2, 3)))
        return logits


@dataclass
class Case:
    """A model with a batch, and the exact gradient of its loss."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, writer: Callable[[object], None] | None = None) -> Tensor:
        return functional.cross_entropy(self.model(self.x, writer), self.y)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)]
        )


def dense() -> Case:
    return Case(Dense(), torch.rand(50, 784), torch.randint(10, (50,)))


def convolutional() -> Case:
    return Case(Convolutional(), torch.randn(16, 3, 16, 16), torch.randint(10, (16,)))


@pytest.fixture(scope="module", params=[dense, convolutional], ids=["dense", "convolutional"])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    made: Case = request.param()
    return made


@pytest.fixture(scope="module")
def references(case: Case) -> dict[str, Tensor]:
    """The exact gradient, and that of vanishing nudges, which an asymmetric Jacobian moves; in double precision."""
    wide = Case(case.model.double(), case.x.double(), case.y)
    gradients = {}
    for name in ("ift", "ep-infinitesimal"):
        with tep.use_backward(wide.model, name, tol=1e-7, max_iter=500):
            gradients[name] = wide.gradient(wide.loss())
    case.model.float()
    return gradients


@pytest.mark.parametrize("backward", BACKWARDS)
def test_backward(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    case: Case,
    references: dict[str, Tensor],
    backward: str,
) -> None:
    benchmark.group = request.node.callspec.id.removesuffix(f"-{backward}").removeprefix(f"{backward}-")
    records: list[Mapping[str, Any]] = []
    with nullcontext() if backward == "torchdeq" else tep.use_backward(case.model, backward):
        loss = case.loss(records.append)
        gradient = benchmark.pedantic(case.gradient, args=(loss,), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(statistics(records[-1]))
    benchmark.extra_info["error_to_exact"] = relative_error(gradient, references["ift"])
    if backward.startswith("ep"):
        benchmark.extra_info["error_to_limit"] = relative_error(gradient, references["ep-infinitesimal"])


def statistics(record: Mapping[str, Any]) -> dict[str, float]:
    """Calls of the map, or products with its Jacobian, and the final relative residual."""
    report = record.get("report")
    if report is None:  # torchdeq: one row per sample
        return {"calls": int(record["nstep"].max()), "residual": float(record["rel_lowest"].max())}
    return {"calls": report.calls, "residual": report.residual}


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())
