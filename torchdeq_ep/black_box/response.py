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
    def standard_error(self) -> Tensor | None:
        """That of the displacement, entry by entry, from the scatter of the repeats; `None` if there are none."""
        if len(self.free) < 2:
            return None
        variance = sum(weight**2 * each.var(0) for weight, each in self.scatter) / len(self.free)
        return cast(Tensor, variance).sqrt()

    @property
    def degrees_of_freedom(self) -> float:
        """Of the standard errors, by Welch and Satterthwaite; NaN if there are none."""
        repeats, squares = len(self.free), [weight**2 for weight, _ in self.scatter]
        return (repeats - 1) * sum(squares) ** 2 / sum(square**2 for square in squares) if repeats > 1 else math.nan

    @property
    def scatter(self) -> list[tuple[float, Tensor]]:
        """What the displacement is a sum of: a weight and the repeats of each phase, where it counts."""
        # The free state is subtracted from each; in stencils that are symmetric about it, it cancels.
        weights = self.weights
        phases = [*zip(weights, self.shifts, strict=True), (sum(weights), self.free - self.rest)]
        largest = max(abs(weight) for weight, _ in phases)
        return [(weight, shift) for weight, shift in phases if abs(weight) > 1e-9 * largest]

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
