"""Solvers of torchdeq's form that are asked for what they did on the way, for modes that need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchdeq_ep.errors import MissingHistoryError
from torchdeq_ep.relaxation.driven import Solver
from torchdeq_ep.relaxation.reversing import ReversibleRun
from torchdeq_ep.state import Map, Rows, change_tolerance, relative_difference, tensors_of

Need = Literal["steps", "inverse", "reversible"]
"""What a mode takes from the solver: the graph of its steps, its approximate inverse, or its two coupled iterates."""
_WHO_KEEPS = {"inverse": "broyden-inverse", "reversible": "reversible"}


def kept_by(solver: Solver) -> Need | None:
    """What a solver keeps: it says so in an attribute `keeps`, and takes a function `on_history` to hand it to.

    Args:
        solver: The solver.

    Returns:
        What it keeps, or `None`.
    """
    return getattr(solver, "keeps", None)


def check_pair(solver: Solver, need: Need | None) -> None:
    """Refuse a mode whose solver does not keep what it needs, and a solver that needs a mode of its own.

    Args:
        solver: The solver of the forward pass.
        need: Of the mode.

    Raises:
        MissingHistoryError: If they do not fit.
    """
    keeps = kept_by(solver)
    name = getattr(solver, "__name__", repr(solver))
    if need in _WHO_KEEPS and keeps != need:
        raise MissingHistoryError(
            f"this backward needs what the solver {_WHO_KEEPS[need]!r} keeps of the forward pass, and the solver is "
            f"{name}: choose torchdeq.get_deq(f_solver={_WHO_KEEPS[need]!r}), or tep.loop(..., "
            f"solver={_WHO_KEEPS[need]!r})."
        )
    if keeps == "reversible" and need != keeps:
        raise MissingHistoryError(
            "the solver 'reversible' makes coupled steps for the sake of its own backward, and another one is in use: "
            "choose backward='reversible', by tep.use_backward or in tep.loop, or another solver."
        )


def replay(step: Callable[[Any], Any], start: Any, solved: Any, counts: Tensor) -> Any:
    """The plain steps that a solver made, once more with their graph.

    Args:
        step: The map, in the form that the solver was given.
        start: Where the solver started: a tensor or a list of tensors.
        solved: What it returned.
        counts: The number of steps after which each row has its value, as torchdeq's `nstep`.

    Returns:
        The same values with their graph.

    Raises:
        MissingHistoryError: If plain steps do not lead there: the solver mixes or extrapolates.

    Example:
        >>> z = torch.tensor([[8.0], [8.0]])
        >>> replay(lambda z: z / 2, z, torch.tensor([[4.0], [1.0]]), torch.tensor([1.0, 3.0]))
        tensor([[4.],
                [1.]])
    """
    z, picked, total = start, start, int(counts.max())
    for index in range(1, total + 1):
        z = step(z)
        if isinstance(z, Tensor):
            due = (counts.flatten() >= index).reshape(-1, *[1] * (z.dim() - 1))
            picked = torch.where(due, z, picked)
        else:
            picked = z
    for one, other in zip(tensors_of(picked), tensors_of(solved), strict=True):
        if relative_difference(one.detach(), other.detach()) > change_tolerance(torch.finfo(other.dtype).eps):
            raise MissingHistoryError(
                "'unrolled' without a number of steps differentiates plain steps, and those of this solver are not: it "
                "mixes or extrapolates. Choose f_solver='fixed_point_iter', or steps from z* ('unrolled:k=10')."
            )
    return picked


def solve_and_keep(
    solver: Solver, f: Map, start: Tensor, rows: Rows | None, need: Need | None, **options: Any
) -> tuple[Tensor, object, int]:
    """Solve for the fixed point, and keep what a mode needs.

    Args:
        solver: The solver.
        f: The map, on packed states.
        start: First guess, packed.
        rows: Where samples lie in it: those of several tensors are solved side by side.
        need: Of the mode.
        **options: Of the solver.

    Returns:
        The fixed point, packed, with the graph of all steps if they are needed; what was kept, or `None`; and the
        number of steps.

    Raises:
        MissingHistoryError: If solver and mode do not fit.
    """
    check_pair(solver, need)
    kept: list[object] = []
    if kept_by(solver) is not None:
        options["on_history"] = kept.append
    # Solvers take the first dimension for one of samples.
    stack = start.unsqueeze(0)
    plain = start.dim() > 1

    def split(z: Tensor) -> Tensor:
        return z if plain else z.unsqueeze(0) if rows is None else rows.split(z.unsqueeze(0))

    def join(values: Tensor) -> Tensor:
        return values if plain else values[0] if rows is None else rows.join(values, stack)[0]

    def step(values: Tensor, tau: float = 1.0) -> Tensor:
        value = split(f(join(values)))
        return value if tau == 1.0 else tau * value + (1 - tau) * values

    first = split(start)
    with torch.no_grad():
        found, _, info = solver(step, first, **options)
    if need == "steps":
        found = replay(step, first, found, info["nstep"])
    history = kept[0] if kept else None
    if isinstance(history, ReversibleRun):
        history = replace(history, start=start, y=join(history.y), z=join(history.z))
    return join(found), history, int(info["nstep"].max())
