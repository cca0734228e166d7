"""Ordinary models, as people write them against torchdeq: all but the last train well by torchdeq's own gradients.

Nothing about them suits equilibrium propagation: activations have kinks, no Jacobian is symmetric, samples differ. They
learn scikit-learn's digits as images of 8 x 8 in batches of 50, by Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torchdeq import get_deq

BATCH = 50
SOLVER = {"f_solver": "anderson", "f_tol": 1e-3, "f_max_iter": 40, "ift": True}

Activation = Callable[[Tensor], Tensor]


def _convolution(narrow: int, wide: int) -> nn.Conv2d:
    convolution = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
    nn.init.normal_(convolution.weight, std=0.01)
    return convolution


class Residual(nn.Module):
    """The cell of torchdeq's image models: `GN(phi(z + GN(x + conv(GN(phi(conv(z)))))))`."""

    def __init__(self, activation: Activation, channels: int, hidden: int) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.second = _convolution(channels, hidden), _convolution(hidden, channels)
        self.norms = nn.ModuleList([nn.GroupNorm(4, hidden), nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = self.norms[0](self.activation(self.first(z)))
        value: Tensor = self.norms[2](self.activation(z + self.norms[1](x + self.second(inner))))
        return value


class CNN(nn.Module):
    """One residual cell of 16 channels on 8 x 8, between a batch-normed stem and a pooled head."""

    def __init__(self, activation: Activation = torch.relu, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.cell = Residual(activation, 16, 32)
        self.head = nn.Sequential(nn.BatchNorm2d(16), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
        self.deq = get_deq(**{**SOLVER, **options})

    def forward(self, images: Tensor, writer: Any = None) -> Tensor:
        x = self.stem(images)
        states, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x), backward_writer=writer)
        logits: Tensor = self.head(states[-1])
        return logits


class Transformer(nn.Module):
    """A block of attention and feed-forward over the eight rows of an image as tokens of 32 features."""

    def __init__(self, pre_norm: bool, **options: Any) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.stem = nn.Linear(8, 32)
        self.places = nn.Parameter(0.02 * torch.randn(8, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.forth, self.back = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Flatten(), nn.Linear(256, 10))
        self.deq = get_deq(**{**SOLVER, **options})

    def _attended(self, z: Tensor) -> Tensor:
        attended: Tensor = self.attention(z, z, z, need_weights=False)[0]
        return attended

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """Post-norm: the norm is last. Pre-norm: both branches are damped, and the input is added to the first."""
        first, second = self.norms
        if self.pre_norm:
            hidden = x + 0.5 * self._attended(first(z))
            return hidden + 0.5 * self.back(functional.gelu(self.forth(second(hidden))))
        hidden = first(z + x + self._attended(z))
        value: Tensor = second(hidden + self.back(functional.gelu(self.forth(hidden))))
        return value

    def forward(self, images: Tensor, writer: Any = None) -> Tensor:
        x = self.stem(images.squeeze(1)) + self.places
        states, _ = self.deq(lambda z: self.step(z, x), torch.zeros_like(x), backward_writer=writer)
        logits: Tensor = self.head(states[-1])
        return logits


class TwoScales(nn.Module):
    """A state of two tensors, at 8 x 8 and 4 x 4, each with a cell, fused after every step."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.cells = nn.ModuleList([Residual(torch.relu, 16, 32), Residual(torch.relu, 16, 32)])
        self.down, self.up = nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(2))
        self.head = nn.Sequential(nn.BatchNorm1d(512), nn.Linear(512, 10))
        self.deq = get_deq(**{**SOLVER, **options})

    def forward(self, images: Tensor, writer: Any = None) -> Tensor:
        x = self.stem(images)
        coarse = functional.avg_pool2d(x, 2)

        def step(fine: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
            one, other = self.cells[0](fine, x), self.cells[1](low, coarse)
            lifted = functional.interpolate(self.up(other), scale_factor=2)
            return self.norms[0](torch.relu(one + lifted)), self.norms[1](torch.relu(other + self.down(one)))

        start = torch.zeros_like(x), torch.zeros_like(coarse)
        states, _ = self.deq(step, start, backward_writer=writer)
        fine, low = states[-1]
        logits: Tensor = self.head(torch.cat([functional.avg_pool2d(fine, 2).flatten(1), low.flatten(1)], dim=1))
        return logits


class ImageGraph(nn.Module):
    """A graph network over the images of a batch, each tied to its three nearest: rows are coupled.

    With the norm after the equilibrium the map contracts. With the norm inside it does not: the solver of the free
    phase stops at a residual of some tenths, and no gradient is one of an equilibrium.
    """

    def __init__(self, norm_inside: bool, **options: Any) -> None:
        super().__init__()
        self.norm_inside = norm_inside
        self.stem = nn.Linear(64, 48)
        self.weight = nn.Linear(48, 48, bias=False)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)
        self.deq = get_deq(**{**SOLVER, **options})

    def forward(self, images: Tensor, writer: Any = None) -> Tensor:
        pixels = images.flatten(1)
        nearest = torch.cdist(pixels, pixels).topk(4, largest=False).indices
        ties = torch.zeros(len(pixels), len(pixels)).scatter_(1, nearest, 1.0)
        ties = ties + ties.T
        root = ties.sum(1).rsqrt()
        adjacency = root[:, None] * ties * root
        x = self.stem(pixels)

        def step(z: Tensor) -> Tensor:
            value = torch.relu(adjacency @ self.weight(z) + x)
            return self.norm(value) if self.norm_inside else value

        states, _ = self.deq(step, torch.zeros_like(x), backward_writer=writer)
        logits: Tensor = self.head(states[-1] if self.norm_inside else self.norm(states[-1]))
        return logits


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "cnn-gelu": partial(CNN, partial(functional.gelu, approximate="tanh")),
    "post-norm": partial(Transformer, False),
    "pre-norm": partial(Transformer, True),
    "two-scale": TwoScales,
    "graph": partial(ImageGraph, False),
    "graph-unsettled": partial(ImageGraph, True),
}
RATES = {"post-norm": 2e-3, "pre-norm": 2e-3, "graph": 5e-3}


@dataclass(frozen=True)
class Digits:
    """Images of shape `(N, 1, 8, 8)` and labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def batches(self, seed: int, epochs: int, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in an order that the seed decides."""
        order = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.train), generator=order).split(size):
                yield self.train[rows], self.train_labels[rows]


@cache
def digits() -> Digits:
    """The data: 1,437 images to train on, 360 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=360, random_state=0)
    train, test = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for part in parts[:2])
    return Digits(train, torch.tensor(parts[2]), test, torch.tensor(parts[3]))


def make(kind: str, seed: int, **options: Any) -> nn.Module:
    """An untrained model."""
    torch.manual_seed(seed)
    return MODELS[kind](**options)


def train(
    model: nn.Module,
    kind: str,
    seed: int,
    epochs: int,
    steps: int | None = None,
    size: int = BATCH,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Train in place, by whatever backward the model has."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES.get(kind, 1e-3))
    model.train()
    for k, (images, labels) in enumerate(digits().batches(seed, epochs, size)):
        if k == steps:
            return
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        on_step(k)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that are classified rightly."""
    model.eval()
    right = model(digits().test).argmax(1) == digits().test_labels
    model.train()
    return right.float().mean().item()
