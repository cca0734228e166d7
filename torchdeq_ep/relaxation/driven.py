"""Any solver of torchdeq, driven from outside until the whole state has converged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.relaxation.loop import Relaxation, Step
from torchdeq_ep.relaxation.progress import DIVERGED, largest_row

Solver = Callable[..., Any]

_RESTARTS = 20


class _SolvedError(Exception):
    """Raised through a solver once there is nothing left for it to do."""


class _Observer:
    """Watches the points at which a solver evaluates the map, and keeps the one with the smallest residual."""

    def __init__(self, step: Step, start: Tensor, scale: float, tol: float, max_iter: int) -> None:
        self._step, self._scale, self._tol, self._max_iter = step, scale, tol, max_iter
        self.best, self.smallest, self.diverged = start, math.inf, False
        self.trace: list[float] = []

    def __call__(self, point: Tensor) -> Tensor:
        value = self._step(point)
        residual = largest_row(value - point, None, self._scale, value)
        self.trace.append(residual)
        if residual < self.smallest:
            self.best, self.smallest = value, residual
        self.diverged = not residual <= DIVERGED * max(self.trace[0], self._tol)
        if self.diverged or residual <= self._tol or len(self.trace) >= self._max_iter:
            raise _SolvedError
        return value


def drive(solver: Solver, step: Step, start: Tensor, *, scale: float, tol: float, max_iter: int) -> Relaxation:
    """A torchdeq solver, restarted on the equation of the remaining correction until the whole state has converged.

    Each start solves for `e` in `d + s e = step(d + s e)` with `s` the present residual, so absolute constants inside a
    solver (torchdeq's Anderson has a ridge of 1e-4) are met at the same scale every time. Of all points at which the
    solver evaluates the map, the one with the smallest residual over the whole state is the result.
    """
    observer = _Observer(step, start, scale, tol, max_iter)
    diverged = False
    try:
        observer(start)
        for _ in range(_RESTARTS):
            before = observer.smallest
            corrected = _Correction(observer, observer.best, before * scale)
            budget = max_iter - len(observer.trace)
            solver(corrected, torch.zeros_like(start), max_iter=budget, tol=tol / before, stop_mode="abs")
            if not observer.smallest < 0.5 * before:
                break
    except _SolvedError:
        diverged = observer.diverged
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        diverged = True
    return Relaxation(
        observer.best, observer.smallest, tuple(observer.trace), len(observer.trace), diverged, solved=observer.smallest
    )


@dataclass(frozen=True)
class _Correction:
    """The map of the correction `e`; takes the damping `tau` that some of torchdeq's solvers pass on."""

    step: Step
    base: Tensor
    unit: float

    def __call__(self, correction: Tensor, tau: float = 1.0) -> Tensor:
        correction = correction.reshape(self.base.shape)
        moved = (self.step(self.base + self.unit * correction) - self.base) / self.unit
        return moved if tau == 1.0 else tau * moved + (1 - tau) * correction
