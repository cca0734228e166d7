"""The method of Laborieux & Zenke (arXiv 2309.02214) written plainly, after their public code: a peer for the tests.

A fully connected network of the state `u` with activities `phi(u)` and a softmax read-out of the last layer:

    u <- W phi(u) + U x + b + beta dL/dphi,      L = sum over the samples of the cross-entropy,

a number of plain steps from zero, then a number of nudged ones; the error vector is the change of the *activities* over
`beta`. Nothing here is shared with the package but the weights of the network, and nothing is checked for convergence.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.nn import VectorFieldMLP

FREE_STEPS, NUDGED_STEPS = 150, 20
"""Of Table 1."""


def sigmoid(u: Tensor) -> Tensor:
    """The papers' activation."""
    return 1 / (1 + torch.exp(-4 * u + 2))


@dataclass(frozen=True)
class Papers:
    """The network with the weights of one of the package, the batch, and the numbers of steps.

    Args:
        network: Undamped or damped: the papers' own dynamics are not.
        x: Inputs.
        labels: Class of each sample.
        free_steps: Of the free phase.
        nudged_steps: Of a nudged phase.
    """

    network: VectorFieldMLP
    x: Tensor
    labels: Tensor
    free_steps: int = FREE_STEPS
    nudged_steps: int = NUDGED_STEPS

    def target(self, u: Tensor) -> Tensor:
        """`W phi(u) + U x + b`, layer by layer."""
        weights, biases = self.network.weights, self.network.biases
        activities = dict(zip(self.network.layers, sigmoid(u).split(self._widths, dim=1), strict=True))
        fields = {}
        for layer in self.network.layers:
            fields[layer] = biases[layer].expand(len(u), -1)
            for source, activity in {"in": self.x, **activities}.items():
                if f"{source}-{layer}" in weights:
                    fields[layer] = fields[layer] + activity @ weights[f"{source}-{layer}"].T.to(activity.dtype)
        return torch.cat(list(fields.values()), dim=1)

    def force(self, u: Tensor) -> Tensor:
        """`dL/dphi` of each sample's own loss, which is zero but for the last layer."""
        last = self.network.layers[-1]
        weight, bias = self.network.weights[f"{last}-out"], self.network.biases["out"]
        logits = sigmoid(u[:, -self._widths[-1] :]) @ weight.T.to(u.dtype) + bias
        wrong = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True) - functional.one_hot(self.labels)
        force = wrong @ weight.to(u.dtype)
        return torch.cat([u.new_zeros(len(u), u.shape[1] - force.shape[1]), force], dim=1)

    def settle(self, u: Tensor, beta: complex, steps: int) -> Tensor:
        """Plain steps, nudged by `beta`."""
        for _ in range(steps):
            u = self.target(u) + (beta * self.force(u) if beta else 0)
        return u

    def free(self) -> Tensor:
        """The state after the free phase."""
        with torch.no_grad():
            return self.settle(torch.zeros(len(self.x), sum(self._widths), dtype=self.x.dtype), 0, self.free_steps)

    @torch.no_grad()
    def error_vector(self, beta: float, n_points: int) -> Tensor:
        """`d phi(u) / d beta` by `n_points` nudges: 1 is one-sided and uphill, as in their code; 0 is the limit."""
        free = self.free()
        if n_points == 0:
            return torch.func.jvp(
                lambda b: sigmoid(self._differentiable(free, b)), (free.new_zeros(()),), (free.new_ones(()),)
            )[1]

        def activities(node: complex) -> Tensor:
            is_real = abs(node.imag) < 1e-12
            start = free if is_real else free.to(free.dtype.to_complex())
            return sigmoid(self.settle(start, node.real if is_real else node, self.nudged_steps))

        if n_points == 1:
            return (activities(complex(beta)) - sigmoid(free)) / beta
        nodes = [beta * cmath.exp(2j * math.pi * k / n_points) for k in range(n_points)]
        return sum((activities(node) / node).real for node in nodes) / n_points  # type: ignore[return-value]

    def gradient(self, beta: float, n_points: int) -> dict[str, Tensor]:
        """Gradients of the mean loss: that of the field along the error vector, and that of the read-out itself."""
        free, v = self.free(), self.error_vector(beta, n_points)
        return self._gradient(free, v)

    def _gradient(self, free: Tensor, v: Tensor) -> dict[str, Tensor]:
        last, named = self.network.layers[-1], dict(self.network.named_parameters())
        weight, bias = self.network.weights[f"{last}-out"], self.network.biases["out"]
        logits = sigmoid(free[:, -self._widths[-1] :]) @ weight.T + bias
        value = (self.target(free) * v).sum() / len(self.x) + functional.cross_entropy(logits, self.labels)
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}

    def _differentiable(self, free: Tensor, beta: Tensor) -> Tensor:
        step: Callable[[Tensor], Tensor] = lambda u: self.target(u) + beta * self.force(u)  # noqa: E731
        u = free
        for _ in range(self.nudged_steps):
            u = step(u)
        return u

    @property
    def _widths(self) -> list[int]:
        return [self.network.sizes[layer] for layer in self.network.layers]
