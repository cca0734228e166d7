"""Values of an option by the epoch or step from which they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_choice

Unit = Literal["epoch", "step"]


def check_unit(by: str) -> None:
    """Refuse a unit of schedules that does not exist.

    Args:
        by: What was given.

    Raises:
        InvalidOptionError: If it is none.

    Example:
        >>> check_unit("epoch")
    """
    check_choice("by", by, get_args(Unit))


def read_schedule(name: str, value: Any) -> dict[int, Any]:
    """The schedule that an option stands for; a value that is no schedule holds from the start.

    Args:
        name: What the message calls it.
        value: What was given.

    Returns:
        Values by the epoch or step from which they hold.

    Raises:
        InvalidOptionError: If a key is no epoch or step, or none is 0.

    Example:
        >>> read_schedule("backward", "ep")
        {0: 'ep'}
    """
    schedule = dict(value) if isinstance(value, Mapping) else {0: value}
    if 0 not in schedule or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in schedule):
        raise InvalidOptionError(
            f"{name} as a schedule needs whole numbers of at least 0 as keys, 0 among them, not {list(schedule)}: "
            "each value holds from that epoch or step on."
        )
    return schedule


def current(schedule: Mapping[int, Any], now: int) -> Any:
    """The entry of a schedule with the largest key that is not beyond `now`.

    Args:
        schedule: Values by the epoch or step from which they hold; one of them 0.
        now: Epoch or step.

    Returns:
        The value.

    Example:
        >>> current({0: "ift", 2: "hep"}, 1), current({0: "ift", 2: "hep"}, 2)
        ('ift', 'hep')
    """
    return schedule[max(start for start in schedule if start <= now)]
