"""Checks of arguments that several places make: each refuses with the name, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable

from torchdeq_ep.errors import InvalidOptionError, unknown_name


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is none of the choices.

    Args:
        name: What the message calls it.
        value: What was given.
        choices: What is accepted.

    Raises:
        InvalidOptionError: If it is none of them.

    Example:
        >>> check_choice("by", "epoch", ("epoch", "step"))
    """
    known = tuple(choices)
    if value not in known:
        raise InvalidOptionError(unknown_name(f"value of {name}", value, known))


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not a whole number, or too small.

    Args:
        name: What the message calls it.
        value: What was given.
        least: The smallest acceptable number.

    Raises:
        InvalidOptionError: If so.

    Example:
        >>> check_count("retries", 2, 0)
        >>> check_count("workers", 0)
        Traceback (most recent call last):
        torchdeq_ep.errors.InvalidOptionError: workers must be a whole number of at least 1, not 0.
        More: torchdeq-ep errors InvalidOptionError
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidOptionError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def check_damping(value: object) -> None:
    """Refuse what is no damping of steps: a number above 0 and up to 1.

    Args:
        value: What was given.

    Raises:
        InvalidOptionError: If it is none.

    Example:
        >>> check_damping(0.5)
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise InvalidOptionError(
            f"tau must be a number above 0 and up to 1, not {value!r}: a step is tau f + (1 - tau) z."
        )


def check_metric(metric: object) -> None:
    """Refuse what cannot be a metric: it is a function of the state, an operator, `"auto"` or `None`.

    Args:
        metric: What was given.

    Raises:
        InvalidOptionError: If it is none of these.

    Example:
        >>> check_metric("auto")
    """
    is_operator = callable(getattr(metric, "apply", None)) and callable(getattr(metric, "inverse", None))
    if not is_operator and metric not in (None, "auto") and not callable(metric):
        raise InvalidOptionError(
            "metric must be a function from the state to the positive diagonal of M, an OperatorMetric, 'auto' or "
            f"None, not {metric!r}."
        )
