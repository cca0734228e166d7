"""Continuous Hopfield networks (Hopfield 1984): amplifiers with a saturating response, coupled by symmetric weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.matrices import DenseMatrix
from torchdeq_ep_physics.system import PhysicalSystem, Theta, positive


class HopfieldNetwork(PhysicalSystem):
    """Units with `C du/dt = -u / R + W tanh(u) + x` and symmetric `W`; the state is `u`.

    The Jacobian in `u` is not symmetric, but `J M` is, with `M = 1 / (C tanh'(u))`. The energy, Hopfield's, is one
    of the activities `tanh(u)`: its gradient in `u` is the force times `-tanh'(u)`.

    Args:
        weight: Initial `W`, of shape `(n, n)`; its symmetric part is taken.
        leak: `1 / R` of each unit; trained, as a logarithm. By default 1.
        **options: As for [`PhysicalSystem`][torchdeq_ep_physics.PhysicalSystem]; the capacity is one of capacitances.

    Raises:
        InvalidOptionError: If shapes do not fit or a leak is not positive.
    """

    largest_step = 1.0

    advice = "Is the input finite?"

    def __init__(self, weight: Tensor, leak: Tensor | None = None, **options: Any) -> None:
        n = len(weight)
        if weight.shape != (n, n):
            raise InvalidOptionError(f"weight must be square, not of shape {tuple(weight.shape)}.")
        super().__init__(n, **options)
        self.weight = nn.Parameter(weight.clone())
        self.log_leak = positive(torch.ones_like(weight[0]) if leak is None else leak)

    def physical(self) -> Theta:
        return {"weight": (self.weight + self.weight.T) / 2, "leak": self.log_leak.exp()}

    def force(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        return x - theta["leak"] * z + torch.tanh(z) @ theta["weight"].T

    def energy(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        activity = torch.tanh(z)
        # The integral of artanh up to the activity: cosh itself overflows.
        stored = z * activity - (z.abs() + torch.log1p(torch.exp(-2 * z.abs())) - math.log(2))
        return (theta["leak"] * stored - x * activity).sum(1) - ((activity @ theta["weight"].T) * activity).sum(1) / 2

    def stiffness(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        return theta["leak"]

    def stiffness_matrix(self, z: Tensor, theta: Theta, x: Tensor) -> DenseMatrix:
        leak, slope = torch.diag(theta["leak"]), self.conjugate_slope(z).unsqueeze(1)
        root = slope.sqrt()
        symmetric = leak - root.transpose(1, 2) * theta["weight"] * root
        return DenseMatrix(leak - theta["weight"] * slope, symmetric)

    def largest_term(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        fed = (torch.tanh(z) @ theta["weight"].T).abs()
        return torch.maximum(torch.maximum((theta["leak"] * z).abs(), fed), x.abs()).amax(1)

    def conjugate(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def conjugate_slope(self, z: Tensor) -> Tensor:
        return 1 / torch.cosh(z).square()

    def metric(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        return self.mobility(z, theta, x) / (1 - torch.tanh(z) ** 2).clamp_min(1e-6)

    def sketch(self, axes: Any, z: Tensor, x: Tensor) -> None:
        axes.bar(range(self.n_states), torch.tanh(z).tolist(), color="tab:blue")
        axes.set(xlabel="unit", ylabel="activity", ylim=(-1, 1))
