"""Broyden's method as a solver of torchdeq that keeps its inverse, `"broyden-inverse"`, for the mode `shine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdeq.solver import register_solver
from torchdeq.solver.stat import SolverStat

from torchdeq_ep.host.solver import TINY, check_stop_mode, statistics_of
from torchdeq_ep.relaxation.inverse import BroydenRun, InverseEstimate, broyden
from torchdeq_ep.state import Rows, are_independent


def broyden_inverse_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    on_history: Callable[[InverseEstimate], None] | None = None,
    **_: Any,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """Broyden's method, full steps, whose estimate of `(I - J)^-1` can be had afterwards.

    Registered with torchdeq on import: `get_deq(f_solver="broyden-inverse")`. Each row has an inverse of its own where
    rows are found to be independent, in two calls of `func`; otherwise all share one.

    Args:
        func: The map.
        x0: First guess, of any shape.
        max_iter: Largest number of steps, each of which adds two vectors of the size of the state.
        tol: Largest residual of a row at which to stop.
        stop_mode: `"abs"`: the norm of a row of `func(x) - x`. `"rel"`: relative to that of `x`.
        indexing: Accepted; there is no trajectory, and the last state stands for all.
        on_history: Called with the estimate.

    Returns:
        The state with the smallest residual, row by row; that state as often as `indexing` asks; torchdeq's statistics.

    Raises:
        InvalidOptionError: If `stop_mode` is neither of the two.

    Example:
        >>> z, _, info = broyden_inverse_solver(torch.cos, torch.zeros(1, 1), tol=1e-5)
        >>> z.round(decimals=3)
        tensor([[0.7390]])
    """
    check_stop_mode(stop_mode)
    wide = torch.promote_types(x0.dtype, torch.float32)
    count = len(x0) if x0.dim() > 1 else 1
    value = func(x0)
    if count > 1:
        rows = Rows(count, (x0.numel() // count,))
        count = count if are_independent(lambda z: func(z).clone(), x0, value.clone(), rows) else 1

    def residual(matrix: Tensor) -> Tensor:
        return matrix - func(matrix.reshape(x0.shape).to(x0.dtype)).to(wide).reshape(count, -1)

    def is_done(z: Tensor, sizes: Tensor) -> bool:
        scale = 1.0 if stop_mode == "abs" else torch.linalg.vector_norm(z, dim=1) + TINY
        return bool((sizes / scale).max() < tol)

    run = broyden(residual, x0.to(wide).reshape(count, -1), InverseEstimate(count), max_iter, is_done)
    if on_history is not None:
        on_history(run.inverse)
    z = run.state.reshape(x0.shape).to(x0.dtype)
    return z, [z.clone() for _ in indexing or ()], _statistics(run)


def _statistics(run: BroydenRun) -> SolverStat:
    absolute = run.sizes.T.float()
    size = torch.linalg.vector_norm(run.state, dim=1, keepdim=True).float() + TINY
    return statistics_of(absolute, absolute / size, (absolute.argmin(1) + 1).float())


broyden_inverse_solver.keeps = "inverse"  # type: ignore[attr-defined]
register_solver("broyden-inverse", broyden_inverse_solver)
