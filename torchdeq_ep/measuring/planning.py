"""What a comparison is to measure, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchdeq_ep.errors import EPError, InvalidOptionError
from torchdeq_ep.measuring.capture import short
from torchdeq_ep.modes import ModeLike, available_backwards, get_backward
from torchdeq_ep.relaxation import Solver, check_solver

OWN_SOLVER = "own"
OnProgress = Callable[[str, int, int], None]
"""Told what is measured next, how many steps of the whole are done, and how many there are."""


class Steps:
    """Tells a caller how far the work is.

    Args:
        on_progress: Whom to tell, if anyone.
        total: Number of steps.

    Example:
        >>> steps = Steps(print, 2)
        >>> steps("the first")
        the first 0 2
        >>> steps("the second")
        the second 1 2
        >>> steps.end()
        done 2 2
    """

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self.total = on_progress, total
        self._done = 0

    def __call__(self, what: str) -> None:
        """Before a step.

        Args:
            what: What it is about.
        """
        if self._on_progress is not None:
            self._on_progress(what, self._done, self.total)
        self._done += 1

    def end(self) -> None:
        """After the last step."""
        if self._on_progress is not None:
            self._on_progress("done", self.total, self.total)


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
    chosen = list(available_backwards()) if backwards is None else _as_list(backwards)
    drivers = [None] if solvers is None else _as_list(solvers)
    for name, choice in (("backwards", chosen), ("solvers", drivers)):
        if not choice:
            raise InvalidOptionError(f"there is nothing to compare: {name} is empty.")
    for spec in chosen:
        get_backward(spec)
    for solver in drivers:
        check_solver(solver)
    return tuple(_entry(spec, solver) for spec in chosen for solver in drivers)


def _as_list(choice: Any) -> list[Any]:
    return [choice] if isinstance(choice, str) or callable(choice) else list(choice)


def _entry(spec: str | ModeLike, solver: str | Solver | None) -> Entry:
    backward, driver = _label(spec), OWN_SOLVER if solver is None else _label(solver)
    try:
        # Not every mode takes a solver, one from a plugin say.
        return Entry(backward, driver, get_backward(spec) if solver is None else get_backward(spec, solver=solver))
    except EPError as error:
        return Entry(backward, driver, None, short(error))


def _label(choice: Any) -> str:
    return choice if isinstance(choice, str) else getattr(choice, "__name__", None) or repr(choice)
