"""Relaxation: from a map of a stack of nodes to its fixed point, by our own loop or by any torchdeq solver.

Convergence is judged on the whole state of every node, by the residual `|N(z) - z|` relative to the nudge: solvers that
look at rows report what is not so when the rows are coupled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError, unknown_name

Step = Callable[[Tensor], Tensor]
Solver = Callable[..., Any]
Scale = Callable[[Tensor], Tensor]

DIVERGED = 1e4
"""A residual this many times the first one (or not finite) counts as divergence."""

_STALL = 12
_STUCK = 30
_PLAIN = 24
_PATIENCE = 15
_WINDOW = 4
_RESTARTS = 20
_UNSEEN = 4

MEMORY = 6
"""How many values the mixing combines."""
OWN_SOLVERS = {"auto": MEMORY, "plain": 1}
"""Names of the package's own loop, and how many values each may combine."""


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
    """Solve `z = step(z)` for a stack of nodes.

    Args:
        step: The map, `(K, *shape) -> (K, *shape)`, real or complex.
        start: First guess, of the same shape.
        scale: What residuals are relative to: the norm of the term of the map that does not depend on the state.
        tol: Relative residual at which to stop.
        max_iter: Largest number of steps.
        floor: Relative residual that rounding may leave: one below it that no longer falls ends the loop.
        solver: `None` or `"auto"` for [`iterate`][torchdeq_ep.relaxation.iterate]; `"plain"` for the same without
            acceleration; the name of a solver registered with torchdeq, or a callable of the same signature.

    Returns:
        The result, converged or not.

    Raises:
        InvalidOptionError: If no solver of that name is registered.

    Example:
        >>> import torch
        >>> result = relax(lambda z: 0.5 * z + 1, torch.zeros(1, 2), scale=1.0, tol=1e-6, max_iter=50)
        >>> result.value.round(decimals=3)
        tensor([[2., 2.]])
    """
    # Solvers are given pairs of reals: torchdeq's transpose without conjugation, ours takes real inner products.
    real_step, real_start = step, start
    if start.is_complex():
        real_start = torch.view_as_real(start)

        def real_step(z: Tensor) -> Tensor:
            return torch.view_as_real(step(torch.view_as_complex(z)))

    solver = check_solver(solver)
    if isinstance(solver, str):
        memory = OWN_SOLVERS[solver]
        result = iterate(real_step, real_start, scale=scale, tol=tol, max_iter=max_iter, floor=floor, memory=memory)
    else:
        result = _drive(solver, real_step, real_start, scale=scale, tol=tol, max_iter=max_iter)
    return replace(result, value=torch.view_as_complex(result.value)) if start.is_complex() else result


def check_solver(solver: str | Solver | None) -> str | Solver:
    """What a choice of solver stands for.

    Args:
        solver: As for [`relax`][torchdeq_ep.relaxation.relax].

    Returns:
        `"auto"` or `"plain"` for the package's own loop, and the solver itself otherwise.

    Raises:
        InvalidOptionError: If no solver of that name is registered.

    Example:
        >>> check_solver(None), check_solver("plain"), check_solver("anderson").__name__
        ('auto', 'plain', 'anderson_solver')
    """
    if solver is None:
        return "auto"
    return solver if isinstance(solver, str) and solver in OWN_SOLVERS else find_solver(solver)


def iterate(
    step: Step,
    start: Tensor,
    *,
    scale: float | Scale = 1.0,
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
    acceleration: _Extrapolation | _Mixing | None = _Extrapolation() if memory > 1 else None
    for k in range(max_iter):
        value = step(point)
        if k < min(next_at, max_iter - 1):
            point = value
            continue
        if acceleration is None:
            trace.append(_largest_row(value - point, None, scale, value))
        else:
            trace.append(_largest_row(*acceleration.add(value, point), scale, value))
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
            acceleration = _Extrapolation()
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
        between = isinstance(acceleration, _Extrapolation) and acceleration.is_between
        if between and k >= begun_at + _WINDOW and _is_slow(trace, tol):
            acceleration = _Mixing(memory, value)
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


def _largest_row(residual: Tensor, size: float | None, scale: float | Scale, value: Tensor) -> float:
    """The largest residual of a node, relative; `size` is the norm of the whole residual where it is known."""
    if callable(scale):
        return float((torch.linalg.vector_norm(residual.flatten(1), dim=1) / scale(value)).max())
    if residual.shape[0] == 1:
        return (float(torch.linalg.vector_norm(residual)) if size is None else size) / scale
    return float(torch.linalg.vector_norm(residual.flatten(1), dim=1).max()) / scale


class _Extrapolation:
    """Every second step goes on along its residual, to where that of a linear map would be smallest.

    Let `p` and `r` be the residuals of two steps in a row, and `value` the end of the second. The next point is
    `value + t r` with the `t` for which `|r + t (r - p)|` is smallest: Anderson mixing of two values, in every second
    step (Banerjee, Suryanarayana & Pask 2016, Chem. Phys. Lett. 647:31). Nothing but `p` is held, for the length of a
    step.
    """

    def __init__(self) -> None:
        self._first: tuple[Tensor, float] | None = None

    @property
    def is_between(self) -> bool:
        """Whether no residual waits for the one that it would be combined with."""
        return self._first is None

    def restart(self, point: Tensor) -> Tensor:
        """Start anew from a point."""
        self._first = None
        return point

    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float]:
        """Take in a value of the map; its residual, and the norm of that."""
        residual = value - point
        size = float(torch.linalg.vector_norm(residual))
        self._last = value, residual, size
        return residual, size

    def next(self) -> Tensor:
        """The next point."""
        value, residual, size = self._last
        del self._last
        if self._first is None:
            self._first = residual, size
            return value
        previous, previous_size = self._first
        self._first = None
        product = float(torch.dot(residual.flatten(), previous.flatten()))
        change = size**2 - 2 * product + previous_size**2
        if change <= 100 * torch.finfo(value.dtype).eps * size * previous_size:
            return value  # two residuals that are equal but for rounding tell nothing
        return torch.add(value, residual, alpha=(product - size**2) / change, out=residual)


class _Mixing:
    """Type-II Anderson mixing: the affine combination of the last values of the map that has the smallest residual.

    One set of weights for the whole stack (Walker & Ni 2011, SINUM 49:1715, algorithm AA). The weights come from the
    inner products of the residuals alone, so a step costs one product with them, and one transfer of a few numbers.
    """

    def __init__(self, memory: int, origin: Tensor) -> None:
        # Values are combined as seen from the first one: with large weights of both signs, rounding grows with the
        # size of what is combined.
        self._origin = origin.flatten()
        self._shape = origin.shape
        self._values = origin.new_empty(memory, origin.numel())
        self._residuals = torch.empty_like(self._values)
        self._gram = [[0.0] * memory for _ in range(memory)]
        self._ridge = 10 * torch.finfo(origin.dtype).eps
        self._slot, self._known = -1, 0

    def restart(self, point: Tensor) -> Tensor:
        """Start anew from a point: the values so far belong to another region."""
        self._slot, self._known = -1, 0
        return point

    def add(self, value: Tensor, point: Tensor) -> tuple[Tensor, float]:
        """Take in a value of the map; its residual, and the norm of that."""
        memory = len(self._gram)
        slot = self._slot = (self._slot + 1) % memory
        self._known = min(self._known + 1, memory)
        residual = self._residuals[slot]
        torch.sub(value.flatten(), self._origin, out=self._values[slot])
        torch.sub(value.flatten(), point.flatten(), out=residual)
        products = torch.mv(self._residuals[: self._known], residual).tolist()
        for other, product in enumerate(products):
            self._gram[slot][other] = self._gram[other][slot] = product
        return residual.view(self._shape), math.sqrt(products[slot])

    def next(self) -> Tensor:
        """The next point."""
        known = self._known
        weights = affine_weights([row[:known] for row in self._gram[:known]], self._ridge)
        values = self._values[:known]
        return torch.addmv(self._origin, values.T, values.new_tensor(weights)).view(self._shape)


def affine_weights(gram: list[list[float]], ridge: float) -> list[float]:
    """The weights `w` with `sum w = 1` for which `|sum_i w_i r_i|` is smallest, from the products `r_i . r_j`.

    Args:
        gram: Products of the residuals, positive on the diagonal.
        ridge: Added to the diagonal of the correlation matrix, so that nearly parallel residuals do no harm.

    Returns:
        The weights. Equal residuals get equal weights.

    Example:
        >>> [round(w, 6) for w in affine_weights([[4.0, 2.0], [2.0, 1.0]], 1e-12)]
        [-1.0, 2.0]
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    # Elimination without pivoting, for a positive definite matrix; the last column is the right-hand side.
    rows = [
        [product / (norm * other) for product, other in zip(line, norms, strict=True)] + [norms[-1] / norm]
        for line, norm in zip(gram, norms, strict=True)
    ]
    for i, pivot in enumerate(rows):
        pivot[i] += ridge
    for i, pivot in enumerate(rows):
        for k in range(i + 1, len(rows)):
            factor = rows[k][i] / pivot[i]
            rows[k] = [entry - factor * above for entry, above in zip(rows[k], pivot, strict=True)]
    weights: list[float] = []
    for i in reversed(range(len(rows))):
        solved = sum(entry * weight for entry, weight in zip(rows[i][i + 1 : -1], weights, strict=True))
        weights.insert(0, (rows[i][-1] - solved) / rows[i][i])
    weights = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    total = sum(weights)
    return [weight / total for weight in weights]


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
        raise InvalidOptionError(unknown_name("solver", solver, {**OWN_SOLVERS, **_solvers}))
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
        residual = _largest_row(value - point, None, self._scale, value)
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
    return Relaxation(observer.best, residual, tuple(observer.trace), len(observer.trace), diverged)


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
