"""Coupled iterates that can be run backwards: the fixed-point solver of reversible DEQs.

McCallum et al. 2025, "Reversible deep equilibrium models" (arXiv 2509.12917), take two states and relax each by the map
of the other,

    y_(n+1) = (1 - b) y_n + b f(z_n),    z_(n+1) = (1 - b) z_n + b f(y_(n+1)),

so that `z_n`, and then `y_n`, follow from what came after: rounding errors grow by `1 / (1 - b)` in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.state import Map


@dataclass
class ReversibleRun:
    """Where coupled iterates ended, which is all that is kept of them.

    Args:
        start: Where both states started.
        y: The first, at the end.
        z: The second, which is the result.
        steps: Number of steps, of two calls of the map each.
        beta: The relaxation `b`.
        error: Relative error of the start as last reconstructed; NaN before a backward pass.
    """

    start: Tensor
    y: Tensor
    z: Tensor
    steps: int
    beta: float
    error: float = float("nan")


def step_forth(f: Map, y: Tensor, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """One step.

    Args:
        f: The map.
        y: The first state.
        z: The second.
        beta: The relaxation.

    Returns:
        Both states afterwards.

    Example:
        >>> step_forth(lambda z: 0.5 * z, torch.tensor([1.0]), torch.tensor([1.0]), 0.5)
        (tensor([0.7500]), tensor([0.6875]))
    """
    y = (1 - beta) * y + beta * f(z)
    return y, (1 - beta) * z + beta * f(y)


def undo(after: Tensor, value: Tensor, beta: float) -> Tensor:
    """The state before it was relaxed towards a value.

    Args:
        after: The state.
        value: Of the map.
        beta: The relaxation.

    Returns:
        The state before.

    Example:
        >>> undo(torch.tensor([0.75]), torch.tensor([0.5]), 0.5)
        tensor([1.])
    """
    before: Tensor = (after - beta * value) / (1 - beta)
    return before


def rounding_of(run: ReversibleRun) -> float:
    """About how large the error of a reconstruction is by rounding alone, `eps (1 - b)^-N`.

    Args:
        run: The run.

    Returns:
        Relative to the state.
    """
    return torch.finfo(run.z.dtype).eps * (1 - run.beta) ** -run.steps
