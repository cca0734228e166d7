"""Nudged phases by Newton's method: the factor of the free state drives the nudges, the adjoint and the tangent.

The map of a network is `z + m F(z)` with the mobility `m`, so near the free state `I - J = m K`. Whatever equation a
mode has, its residual `r` is taken back by one solution with `K` or `K^T`, and again until it has vanished: the chord
method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.extend import Equilibrium, RelaxedMode, find_solver, norm
from torchdeq_ep_physics.matrices import Factor

Taken = Callable[[Tensor], Tensor]

_ENOUGH = 1e-9


@dataclass(frozen=True, eq=False)
class ByFactor:
    """A solver with torchdeq's signature for the equations of the backward modes.

    Args:
        factor: Of `K` at the free state.
        mobility: `m` there, of shape `(batch, n_states)`.
        metric: `M` there; of the same shape.
        adjoint: Whether the equation has the adjoint of `J`: 1 for `J^T`, 2 for `M J^T M^-1`, 0 for `J`.
    """

    factor: Factor
    mobility: Tensor
    metric: Tensor
    adjoint: int = 0

    def __repr__(self) -> str:
        return "'newton'"

    def __call__(
        self, func: Callable[[Tensor], Tensor], x0: Tensor, *, max_iter: int = 50, tol: float = 1e-12, **_: Any
    ) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """The fixed point of `func`, from `x0`."""
        best, r = x0, func(x0) - x0
        first = smallest = norm(r)
        used: Taken | None = None
        for taken in self._ways():
            used = used or taken
            for _step in range(max_iter):
                point = best + self._each(taken, r)
                following = func(point) - point
                size = norm(following)
                if not size <= 0.5 * smallest:
                    break
                best, r, smallest, used = point, following, size, taken
            if smallest <= max(tol, _ENOUGH * first):
                return best, [best], {}
        mixed = find_solver("anderson")  # far from linear, or of another matrix: mixing of what the factor makes of it

        def corrected(point: Tensor) -> Tensor:
            return point + self._each(used, func(point) - point)  # type: ignore[arg-type]

        found: Tensor = mixed(corrected, best, max_iter=max_iter, tol=tol, stop_mode="abs")[0]
        return found, [found], {}

    def growth(self, cotangent: Tensor) -> float:
        """How much larger a displacement is than the force in the map that causes it, by the factor.

        Args:
            cotangent: `g`, of the shape of the state.

        Returns:
            `|K^-1 m^-1 M g| / |M g|`.
        """
        force = self.metric * cotangent
        return norm(self.factor.solve(force / self.mobility)) / norm(force)

    def _ways(self) -> Iterator[Taken]:
        """How a residual is taken back, the likeliest first."""
        m, scale = self.mobility, self.metric
        ways: list[Taken] = [
            lambda r: self.factor.solve(r / m),
            lambda r: self.factor.solve(r, transposed=True) / m,
            lambda r: scale * (self.factor.solve(r / scale, transposed=True) / m),
        ]
        yield ways.pop(self.adjoint)
        yield from ways

    def _each(self, taken: Taken, r: Tensor) -> Tensor:
        """Of a stack of states, real or pairs of reals."""
        shape = self.mobility.shape
        if r.dim() > 3 and r.shape[-3:] == (*shape, 2):
            return torch.stack([self._each(taken, part) for part in r.unbind(-1)], -1)
        return taken(r.reshape(-1, *shape)).reshape(r.shape)


@dataclass(frozen=True)
class NewtonNudges(tep.EquilibriumPropagation):
    """Equilibrium propagation whose automatic amplitude follows from the response that the factor predicts.

    In a large network a force moves the state by thousands of times what it would move one unit by, so a nudge as large
    as the state would be is far too strong.
    """

    def _solve(self, equilibrium: Equilibrium) -> Any:
        if isinstance(self.solver, ByFactor) and equilibrium.cotangent.shape == self.solver.mobility.shape:
            growth = self.solver.growth(equilibrium.cotangent)
            # In powers of three, as the core counts it.
            equilibrium.memory.growth = 3.0 ** max(0, int(math.log(growth, 3))) if growth > 0 else 1.0
        return super()._solve(equilibrium)


def by_factor(mode: RelaxedMode, factor: Factor, mobility: Tensor, metric: Tensor) -> RelaxedMode:
    """A mode whose equations the factor of the free state solves.

    Args:
        mode: The mode.
        factor: Of `K` at the free state.
        mobility: There.
        metric: There.

    Returns:
        A mode of the same options.
    """
    is_nudged = isinstance(mode, tep.EquilibriumPropagation)
    adjoint = 1 if isinstance(mode, tep.ImplicitDifferentiation) else 0
    if isinstance(mode, (tep.EquilibriumPropagation, tep.InfinitesimalEP)) and mode.correction is not None:
        adjoint = 2
    mode = replace(mode, solver=ByFactor(factor, mobility, metric, adjoint))
    if not is_nudged:
        return mode
    return NewtonNudges(**{option.name: getattr(mode, option.name) for option in fields(mode)})
