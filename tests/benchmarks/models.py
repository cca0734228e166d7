"""The models that the benchmarks run on, each with a batch and a loss: dense, convolutional, attention, graph, tiny."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchdeq
from torch import Tensor, nn
from torch.nn import functional

from torchdeq_ep.nn import VectorFieldMLP

Writer = Callable[[object], None] | None
FREE_PHASE = {"ift": True, "f_solver": "relaxation", "f_tol": 1e-6, "f_stop_mode": "rel", "f_max_iter": 200}


class Block(nn.Module):
    """A DEQ whose map depends on a drive that is computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.deq = torchdeq.get_deq(**FREE_PHASE)

    def drive(self, x: Tensor) -> Tensor:
        """What the input adds to the state in every step."""
        raise NotImplementedError

    def step(self, z: Tensor, drive: Tensor) -> Tensor:
        """One step of the map."""
        raise NotImplementedError

    def map(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The map for a batch."""
        drive = self.drive(x)
        return lambda z: self.step(z, drive)

    def forward(self, x: Tensor, writer: Writer = None) -> Tensor:
        start = torch.zeros_like(self.drive(x))
        states, _ = self.deq(self.map(x), start, backward_writer=writer)
        state: Tensor = states[-1]
        return state


class Dense(VectorFieldMLP):
    """The layered network 784-256-256-10 of the papers, 522 units in the state, connected both ways."""

    def __init__(self) -> None:
        sizes = {"in": 784, "l1": 256, "l2": 256, "out": 10}
        super().__init__(sizes, readout="mse", gain=0.5, angle=0.0, **FREE_PHASE)

    def forward(self, x: Tensor, writer: Writer = None) -> Tensor:
        states, _ = self.deq(self.map(x), self.initial_state(len(x)), backward_writer=writer)
        state: Tensor = states[-1]
        return state


class Convolutional(Block):
    """A residual block with group norm and a smooth activation, 48 channels of 16 x 16."""

    channels = 48

    def __init__(self) -> None:
        super().__init__()
        convolution = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.read_in = convolution(3, self.channels)
        self.first = convolution(self.channels, self.channels)
        self.second = convolution(self.channels, self.channels)
        self.norms = nn.ModuleList(nn.GroupNorm(8, self.channels) for _ in range(3))
        nn.init.constant_(self.norms[1].weight, 0.3)  # small enough for the map to contract

    def drive(self, x: Tensor) -> Tensor:
        drive: Tensor = self.read_in(x)
        return drive

    def step(self, z: Tensor, drive: Tensor) -> Tensor:
        first_norm, second_norm, third_norm = self.norms
        inner = first_norm(functional.softplus(self.first(z)))
        value: Tensor = third_norm(functional.softplus(0.5 * z + drive + second_norm(self.second(inner))))
        return value


class Attention(Block):
    """A transformer block over 32 tokens of 64 features, with post-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.inner, self.outer = nn.Linear(64, 256), nn.Linear(256, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))

    def drive(self, x: Tensor) -> Tensor:
        return x

    def step(self, z: Tensor, drive: Tensor) -> Tensor:
        attended, _ = self.attention(z, z, z, need_weights=False)
        hidden = self.norms[0](drive + 0.5 * attended)
        value: Tensor = self.norms[1](
            hidden + 0.3 * self.outer(functional.gelu(self.inner(hidden), approximate="tanh"))
        )
        return value


class Graph(Block):
    """A graph DEQ: 2,000 nodes with 64 features, a sparse normalised adjacency; dimension 0 is no batch."""

    nodes = 2000

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(64, 64, bias=False)
        nn.init.orthogonal_(self.weight.weight, gain=0.7)
        edges = torch.randint(self.nodes, (2, 5 * self.nodes))
        edges = torch.cat([edges, edges.flip(0), torch.arange(self.nodes).expand(2, -1)], dim=1)
        degree = torch.bincount(edges[0], minlength=self.nodes).float()
        values = (degree[edges[0]] * degree[edges[1]]).rsqrt()
        adjacency = torch.sparse_coo_tensor(edges, values, (self.nodes, self.nodes), check_invariants=True).coalesce()
        self.register_buffer("adjacency", adjacency)

    def drive(self, x: Tensor) -> Tensor:
        return x

    def step(self, z: Tensor, drive: Tensor) -> Tensor:
        return torch.tanh(torch.sparse.mm(self.adjacency, self.weight(z)) + drive)


class Tiny(Block):
    """16 units and one sample: what a backward costs besides its calls of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(16, 16)
        nn.init.orthogonal_(self.weight.weight, gain=0.5)

    def drive(self, x: Tensor) -> Tensor:
        return x

    def step(self, z: Tensor, drive: Tensor) -> Tensor:
        return torch.tanh(self.weight(z) + drive)


@dataclass
class Case:
    """A model with a batch, and a loss of the equilibrium: `"classification"` or `"regression"`."""

    model: nn.Module
    x: Tensor
    task: str = "classification"

    def loss(self, writer: Writer = None) -> Tensor:
        """Cross-entropy of ten linear features of the mean over positions; or half the squared distance from a ramp."""
        state = self.model(self.x, writer)
        if self.task == "regression":
            target = torch.linspace(-1, 1, state.numel(), dtype=state.dtype).reshape(state.shape)
            return 0.5 * (state - target).square().sum() / len(state)
        features = state if state.dim() == 2 else state.flatten(2).mean(2)
        generator = torch.Generator().manual_seed(1)
        read_out = torch.randn(features.shape[1], 10, generator=generator).to(state.dtype) / features.shape[1] ** 0.5
        labels = torch.randint(10, (len(state),), generator=generator)
        return functional.cross_entropy(features @ read_out, labels)

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient by all parameters, as one vector. The graph is kept, so that it can be taken again."""
        parameters = list(self.model.parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])

    def double(self) -> Case:
        """The same case in double precision; the model is converted in place."""
        return Case(self.model.double(), self.x.double(), self.task)


def make(kind: str, batch: int | None = None, task: str = "classification") -> Case:
    """A case by name; `batch` samples, or the number that the name stands for."""
    torch.manual_seed(0)
    if kind == "dense":
        return Case(Dense(), torch.rand(batch or 50, 784), task)
    if kind == "convolutional":
        return Case(Convolutional(), torch.randn(batch or 16, 3, 16, 16), task)
    if kind == "attention":
        return Case(Attention(), torch.randn(batch or 16, 32, 64), task)
    if kind == "graph":
        return Case(Graph(), torch.randn(Graph.nodes, 64), task)
    return Case(Tiny(), torch.randn(batch or 1, 16), task)
