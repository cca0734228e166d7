"""Relaxation: from a map of a stack of nodes to its fixed point, by our own loop or by any torchdeq solver.

Convergence is judged on the whole state of every node, by the residual `|N(z) - z|` relative to the nudge: solvers that
look at rows report what is not so when the rows are coupled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchdeq_ep.relaxation.accelerations import Extrapolation, Mixing

Step = Callable[[Tensor], Tensor]


RowScale = Callable[[Tensor], Tensor]


DIVERGED = 1e4
"""A residual this many times the first one (or not finite) counts as divergence."""


_STALL = 12


_STUCK = 30


_PLAIN = 24


_PATIENCE = 15


_WINDOW = 4


_UNSEEN = 4


MEMORY = 6
"""How many values the mixing combines."""


@dataclass(frozen=True)
class Relaxation:
    """Where a relaxation stopped.

    Args:
        value: The estimate of the fixed point, `(K, *shape)`.
        residual: Largest relative residual of a node.
        trace: The residual at every step at which it was measured: all but some of plain iteration.
        steps: Number of steps.
        diverged: The residual grew beyond all bounds or is not finite, or the way to the value is too long.

    Example:
        >>> import torch
        >>> result = iterate(lambda z: 0.5 * z + 1, torch.zeros(1, 2), tol=1e-3)
        >>> result.diverged, result.residual <= 1e-3
        (False, True)
    """

    value: Tensor
    residual: float
    trace: tuple[float, ...]
    steps: int
    diverged: bool

    def after(self, way: float, scale: float) -> Relaxation:
        """The same, called diverged if the way was so long that a small residual means nothing.

        Args:
            way: The norm of the whole displacement.
            scale: That of the force on a node, in the same unit.

        Returns:
            The result; diverged where the residual is lost in the rounding of the state itself.
        """
        lost = way > scale * len(self.value) / torch.finfo(self.value.dtype).eps ** 0.5
        return replace(self, diverged=self.diverged or lost)


def iterate(
    step: Step,
    start: Tensor,
    *,
    scale: float | RowScale = 1.0,
    tol: float = 1e-6,
    max_iter: int = 100,
    floor: float = 0.0,
    memory: int = MEMORY,
) -> Relaxation:
    """Extrapolated iteration, Anderson mixing if that proves slow, or plain iteration.

    In every second step the loop goes on along the residual, to where that of a linear map would be smallest. Once more
    than 15 steps are left at the rate of the last four, it combines as many values as it may. Where that stalls, as it
    does near a state that is almost a fixed point, the map itself goes on for 24 steps, 48 the next time, and so on.

    Args:
        step: The map, `(K, *shape) -> (K, *shape)`, real. Each value must be a new tensor.
        start: First guess, of the same shape.
        scale: What residuals are relative to; or a function from a value of the map to one number for each row.
        tol: Relative residual at which to stop.
        max_iter: Largest number of steps.
        floor: Relative residual that rounding may leave: one below it that no longer falls ends the loop.
        memory: Number of values that the mixing combines; 1 for plain iteration.

    Returns:
        The value of the map at the point with the smallest residual. Not converged if the loop ran out of steps or
        reached the floor.

    Example:
        >>> import torch
        >>> iterate(torch.cos, torch.zeros(1, 1)).value.round(decimals=3)
        tensor([[0.7390]])
    """
    point = best = lowest_value = start
    smallest = lowest = math.inf  # of all steps, and of the present stretch, accelerated or plain
    lowest_at = begun_at = measured_at = next_at = 0
    plain_until, plain_steps = 0 if memory > 1 else max_iter, _PLAIN
    trace: list[float] = []
    acceleration: Extrapolation | Mixing | None = Extrapolation() if memory > 1 else None
    for k in range(max_iter):
        value = step(point)
        if k < min(next_at, max_iter - 1):
            point = value
            continue
        if acceleration is None:
            trace.append(largest_row(value - point, None, scale, value))
        else:
            trace.append(largest_row(*acceleration.add(value, point), scale, value))
        if not math.isfinite(trace[-1]) or trace[-1] > DIVERGED * max(trace[0], tol):
            return Relaxation(best, trace[-1], tuple(trace), k + 1, True)
        if trace[-1] < 0.9 * lowest:
            lowest_at = k
        if trace[-1] < lowest:
            lowest, lowest_value = trace[-1], value
        if trace[-1] < smallest:
            smallest, best = trace[-1], value
        if trace[-1] <= tol or (smallest <= floor and k - lowest_at >= _STALL):
            break
        if acceleration is None and k < plain_until:
            next_at = k + 1 + _steps_unseen(trace, k - measured_at, tol)
            measured_at, point = k, value
            continue
        if acceleration is None:
            acceleration = Extrapolation()
            acceleration.add(value, point)
            begun_at = lowest_at = k
            lowest, lowest_value = trace[-1], value
        elif k - lowest_at >= _STUCK:
            acceleration, point = None, lowest_value
            lowest, lowest_at, measured_at = math.inf, k, k
            plain_until, plain_steps = k + plain_steps, 2 * plain_steps
            continue
        if trace[-1] > 10 * lowest:
            point = acceleration.restart(lowest_value)
            continue
        between = isinstance(acceleration, Extrapolation) and acceleration.is_between
        if between and k >= begun_at + _WINDOW and _is_slow(trace, tol):
            acceleration = Mixing(memory, value)
            acceleration.add(value, point)
        point = acceleration.next()
    return Relaxation(best, smallest, tuple(trace), k + 1, False)


def _is_slow(trace: list[float], tol: float) -> bool:
    """Whether more than `_PATIENCE` steps are left at the rate of the last `_WINDOW`."""
    gained = math.log(trace[-1 - _WINDOW] / trace[-1])
    return tol <= 0 or math.log(trace[-1] / tol) * _WINDOW > _PATIENCE * gained


def _steps_unseen(trace: list[float], gap: int, tol: float) -> int:
    """How many steps of plain iteration need not be looked at: one less than are left at the present rate."""
    if len(trace) < 2 or not 0 < trace[-1] < trace[-2] or tol <= 0:
        return 0
    left = gap * math.log(tol / trace[-1]) / math.log(trace[-1] / trace[-2])
    return min(int(left), _UNSEEN)


def largest_row(residual: Tensor, size: float | None, scale: float | RowScale, value: Tensor) -> float:
    """The largest residual of a node, relative; `size` is the norm of the whole residual where it is known."""
    if callable(scale):
        return float((torch.linalg.vector_norm(residual.flatten(1), dim=1) / scale(value)).max())
    if residual.shape[0] == 1:
        return (float(torch.linalg.vector_norm(residual)) if size is None else size) / scale
    return float(torch.linalg.vector_norm(residual.flatten(1), dim=1).max()) / scale
