"""What a sweep goes over: the options of its runs, as they stand on the command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchdeq_ep import get_backward
from torchdeq_ep.errors import InvalidOptionError

_RANGE = re.compile(r"(?P<low>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\.\.(?P<high>[-+]?[\d.]+(?:[eE][-+]?\d+)?)(?P<log>:log)?")
_NUMBER = re.compile(r"-\.?\d.*")


@dataclass(frozen=True)
class Range:
    """Numbers to draw from.

    Args:
        low: The smallest.
        high: The largest.
        log: Whether orders of magnitude are equally likely.
        whole: Whether they are whole.

    Example:
        >>> Range.read("1e-4..1e-1:log")
        Range(low=0.0001, high=0.1, log=True, whole=False)
    """

    low: float
    high: float
    log: bool
    whole: bool

    @classmethod
    def read(cls, text: str) -> Range | None:
        """The range that a value stands for; `None` if it is no range.

        Raises:
            InvalidOptionError: If it is empty.
        """
        found = _RANGE.fullmatch(text)
        if found is None:
            return None
        low, high, log = float(found["low"]), float(found["high"]), bool(found["log"])
        if not low < high or (log and low <= 0):
            raise InvalidOptionError(f"the range {text} must rise, and with :log begin above 0.")
        return cls(low, high, log, found["low"].isdigit() and found["high"].isdigit())


def read_axes(rest: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Sort options into those with one value, and those with several or with a range.

    Args:
        rest: Options and their values.

    Returns:
        Options for every run, and values by key, without the dashes, for the others.

    Raises:
        InvalidOptionError: If there is a value without an option.

    Example:
        >>> read_axes(["--model.lr", "1e-3", "1e-2", "--trainer.max_epochs", "5"])
        (['--trainer.max_epochs', '5'], {'model.lr': ['1e-3', '1e-2']})
    """
    given: dict[str, list[str]] = {}
    name = ""
    for token in rest:
        if token.startswith("--") or (token.startswith("-") and not _NUMBER.fullmatch(token)):
            name, equals, value = token.partition("=")
            given[name] = [value] if equals else []
        elif not name:
            raise InvalidOptionError(f"nobody knows what {token!r} is for: the recipe comes first, then options.")
        else:
            given[name].append(token)
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for name, values in given.items():
        if len(values) > 1 or any(Range.read(value) for value in values):
            axes[name.lstrip("-")] = values
        else:
            fixed += [name, *values]
    return fixed, axes


def grid(axes: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination.

    Raises:
        InvalidOptionError: If there is a range among the values.

    Example:
        >>> grid({"a": ["1", "2"], "b": ["x"]})
        [{'a': '1', 'b': 'x'}, {'a': '2', 'b': 'x'}]
    """
    for key, values in axes.items():
        for value in values:
            if Range.read(value):
                raise InvalidOptionError(f"{key}={value} is a range, and a grid has points: --sampler tpe, or random.")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def draw(trial: Any, axes: dict[str, list[str]]) -> dict[str, str]:
    """A point that the sampler of a study chooses.

    Args:
        trial: A trial of Optuna.
        axes: Values or a range for each key.

    Returns:
        A value for each key, as on the command line.
    """
    chosen = {}
    for key, values in axes.items():
        span = Range.read(values[0]) if len(values) == 1 else None
        if span is None:
            chosen[key] = trial.suggest_categorical(key, values)
        elif span.whole:
            chosen[key] = str(trial.suggest_int(key, int(span.low), int(span.high), log=span.log))
        else:
            chosen[key] = repr(trial.suggest_float(key, span.low, span.high, log=span.log))
    return chosen


def specs_of(modes: Sequence[str], amplitudes: Sequence[float]) -> list[str]:
    """Modes with each amplitude; modes without one, and those whose spec has one, once.

    Args:
        modes: Specs.
        amplitudes: Values of `beta`; none for that of the recipe.

    Returns:
        Specs.

    Example:
        >>> specs_of(["ift", "ep"], [0.05, 0.5])
        ['ift', 'ep:beta=0.05', 'ep:beta=0.5']
    """
    specs: list[str] = []
    for mode in modes:
        nudged = hasattr(get_backward(mode), "stencil") and "beta=" not in mode
        joint = "," if ":" in mode else ":"
        specs += [f"{mode}{joint}beta={beta:g}" for beta in amplitudes] if nudged and amplitudes else [mode]
    return specs
