"""Thermal motion that cools down, before the search for an equilibrium: it finds lower minima of a rugged energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_count

if TYPE_CHECKING:
    from torchdeq_ep_physics.newton import Search


@dataclass(frozen=True)
class Annealing:
    """Langevin dynamics at a temperature that falls to zero in equal steps.

    Args:
        temperature: At the start, in units of energy.
        steps: Steps of the flow with noise.
        seed: Of the noise.

    Raises:
        InvalidOptionError: If the temperature is not positive, or there are no steps.

    Example:
        >>> Annealing(temperature=0.5, steps=100)
        Annealing(temperature=0.5, steps=100, seed=0)
    """

    temperature: float
    steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InvalidOptionError(f"temperature must be positive, not {self.temperature!r}.")
        check_count("steps", self.steps)

    def run(self, problem: Search, z: Tensor) -> Tensor:
        """States after the thermal motion.

        Args:
            problem: Whose flow it is.
            z: Where it starts, of shape `(batch, n_states)`.

        Returns:
            Of the same shape.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            mobility = 0.2 / problem.scale(z)
            temperature = self.temperature * (1 - step / self.steps)
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
            move = mobility * problem.force(z) + (2 * temperature * mobility).sqrt() * noise
            z = z + move.clamp(-problem.system.largest_step, problem.system.largest_step)
        return z
