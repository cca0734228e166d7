"""What a layer remembers from one backward pass to the next: what was measured of it, and what was said about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torchdeq_ep.errors import EPWarning

_PASSES_BEFORE_A_REPEAT = 100
_GROWTH = 10


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
        passes: Backward passes so far.
        independent: Whether rows were found independent, by their layout and by whether `f` records statistics.
        calls: Calls of `f` that finding out took.
        growth: How many times larger than the force the displacement was in the last pass, as a power of three.
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

    passes: int = 0
    independent: dict[Any, bool] = field(default_factory=dict)
    calls: int = 0
    growth: float = 1.0
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    def warn(
        self, category: type[EPWarning], about: str, finding: str, advice: Callable[[], str], size: float = 0.0
    ) -> None:
        """Warn at the first time, once there were more than a hundred, and whenever that number has grown tenfold.

        Args:
            category: Class of the warning.
            about: What the finding is about: counts are kept by category and this.
            finding: What happened, as a clause without a full stop.
            advice: What may be the cause and what to do, in sentences; asked only if the warning is issued.
            size: How bad it is; of the worst finding the text is kept.
        """
        tally = self.tallies.setdefault((category.__name__, about), Tally())
        tally.count += 1
        if not size <= tally.size:
            tally.worst, tally.size = finding, size
        if tally.count < tally.due:
            return
        tally.due = _GROWTH * max(tally.count, _PASSES_BEFORE_A_REPEAT // _GROWTH) + 1
        said = finding if tally.count == 1 else self._counted(tally)
        warnings.warn(f"{said}. {advice()}", category, stacklevel=3)

    def summary(self) -> str:
        """What was found so far, one line for each kind.

        Returns:
            The lines; empty if there was nothing to say.
        """
        return "\n".join(self._counted(tally) for tally in self.tallies.values())

    def _counted(self, tally: Tally) -> str:
        return f"in {tally.count} of {max(self.passes, tally.count)} backward passes {tally.worst}"
