"""What a comparison is to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.measuring.capture import short
from torchdeq_ep.modes import ModeLike, available_backwards, get_backward
from torchdeq_ep.relaxation import Solver, check_solver

OWN_SOLVER = "own"


@dataclass(frozen=True)
class Entry:
    """A row to be measured: its labels, and the mode or the reason why there is none."""

    backward: str
    solver: str
    mode: ModeLike | None
    error: str = ""


def plan(
    backwards: Sequence[str | ModeLike] | str | ModeLike | None,
    solvers: Sequence[str | Solver | None] | str | Solver | None,
) -> tuple[Entry, ...]:
    """The rows that [`compare`][torchdeq_ep.measuring.compare] will measure; refuses names that do not exist.

    Args:
        backwards: As given to `compare`.
        solvers: As given to `compare`.

    Returns:
        Every mode with every solver.

    Raises:
        UnknownBackwardError: If no backward mode has such a name.
        InvalidOptionError: If an option or a solver does not exist, or there is nothing to compare.

    Example:
        >>> [(entry.backward, entry.solver) for entry in plan(["ift", "ep"], [None, "anderson"])]
        [('ift', 'own'), ('ift', 'anderson'), ('ep', 'own'), ('ep', 'anderson')]
    """
    chosen = _each_once(available_backwards()) if backwards is None else _as_list(backwards)
    drivers = [None] if solvers is None else _as_list(solvers)
    for name, choice in (("backwards", chosen), ("solvers", drivers)):
        if not choice:
            raise InvalidOptionError(f"there is nothing to compare: {name} is empty.")
    for spec in chosen if backwards is not None else ():  # a plugin that is broken has a row that says so
        get_backward(spec)
    for solver in drivers:
        check_solver(solver, linear=True)  # other modes refuse it, each in its row
    return tuple(_entry(spec, solver) for spec in chosen for solver in drivers)


def _each_once(names: Sequence[str]) -> list[str]:
    """Without further names of the same mode."""
    first: dict[str, str] = {}
    for name in names:
        try:
            mode = repr(get_backward(name))
        except Exception:  # a plugin that is broken has a row that says so
            mode = name
        first.setdefault(mode, name)
    return list(first.values())


def _as_list(choice: Any) -> list[Any]:
    return [choice] if isinstance(choice, str) or callable(choice) else list(choice)


def _entry(spec: str | ModeLike, solver: str | Solver | None) -> Entry:
    backward, driver = _label(spec), OWN_SOLVER if solver is None else _label(solver)
    try:
        # Not every mode takes a solver, one from a plugin say.
        return Entry(backward, driver, get_backward(spec) if solver is None else get_backward(spec, solver=solver))
    except Exception as error:  # a plugin may raise anything
        return Entry(backward, driver, None, short(error))


def _label(choice: Any) -> str:
    return choice if isinstance(choice, str) else getattr(choice, "__name__", None) or repr(choice)
