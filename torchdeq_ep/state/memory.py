"""What a layer remembers from one backward pass to the next: what was measured of it, and what was said about it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torchdeq_ep.errors import EPWarning, InvalidOptionError

_PASSES_BEFORE_A_REPEAT = 100
_GROWTH = 10
_MEASURED_EVERY = 64
_ALIKE = 2.0
Key = tuple[str | float | bool, ...]


@dataclass
class Tally:
    """How often something was found, and the worst of it, which stands for the others.

    Args:
        count: How often.
        worst: The finding that was largest.
        size: How large it was.
        due: The count at which it is said again.
    """

    count: int = 0
    worst: str = ""
    size: float = -1.0
    due: int = 1


@dataclass
class Memory:
    """What is known of one layer. A mode that is called directly has a new one each time.

    Args:
        lasting: Whether it is kept from one pass to the next.
        silent: Whether nothing is to be said: of a solve that the user did not ask for.
        passes: Backward passes so far.
        independent: Whether rows were found independent, by their layout and by whether `f` records statistics.
        rounding: What `f` was found to round by, by dtype and precision.
        calls: Calls of `f` that finding out took.
        growth: How many times larger than the force the displacement was in the last pass, as a power of three.
        refinement: What automatic amplitudes are divided by, because their error was found too large.
        nudge_error: What the finite amplitude added to the error vector when that was last measured.
        krylov_gains: Whether GMRES solved what the loop for linear equations did not; `None` if it never had to.
        recordable: Whether `f` can be recorded at a state that asks for a gradient.
        beta: At which amplitude.
        prefers_limit: Whether nudges with the asymmetric correction spoilt the limit that they started from.
        state_is_hidden: Whether autograd knows of no way from its value to the state.
        compared: Whether autograd's derivative of `f` was compared with that of its values.
        hidden: By how much they were found to differ.
        certified: Passes that had a certificate.
        adjoint_residuals: The sum of their adjoint residuals, and the largest.
        seen_in_evaluation: Whether it was called in evaluation mode with autograd on.
        regulated: The pass in which homeostasis last worked on the whole Jacobian.
        tallies: What was found, by kind of warning and by what it was about.

    Example:
        >>> import warnings
        >>> memory = Memory()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for residual in (0.01, 0.03, 0.02):
        ...         memory.passes += 1
        ...         memory.warn(EPWarning, "nudge", f"it stopped at {residual}", lambda: "Raise max_iter.", residual)
        >>> len(caught), memory.summary()
        (1, 'in 3 of 3 backward passes it stopped at 0.03')
    """

    lasting: bool = False
    silent: bool = False
    passes: int = 0
    independent: dict[Key, bool] = field(default_factory=dict)
    rounding: dict[Key, float] = field(default_factory=dict)
    calls: int = 0
    growth: float = 1.0
    refinement: float = 1.0
    nudge_error: float = 0.0
    beta: float = 0.0
    prefers_limit: bool = False
    krylov_gains: bool | None = None
    recordable: bool = True
    state_is_hidden: bool = False
    compared: bool = False
    hidden: float = 0.0
    certified: int = 0
    adjoint_residuals: tuple[float, float] = (0.0, 0.0)
    seen_in_evaluation: bool = False
    regulated: float = -math.inf
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    _due: int = field(default=1, init=False)

    def is_due(self, beta: float) -> bool:
        """Whether the nudge error is to be measured.

        It is in passes 1, 2, 4, ... 64, in every 64th from there, and at an amplitude twice or half as large.

        Args:
            beta: The amplitude.

        Returns:
            Whether it is.
        """
        is_known = self.beta > 0 and 1 / _ALIKE < beta / self.beta < _ALIKE
        return self.passes >= self._due or not is_known

    def measured(self, beta: float, nudge_error: float) -> None:
        """Keep a nudge error that was measured.

        Args:
            beta: The amplitude at which it was.
            nudge_error: What was found.
        """
        self.beta, self.nudge_error = beta, nudge_error
        self._due = self.passes + min(max(self.passes, 1), _MEASURED_EVERY)

    def certify(self, adjoint_residual: float) -> None:
        """Count an adjoint residual.

        Args:
            adjoint_residual: Of one pass.
        """
        total, largest = self.adjoint_residuals
        self.certified += 1
        self.adjoint_residuals = total + adjoint_residual, max(largest, adjoint_residual)

    def warn(
        self, category: type[EPWarning], about: str, finding: str, advice: Callable[[], str], size: float = 0.0
    ) -> None:
        """Warn at the first time, once there were more than a hundred, and whenever that number has grown tenfold.

        One that is silent does nothing.

        Args:
            category: Class of the warning.
            about: What the finding is about: counts are kept by category and this.
            finding: What happened, as a clause without a full stop.
            advice: What may be the cause and what to do, in sentences; asked only if the warning is issued.
            size: How bad it is; of the worst finding the text is kept.
        """
        if self.silent:
            return
        tally = self.tallies.setdefault((category.__name__, about), Tally())
        tally.count += 1
        if not size <= tally.size:
            tally.worst, tally.size = finding, size
        if tally.count < tally.due:
            return
        tally.due = _GROWTH * max(tally.count, _PASSES_BEFORE_A_REPEAT // _GROWTH) + 1
        said = finding if tally.count == 1 else self._counted(tally)
        warnings.warn(f"{said}. {advice()}", category, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain values.

        Returns:
            Numbers, strings, tuples and dictionaries of them.
        """
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember something else.

        Args:
            state: As `state_dict` returned it.

        Raises:
            InvalidOptionError: If it is no such state.
        """
        names = {each.name for each in fields(self)}
        if set(state) != names:
            raise InvalidOptionError(
                f"this is not what a layer of this version remembers: {sorted(set(state) ^ names)} differ."
            )
        for name, value in state.items():
            copied = dict(value) if isinstance(value, Mapping) else value
            setattr(self, name, copied)
        self.tallies = {key: Tally(**tally) for key, tally in state["tallies"].items()}

    def summary(self) -> str:
        """What was found so far, one line for each kind.

        Returns:
            The lines; empty if there was nothing to say.
        """
        return "\n".join(self._counted(tally) for tally in self.tallies.values())

    def _counted(self, tally: Tally) -> str:
        return f"in {tally.count} of {max(self.passes, tally.count)} backward passes {tally.worst}"
