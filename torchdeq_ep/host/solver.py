"""The package's relaxation loop as a solver of torchdeq, `"relaxation"`, for free phases and for torchdeq's own IFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdeq.solver import register_solver
from torchdeq.solver.stat import SolverStat

from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.relaxation import Relaxation, iterate
from torchdeq_ep.state import Rows, are_independent, largest_row_norm, row_norms

STOP_MODES = ("abs", "rel")
TINY = 1e-9
"""Added to what is divided by, as torchdeq's solvers do."""


def check_stop_mode(stop_mode: str) -> None:
    """Raises InvalidOptionError unless it is one of torchdeq's."""
    if stop_mode not in STOP_MODES:
        raise InvalidOptionError(unknown_name("stop_mode", stop_mode, STOP_MODES))


def statistics_of(absolute: Tensor, relative: Tensor, steps: Tensor) -> SolverStat:
    """What torchdeq's solvers tell of a solve.

    Args:
        absolute: Residual of each row at each step, of shape `(rows, steps)`.
        relative: The same, relative.
        steps: Numbers of steps.

    Returns:
        torchdeq's statistics.
    """
    return SolverStat(
        abs_lowest=absolute.amin(1),
        rel_lowest=relative.amin(1),
        abs_trace=absolute,
        rel_trace=relative,
        nstep=steps,
    )


def relaxation_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    memory: int | None = None,
    **_: Any,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """Extrapolated iteration, and Anderson mixing if that proves slow; see [`iterate`][torchdeq_ep.relaxation.iterate].

    Registered with torchdeq on import: `get_deq(f_solver="relaxation")`. It takes the options of torchdeq's own solvers
    and stops where they do. Where its mixing begins, it measures whether rows are independent, in one or two calls of
    `func` that are not counted: each row then has weights of its own, as in torchdeq's. Coupled rows share theirs.

    Args:
        func: The map.
        x0: First guess, of any shape.
        max_iter: Largest number of calls of `func`.
        tol: Largest residual of a row at which to stop.
        stop_mode: `"abs"`: the norm of a row of `func(x) - x`. `"rel"`: relative to that of `func(x)`.
        indexing: Numbers of iterations, from 1, whose values are to be returned as well.
        memory: Number of differences of values that the mixing combines, 1 for plain iteration. By default 6 and, where
            that is slow, 20, or 10 for each row.

    Returns:
        The value of `func` with the smallest residual; the values at `indexing`; and torchdeq's statistics, with one
        row for the whole state. The mode that is not `stop_mode` is converted with the norm of the largest row.

    Raises:
        InvalidOptionError: If `stop_mode` is neither of the two, or `max_iter` is less than 1.

    Example:
        >>> import torch
        >>> z, _, info = relaxation_solver(torch.cos, torch.zeros(1, 1), tol=1e-5)
        >>> z.round(decimals=3)
        tensor([[0.7390]])
    """
    check_stop_mode(stop_mode)
    if max_iter < 1:
        raise InvalidOptionError(f"max_iter must be at least 1, not {max_iter}: the solver returns a value of the map.")
    wide = torch.promote_types(x0.dtype, torch.float32)
    rows = len(x0) if x0.dim() > 1 else 1
    wanted = set(indexing or ())
    visited: dict[int, Tensor] = {}
    calls = 0

    def state(flat: Tensor) -> Tensor:
        shaped = torch.view_as_complex(flat.reshape(*x0.shape, 2)) if x0.is_complex() else flat.reshape(x0.shape)
        return shaped.to(x0.dtype)

    def as_rows(x: Tensor) -> Tensor:
        x = x.to(wide)
        real = torch.view_as_real(x) if x.is_complex() else x
        return real.reshape(rows, real.numel() // max(rows, 1))

    seen: dict[str, Tensor] = {}

    def step(flat: Tensor) -> Tensor:
        nonlocal calls
        value = func(state(flat))
        calls += 1
        if calls in wanted:
            visited[calls] = value.clone()  # func may overwrite its buffer
        seen["point"], seen["value"] = flat, as_rows(value).clone()
        return seen["value"]

    def independent_rows() -> Rows | None:
        if rows < 2:
            return None
        layout = Rows(rows, (x0.numel() // rows,))
        if not are_independent(lambda x: as_rows(func(state(x))), seen["point"], seen["value"], layout):
            return None
        return Rows(1, layout.parts)  # each row is a state of its own in the stack

    scale = 1.0 if stop_mode == "abs" else _row_norms
    start = as_rows(x0).clone()  # it is returned if no value is finite
    result = iterate(step, start, scale=scale, tol=tol, max_iter=max_iter, memory=memory, rows=independent_rows)
    z = state(result.value)
    reached = [visited[k] for k in indexing or () if k in visited]
    trajectory = reached or [z.clone()] if indexing else []  # torchdeq's solvers return at least one, too
    return z, trajectory, _statistics(result, stop_mode)


def _row_norms(value: Tensor) -> Tensor:
    return row_norms(value) + TINY


def _statistics(result: Relaxation, stop_mode: str) -> SolverStat:
    size = largest_row_norm(result.value) + TINY
    measured = torch.tensor([list(result.trace)])
    converted = measured / size if stop_mode == "abs" else measured * size
    absolute, relative = (measured, converted) if stop_mode == "abs" else (converted, measured)
    return statistics_of(absolute, relative, torch.tensor([float(result.steps)]))


register_solver("relaxation", relaxation_solver)
