"""Coupled phase oscillators: the XY model, and Kuramoto's model in a frame that turns with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.drawing import circle, graph
from torchdeq_ep_physics.matrices import DenseMatrix
from torchdeq_ep_physics.system import NoEnergyError, PhysicalSystem, Theta


class OscillatorNetwork(PhysicalSystem):
    """Phases `z_i` with `dz_i/dt = omega_i + sum_j K_ij sin(z_j - z_i - lag) + sum_k h_ik sin(x_k - z_i)`.

    Couplings are symmetric, `K_ij = K_ji`, of either sign. Without frequencies it is the XY model; with a lag that of
    Sakaguchi and Kuramoto, which is not reciprocal. The inputs are phases `x_k`.

    Where pinning holds no phase of a group of coupled ones, their common rotation is free: the frame is then the one
    that turns with the group, and its mean phase stays where the search starts. A loss may depend on phase differences
    alone.

    Args:
        coupling: Initial `K`, of shape `(n, n)`; its symmetric part without the diagonal is taken.
        pinning: Initial `h`, of shape `(n, n_inputs)`.
        frequency: Initial `omega`, relative to the turning frame; by default zero.
        lag: Phase lag of the couplings.
        **options: As for [`PhysicalSystem`][torchdeq_ep_physics.PhysicalSystem].

    Raises:
        InvalidOptionError: If shapes do not fit.
    """

    largest_step = 1.0

    origin = 2 * math.pi  # a phase is one among those of a turn, wherever zero is

    advice = (
        "Likeliest: the oscillators do not lock, because their frequencies differ by more than the couplings can hold. "
        "Use stronger couplings or smaller frequencies."
    )

    def __init__(
        self, coupling: Tensor, pinning: Tensor, frequency: Tensor | None = None, *, lag: float = 0.0, **options: Any
    ) -> None:
        n = len(coupling)
        if coupling.shape != (n, n) or pinning.dim() != 2 or len(pinning) != n:
            raise InvalidOptionError("coupling must have shape (n, n), and pinning (n, n_inputs).")
        super().__init__(n, **options)
        self.lag = lag
        self.coupling = nn.Parameter(coupling.clone())
        self.pinning = nn.Parameter(pinning.clone())
        self.frequency = nn.Parameter(torch.zeros_like(coupling[0]) if frequency is None else frequency.clone())

    @property
    def reciprocal(self) -> bool:  # type: ignore[override]
        """Whether there is no lag."""
        return self.lag == 0.0

    def physical(self) -> Theta:
        symmetric = (self.coupling + self.coupling.T) / 2
        return {
            "coupling": symmetric - torch.diag(symmetric.diagonal()),
            "pinning": self.pinning,
            "frequency": self.frequency,
        }

    def start(self, x: Tensor) -> Tensor:
        """Each phase where the pinning alone would hold it."""
        with torch.no_grad():
            z: Tensor = torch.atan2(torch.sin(x) @ self.pinning.T, torch.cos(x) @ self.pinning.T)
        return z

    def force(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        among = torch.sin(z.unsqueeze(1) - z.unsqueeze(2) - self.lag)
        pinned = torch.sin(x.unsqueeze(1) - z.unsqueeze(2))
        force = theta["frequency"] + (theta["coupling"] * among).sum(2) + (theta["pinning"] * pinned).sum(2)
        free = self.free_rotations(theta)
        return force if free is None else force - force @ free

    def energy(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        if not self.reciprocal:
            raise NoEnergyError("oscillators whose couplings lag have no energy.")
        among = torch.cos(z.unsqueeze(1) - z.unsqueeze(2))
        pinned = torch.cos(x.unsqueeze(1) - z.unsqueeze(2))
        free, frequency = self.free_rotations(theta), theta["frequency"]
        if free is not None:
            frequency = frequency - free @ frequency
        coupled = (theta["coupling"] * among).sum((1, 2)) / 2
        energy: Tensor = -coupled - (theta["pinning"] * pinned).sum((1, 2)) - (frequency * z).sum(1)
        return energy

    def stiffness(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        return (2 * theta["coupling"].abs().sum(1) + theta["pinning"].abs().sum(1)).clamp_min(torch.finfo(z.dtype).eps)

    def stiffness_matrix(self, z: Tensor, theta: Theta, x: Tensor) -> DenseMatrix:
        coupled = theta["coupling"] * torch.cos(z.unsqueeze(1) - z.unsqueeze(2) - self.lag)
        pinned = (theta["pinning"] * torch.cos(x.unsqueeze(1) - z.unsqueeze(2))).sum(2)
        values = torch.diag_embed(coupled.sum(2) + pinned) - coupled
        free = self.free_rotations(theta)
        if free is not None:  # the common rotation is no instability, and no way for a nudge
            values = values - free @ values + self.stiffness(z, theta, x).mean() * free
        return DenseMatrix(values, values if self.reciprocal else None)

    def largest_term(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        among = (theta["coupling"] * torch.sin(z.unsqueeze(1) - z.unsqueeze(2) - self.lag)).abs().amax((1, 2))
        pinned = (theta["pinning"] * torch.sin(x.unsqueeze(1) - z.unsqueeze(2))).abs().amax((1, 2))
        largest = torch.maximum(torch.maximum(among, pinned), theta["frequency"].abs().amax())
        # Where all phases agree every term is rounding.
        unit = torch.maximum(theta["coupling"].abs().amax(), theta["pinning"].abs().amax())
        return torch.maximum(largest, 1e-6 * unit)

    def free_rotations(self, theta: Theta) -> Tensor | None:
        """The common rotations that nothing pins.

        Args:
            theta: Physical parameters.

        Returns:
            The orthogonal projection on them, of shape `(n, n)`, or `None` if there are none.
        """
        is_pinned = (theta["pinning"].detach() != 0).any(1)
        if bool(is_pinned.all()):
            return None
        is_coupled = (theta["coupling"].detach() != 0) | torch.eye(self.n_states, dtype=torch.bool)
        group, before = torch.arange(self.n_states), None
        while before is None or not torch.equal(group, before):  # the largest number that couplings lead to
            before = group
            group = torch.where(is_coupled, group, -1).amax(1)
            group = group[group]
        together = group.unsqueeze(1) == group
        is_held = (together & is_pinned).any(1, keepdim=True)
        projection = (together & ~is_held).to(theta["coupling"].dtype) / together.sum(1)
        return projection if not bool(is_held.all()) else None

    def sketch(self, axes: Any, z: Tensor, x: Tensor) -> None:
        places = circle(self.n_states)
        pairs = [(i, j) for i in range(self.n_states) for j in range(i)]
        coupling = self.physical()["coupling"].detach().abs()
        strength = torch.stack([coupling[i, j] for i, j in pairs])
        turned = torch.remainder(z.detach(), 2 * math.pi)
        graph(axes, places, range(self.n_states), pairs, strength, turned, "phase", cyclic=True)
        arrows = 0.25 * torch.stack([z.cos(), z.sin()], 1).detach()
        axes.quiver(
            *places.T.tolist(), *arrows.T.tolist(), angles="xy", scale_units="xy", scale=1, width=0.008, zorder=3
        )
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
