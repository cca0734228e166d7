"""A model, a batch and a loss by the name of the function that makes them, as the command line is given it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from torchdeq_ep.errors import EPError, InvalidOptionError

Problem = tuple[nn.Module, Any, Callable[..., Any]]


def load_problem(spelling: str) -> Problem:
    """The model, batch and loss that a factory returns.

    Args:
        spelling: `"package.module:factory"`.

    Returns:
        What the factory returns, checked.

    Raises:
        InvalidOptionError: If it cannot be imported or called, or does not return a model, a batch and a loss function.

    Example:
        >>> load_problem("torchdeq_ep.measuring.digits:nothing")
        Traceback (most recent call last):
        torchdeq_ep.errors.InvalidOptionError: module 'torchdeq_ep.measuring.digits' has no attribute 'nothing'.
        More: torchdeq-ep errors InvalidOptionError
    """
    module_name, colon, name = spelling.partition(":")
    if not colon or not module_name or not name:
        raise InvalidOptionError(f"cannot read {spelling!r}: a factory is written package.module:factory.")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise InvalidOptionError(f"cannot import {module_name!r}: {_told(error)}") from error
    factory = getattr(module, name, None)
    if factory is None:
        raise InvalidOptionError(f"module {module_name!r} has no attribute {name!r}.")
    if not callable(factory):
        raise InvalidOptionError(f"{spelling} is {type(factory).__name__}, not a function that can be called.")
    try:
        problem = factory()
    except EPError:
        raise
    except Exception as error:
        raise InvalidOptionError(f"{spelling} failed: {_told(error)}") from error
    if not isinstance(problem, tuple) or len(problem) != 3:
        length = f" of {len(problem)}" if isinstance(problem, tuple) else ""
        raise InvalidOptionError(
            f"{spelling} must return a tuple (model, batch, loss_fn), not {type(problem).__name__}{length}."
        )
    model, batch, loss_fn = problem
    if not isinstance(model, nn.Module):
        raise InvalidOptionError(f"the model that {spelling} returns must be an nn.Module, not {type(model).__name__}.")
    if not callable(loss_fn):
        raise InvalidOptionError(f"the loss_fn that {spelling} returns cannot be called: {type(loss_fn).__name__}.")
    return model, batch, loss_fn


def _told(error: Exception) -> str:
    """What went wrong in the user's code, and where: they get no traceback."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if where.filename.startswith("<frozen") else f" ({where.filename}, line {where.lineno})"
    return f"{type(error).__name__}: {error}{place}"
