"""The package's own relaxation: the map itself, extrapolated, and mixed where that proves slow.

Convergence is judged on the whole state of every node, by the residual `|N(z) - z|` relative to the nudge: solvers that
look at rows report what is not so when the rows are coupled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from torchdeq_ep.relaxation.phases import Enough, Extrapolation, Mixing, Phase, Plain
from torchdeq_ep.relaxation.progress import Progress, RowScale, largest_row
from torchdeq_ep.state import Rows

Step = Callable[[Tensor], Tensor]
FindRows = Callable[[], Rows | None]

MEMORY = 6
"""How many differences of values the mixing combines at first."""
LONGEST, LONGEST_OF_ROWS = 20, 10
"""How many it may combine where that proves too few; rows of their own need fewer than a space for all."""

_STUCK = 30


@dataclass(frozen=True)
class Relaxation:
    """Where a relaxation stopped.

    Args:
        value: The estimate of the fixed point, `(K, *shape)`.
        residual: Largest relative residual of a node.
        trace: The residual at every step at which it was measured: all but some of plain iteration.
        steps: Number of steps.
        diverged: The residual grew beyond all bounds or is not finite, or the way to the value is too long.
        left: Number of rows that were left as they are and hold most of what that leaves of the residual.
        solved: The residual without theirs.

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
    left: int = 0
    solved: float = math.nan

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
    memory: int | None = None,
    rows: FindRows | None = None,
    enough: Enough | None = None,
) -> Relaxation:
    """Extrapolated iteration, Anderson mixing if that proves slow, or plain iteration.

    In every second step the loop goes on along the residual, to where that of a linear map would be smallest. Once more
    than 15 steps are left at the rate of the last four, it combines many values, with weights for each independent row.
    Where that stalls, as it does near a state that is almost a fixed point, the map itself goes on for 24 steps, 48 the
    next time, and so on.

    Args:
        step: The map, `(K, *shape) -> (K, *shape)`, real. Each value must be a new tensor.
        start: First guess, of the same shape.
        scale: What residuals are relative to; or a function from a value of the map to one number for each row.
        tol: Relative residual at which to stop.
        max_iter: Largest number of steps.
        floor: Relative residual that rounding may leave: one below it that no longer falls ends the loop.
        memory: Number of differences of values that the mixing combines, 1 for plain iteration. By default 6 and, where
            that is slow, 20, or 10 for each row.
        rows: Asked once mixing begins: where rows lie that the map treats apart, which then have weights of their own,
            or `None`. Its calls of the map are not counted.
        enough: Which rows the mixing leaves as they are: from a matrix of their points and the norms of their residuals
            to a mask. The loop ends when the others have converged.

    Returns:
        The value of the map at the point with the smallest residual. Not converged if the loop ran out of steps or
        reached the floor.

    Example:
        >>> import torch
        >>> iterate(torch.cos, torch.zeros(1, 1)).value.round(decimals=3)
        tensor([[0.7390]])
    """
    progress = Progress(start, tol, floor)
    mixing = partial(_mixing, memory, rows, enough)
    phase: Phase = Plain(start, until=max_iter) if memory == 1 else Extrapolation()
    point = start
    for k in range(max_iter):
        value = step(point)
        if phase.passes_over(k) and k < max_iter - 1:
            point = value
            continue
        residual = largest_row(*phase.add(value, point), scale, value)
        progress.measure(k, value, residual, phase.left_residual, phase.rows_left)
        if progress.has_diverged or progress.is_over:
            break
        phase = _next_phase(phase, progress, value, point, mixing)
        point = phase.next(progress)
    solved = progress.smallest
    residual = solved if callable(scale) else math.hypot(solved, progress.left_residual / scale)
    steps, trace = k + 1, tuple(progress.trace)
    return Relaxation(progress.best, residual, trace, steps, progress.has_diverged, progress.rows_left, solved)


def _next_phase(phase: Phase, progress: Progress, value: Tensor, point: Tensor, mixing: Callable[[], Mixing]) -> Phase:
    """The phase that finds the next point: the one place where it changes."""
    k = progress.k
    if isinstance(phase, Plain):
        if k < phase.until:
            return phase
        progress.begin(k, value, progress.trace[-1])
        phase = Extrapolation()
        phase.add(value, point)
    elif progress.steps_without_progress >= _STUCK:
        phase = Plain(progress.lowest_value, until=k + progress.plain_steps, since=k)
        progress.plain_steps *= 2
        progress.begin(k, progress.lowest_value)
    elif isinstance(phase, Extrapolation) and phase.is_between and not progress.has_grown and progress.is_slow:
        phase = mixing()
        phase.add(value, point)
    return phase


def _mixing(memory: int | None, rows: FindRows | None, enough: Enough | None) -> Mixing:
    found = None if rows is None else rows()
    longest = LONGEST if found is None else LONGEST_OF_ROWS
    return Mixing(memory or MEMORY, memory or longest, found, enough)
