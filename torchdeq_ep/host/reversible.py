"""The solver of reversible DEQs as a solver of torchdeq, `"reversible"`, for the mode of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdeq.solver import register_solver
from torchdeq.solver.stat import SolverStat

from torchdeq_ep.errors import InvalidOptionError, MissingHistoryError
from torchdeq_ep.host.solver import TINY, check_stop_mode, statistics_of
from torchdeq_ep.relaxation.reversing import ReversibleRun, step_forth


def reversible_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    beta: float = 0.5,
    on_history: Callable[[ReversibleRun], None] | None = None,
    **_: Any,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """Two states, each relaxed by the map of the other, so that the steps can be taken back.

    Registered with torchdeq on import: `get_deq(f_solver="reversible")`, with the mode `reversible` for its backward.
    The states are relaxed in double precision, and `func` is called in the dtype of `x0`.

    Args:
        func: The map.
        x0: First guess, of any shape.
        max_iter: Largest number of calls of `func`, two in each step.
        tol: Largest residual of a row at which to stop.
        stop_mode: `"abs"`: the norm of a row of `func(y) - z`. `"rel"`: relative to that of `func(y)`.
        indexing: Accepted; there is no trajectory, and the last state stands for all.
        beta: The relaxation, between 0 and 1. Rounding errors of the way back grow by `1 / (1 - beta)` a step.
        on_history: Called with the last two states.

    Returns:
        The second state after the last step; that state as often as `indexing` asks; torchdeq's statistics.

    Raises:
        InvalidOptionError: If `stop_mode` or `beta` is not acceptable, or `max_iter` is less than 2.
        MissingHistoryError: If nobody asks for the last two states: another backward is in use.

    Example:
        >>> runs = []
        >>> z, _, info = reversible_solver(torch.cos, torch.zeros(1, 1), tol=1e-6, on_history=runs.append)
        >>> z.round(decimals=3), len(runs)
        (tensor([[0.7390]]), 1)
    """
    check_stop_mode(stop_mode)
    if not 0 < beta < 1:
        raise InvalidOptionError(f"beta must lie between 0 and 1, not be {beta!r}: the states are relaxed by it.")
    if max_iter < 2:
        raise InvalidOptionError(f"max_iter must be at least 2, not {max_iter}: a reversible step takes two calls.")
    if on_history is None:
        raise MissingHistoryError(
            "the solver 'reversible' is used without its backward, and another is not that of its steps: call "
            "tep.use_backward(model, 'reversible') first, also to evaluate, or choose another solver."
        )
    rows = len(x0) if x0.dim() > 1 else 1
    # Kept in double precision, which is cheap for two states and lets the way back be as long again.
    y = z = x0.detach().to(torch.float32 if x0.device.type == "mps" else torch.float64)

    def f(state: Tensor) -> Tensor:
        return func(state.to(x0.dtype)).to(state.dtype)

    absolute, relative = [], []
    for _step in range(max_iter // 2):
        before = z
        y, z = step_forth(f, y, z, beta)
        residual = ((z - before) / beta).reshape(rows, -1)
        value = before.reshape(rows, -1) + residual
        absolute.append(torch.linalg.vector_norm(residual, dim=1).float())
        relative.append(absolute[-1] / (torch.linalg.vector_norm(value, dim=1).float() + TINY))
        if bool((absolute if stop_mode == "abs" else relative)[-1].max() < tol):
            break
    on_history(ReversibleRun(x0, y, z, len(absolute), beta))
    traces = torch.stack(absolute, 1), torch.stack(relative, 1)
    statistics = statistics_of(*traces, torch.full((rows,), float(2 * len(absolute))))
    result = z.to(x0.dtype)
    return result, [result.clone() for _ in indexing or ()], statistics


reversible_solver.keeps = "reversible"  # type: ignore[attr-defined]
register_solver("reversible", reversible_solver)
