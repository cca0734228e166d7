"""Relaxation: from a displacement map to its fixed point, by our own loop or by any torchdeq solver.

Convergence is judged on the whole state of every node, by the residual `|D(d) - d|` relative to the force: solvers that
look at rows report what is not so when the rows are coupled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError, unknown_name

Step = Callable[[Tensor], Tensor]
Solver = Callable[..., Any]

DIVERGED = 1e4
"""A residual this many times the first one (or not finite) counts as divergence."""

_STALL = 12
_SLOW = 6
_RESTARTS = 20


@dataclass(frozen=True)
class Relaxation:
    """Where a relaxation stopped.

    Args:
        displacement: The estimate of the fixed point, `(K, *shape)`.
        residual: Largest relative residual of a node.
        trace: The residual at every step of the map.
        diverged: The residual grew beyond all bounds or is not finite.
    """

    displacement: Tensor
    residual: float
    trace: tuple[float, ...]
    diverged: bool


def relax(
    step: Step,
    start: Tensor,
    *,
    scale: float,
    tol: float,
    max_iter: int,
    floor: float = 0.0,
    solver: str | Solver | None = None,
) -> Relaxation:
    """Solve `d = step(d)` for a stack of nodes.

    Args:
        step: The map, `(K, *shape) -> (K, *shape)`, real or complex.
        start: First guess, of the same shape.
        scale: What residuals are relative to: the norm of the force on a node.
        tol: Relative residual at which to stop.
        max_iter: Largest number of steps.
        floor: Relative residual that rounding may leave: one below it that no longer falls ends the loop.
        solver: `None` for [`iterate`][torchdeq_ep.relaxation.iterate], the name of a solver registered with torchdeq,
            or a callable of the same signature.

    Returns:
        The result, converged or not.

    Raises:
        InvalidOptionError: If no solver of that name is registered.

    Example:
        >>> import torch
        >>> result = relax(lambda d: 0.5 * d + 1, torch.zeros(1, 2), scale=1.0, tol=1e-6, max_iter=50)
        >>> result.displacement.round(decimals=3)
        tensor([[2., 2.]])
    """
    nodes = len(start)

    def as_rows(d: Tensor) -> Tensor:
        # torchdeq's solvers transpose without conjugation, so a complex state is handed over as pairs of reals.
        return (torch.view_as_real(d) if d.is_complex() else d).reshape(nodes, -1)

    def from_rows(rows: Tensor) -> Tensor:
        if start.is_complex():
            return torch.view_as_complex(rows.reshape(*start.shape, 2))
        return rows.reshape(start.shape)

    def rows_step(rows: Tensor) -> Tensor:
        return as_rows(step(from_rows(rows)))

    rows = as_rows(start)
    if solver is None:
        result = iterate(rows_step, rows, scale=scale, tol=tol, floor=floor, max_iter=max_iter)
    else:
        result = _drive(find_solver(solver), rows_step, rows, scale=scale, tol=tol, max_iter=max_iter)
    # So far out the residual is lost in the rounding of d itself, and a small one means nothing.
    lost = float(result.displacement.norm()) > scale * nodes / torch.finfo(rows.dtype).eps ** 0.5
    return Relaxation(from_rows(result.displacement), result.residual, result.trace, result.diverged or lost)


def iterate(
    step: Step,
    start: Tensor,
    *,
    scale: float = 1.0,
    tol: float = 1e-6,
    max_iter: int = 100,
    floor: float = 0.0,
    memory: int = 5,
) -> Relaxation:
    """Plain iteration, with Anderson acceleration from the moment it proves slow.

    Args:
        step: The map, `(K, n) -> (K, n)`, real.
        start: First guess, `(K, n)`.
        scale: What residuals are relative to.
        tol: Relative residual at which to stop.
        max_iter: Largest number of steps.
        floor: Relative residual that rounding may leave: one below it that no longer falls ends the loop.
        memory: Number of differences that the acceleration keeps.

    Returns:
        The value of the map at the point with the smallest residual. Not converged if the loop ran out of steps or
        reached the floor.

    Example:
        >>> import torch
        >>> iterate(torch.cos, torch.zeros(1, 1)).displacement.round(decimals=3)
        tensor([[0.7390]])
    """
    point, best = start, start
    smallest, smallest_at = math.inf, 0
    trace: list[float] = []
    history: _Anderson | None = None
    for k in range(max_iter):
        value = step(point)
        difference = value - point
        residual = float(torch.linalg.vector_norm(difference, dim=1).max()) / scale
        trace.append(residual)
        if not math.isfinite(residual) or residual > DIVERGED * max(trace[0], tol):
            return Relaxation(best, residual, tuple(trace), True)
        if residual < 0.9 * smallest:
            smallest_at = k
        if residual < smallest:
            smallest, best = residual, value
        if residual <= tol:
            break
        if history is None and _is_slow(trace, tol):
            history, smallest_at = _Anderson(memory, point), k
        elif k - smallest_at >= _STALL and smallest <= floor:
            break
        if history is None:
            point = value
        elif residual > 10 * smallest:
            history, point = _Anderson(memory, point), best
        else:
            point = history.next(value, difference)
    return Relaxation(best, smallest, tuple(trace), False)


def _is_slow(trace: list[float], tol: float) -> bool:
    """Whether plain iteration, at the rate of its last three steps, still needs many."""
    if len(trace) < 4:
        return False
    rate = (trace[-1] / trace[-4]) ** (1 / 3)
    return rate >= 1 or math.log(tol / trace[-1]) / math.log(rate) > _SLOW


class _Anderson:
    """Type-II Anderson mixing; one set of coefficients for the whole stack (Walker & Ni 2011, SINUM 49:1715)."""

    def __init__(self, memory: int, like: Tensor) -> None:
        self._residuals = like.new_empty(memory, like.numel())
        self._values = like.new_empty(memory, like.numel())
        self._gram = torch.zeros(memory, memory, dtype=torch.float64, device=like.device)
        self._count = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def next(self, value: Tensor, difference: Tensor) -> Tensor:
        """The next point, from the value of the map at this one and how much it differs from the point."""
        eps = torch.finfo(value.dtype).eps
        if self._last is not None:
            self._remember(value, difference, eps)
        self._last = value, difference
        used = min(self._count, len(self._gram))
        if used == 0:
            return value
        residuals, gram = self._residuals[:used], self._gram[:used, :used]
        scales = gram.diagonal().sqrt()
        ridge = 10 * eps * torch.eye(used, dtype=gram.dtype, device=gram.device)
        right = (residuals @ difference.flatten()).double() / scales
        coefficients = torch.linalg.solve(gram / (scales[:, None] * scales) + ridge, right) / scales
        mixed: Tensor = value - (coefficients.to(value.dtype) @ self._values[:used]).reshape(value.shape)
        return mixed

    def _remember(self, value: Tensor, difference: Tensor, eps: float) -> None:
        last_value, last_difference = cast(tuple[Tensor, Tensor], self._last)
        slot = self._count % len(self._gram)
        column = torch.sub(difference.flatten(), last_difference.flatten(), out=self._residuals[slot])
        # A residual that does not change (I - J is singular) would make the step arbitrarily long.
        if float(column.norm()) <= 100 * eps * float(difference.norm()):
            self._count = 0
            return
        torch.sub(value.flatten(), last_value.flatten(), out=self._values[slot])
        self._count += 1
        used = min(self._count, len(self._gram))
        self._gram[slot, :used] = self._gram[:used, slot] = (self._residuals[:used] @ column).double()


def find_solver(solver: str | Solver) -> Solver:
    """The solver of that name in torchdeq's registry; a callable is returned as it is.

    Args:
        solver: A name given to `torchdeq.solver.register_solver`, or a callable of the same signature.

    Returns:
        The solver.

    Raises:
        InvalidOptionError: If no solver of that name is registered.

    Example:
        >>> find_solver("anderson").__name__
        'anderson_solver'
    """
    if callable(solver):
        return solver
    from torchdeq.solver import _solvers

    if solver not in _solvers:
        raise InvalidOptionError(unknown_name("solver", solver, _solvers))
    found: Solver = _solvers[solver]
    return found


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
        residual = float(torch.linalg.vector_norm(value - point, dim=1).max()) / self._scale
        self.trace.append(residual)
        if residual < self.smallest:
            self.best, self.smallest = value, residual
        self.diverged = not residual <= DIVERGED * max(self.trace[0], self._tol)
        if self.diverged or residual <= self._tol or len(self.trace) >= self._max_iter:
            raise _SolvedError
        return value


def _drive(solver: Solver, step: Step, start: Tensor, *, scale: float, tol: float, max_iter: int) -> Relaxation:
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
    residual = observer.trace[-1] if diverged else observer.smallest
    return Relaxation(observer.best, residual, tuple(observer.trace), diverged)


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
