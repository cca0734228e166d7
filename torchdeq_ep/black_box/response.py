"""The free and the nudged states of one backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchdeq_ep.modes import Stencil
from torchdeq_ep.state import norm


@dataclass(frozen=True)
class Response:
    """How a system answered to added forces.

    Args:
        free: The free state, as often as it was solved: `(repeats, ...)`.
        nudged: The nudged ones: `(nudges, repeats, ...)`.
        stencil: With a number for `beta`.
        amplitudes: Factors of the direction, one for each node of the stencil.
        direction: The force at amplitude 1: the cotangent, times the metric.
        metric: Its diagonal, or `None`.
        noise: Error of one solve, relative to the free state.

    Example:
        >>> free, nudged = torch.tensor([[0.5]]), torch.tensor([[[0.6]], [[0.4]]])
        >>> Response(free, nudged, Stencil.symmetric(0.2), [0.2, -0.2], torch.ones(1), None, 1e-7).displacement
        tensor([0.5000])
    """

    free: Tensor
    nudged: Tensor
    stencil: Stencil
    amplitudes: Sequence[float]
    direction: Tensor
    metric: Tensor | None
    noise: float

    @property
    def rest(self) -> Tensor:
        """The free state."""
        return self.free.mean(0)

    @property
    def shifts(self) -> Tensor:
        """The nudged states, from the free one."""
        return self.nudged - self.rest

    @property
    def weights(self) -> list[float]:
        """What the stencil multiplies the shifts by."""
        coefficients = cast(Sequence[float], self.stencil.coefficients)
        return [c / b for c, b in zip(coefficients, self.amplitudes, strict=True)]

    @property
    def displacement(self) -> Tensor:
        """By how much the state moves for a unit of the force, to the order of the stencil."""
        weights = torch.tensor(self.weights, dtype=self.rest.dtype, device=self.rest.device)
        return torch.einsum("k,kr...->...", weights, self.shifts) / len(self.free)

    @property
    def moved(self) -> float:
        """How far the largest nudge moved the state."""
        return max(norm(shift.mean(0)) for shift in self.shifts)


def size_of(state: Tensor) -> float:
    """The norm of a state; of one at zero, which has no scale of its own, that of one per entry.

    Args:
        state: Of any shape.

    Returns:
        A positive number.

    Example:
        >>> size_of(torch.zeros(4)), size_of(torch.tensor([3.0, 4.0]))
        (2.0, 5.0)
    """
    return norm(state) or math.sqrt(state.numel())
