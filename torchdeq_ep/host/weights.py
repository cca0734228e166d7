"""The weight of a penalty, in every form that it may have, and the factor of its injected gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torchdeq.core import DEQBase

from torchdeq_ep.errors import InvalidOptionError, NoDEQError, unknown_name

Schedule = Callable[[int], float | None]
Weight = float | Schedule | Literal["auto"] | Mapping[str, float | Schedule]
Inject = bool | float | Callable[[], float] | torch.amp.GradScaler


def weights_by_name(weight: Weight, deqs: dict[str, DEQBase]) -> dict[str, tuple[DEQBase, float | Schedule]]:
    """The DEQs that a weight names, with their weights.

    Raises:
        NoDEQError: If it names one that is not there.
        InvalidOptionError: If a weight is none.
    """
    if not isinstance(weight, Mapping):
        check_weight(weight)
        return {name: (deq, cast("float | Schedule", weight)) for name, deq in deqs.items()}
    for name, value in weight.items():
        if name not in deqs:
            raise NoDEQError(f"weight: {unknown_name('DEQ', name, deqs)}")
        check_weight(value)
    return {name: (deqs[name], value) for name, value in weight.items()}


def check_weight(weight: object) -> None:
    """Refuse what is no weight."""
    if callable(weight):
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise InvalidOptionError(
            "the weight of homeostasis must be 'auto', which finds it for all DEQs, or a number of at least 0, a "
            f"function of the step, or a dict of these, not {weight!r}."
        )


def weight_at(weight: float | Schedule, step: int, largest: float = math.inf) -> float | None:
    """The weight of a forward pass.

    Args:
        weight: A number, or a function of the step.
        step: The number of earlier forward passes.
        largest: What it may be at most: 1 for the share of a descent.

    Returns:
        A number; `None` if the pass is to be left out.

    Raises:
        InvalidOptionError: If it is no weight.
    """
    value = weight(step) if callable(weight) else weight
    if value is None:
        return None
    check_weight(value)
    if value > largest:
        raise InvalidOptionError(
            f"with descent= the weight is the share of a step to the minimum, at most {largest:g}, not {value!r}."
        )
    return value


def factor_of(inject: Inject) -> Callable[[], float] | None:
    """What an injected gradient is multiplied by; `None` if it is not injected."""
    if isinstance(inject, bool):
        return (lambda: 1.0) if inject else None
    if isinstance(inject, (int, float)):
        factor = float(inject)
        return lambda: factor
    if isinstance(inject, torch.amp.GradScaler):
        return inject.get_scale
    if callable(inject):
        return inject
    raise InvalidOptionError(
        f"inject must be True or False, a factor, a function that returns one, or a GradScaler, not {inject!r}."
    )
