"""Code that `torch.compile` leaves as it is: solves, which decide by what they measure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_REASON = (
    "TransformError of torchdeq_ep: an equilibrium cannot be part of one graph, because its solves decide by what they "
    "measure. Compile without fullgraph=True, or compile the map f alone."
)


def not_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that is a break in every graph that `torch.compile` makes, and a named error with `fullgraph=True`.

    `torch.compiler.disable` does that, but it loads the compiler, which takes seconds: so it is asked only where
    something is being compiled.

    Args:
        function: To be run as it is, with all that it calls.

    Returns:
        The same function.

    Example:
        >>> not_compiled(abs)(-1)
        1
    """

    @functools.wraps(function)
    def eager(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_REASON)
            return _disabled(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return eager


def _disabled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    disabled: Callable[Arguments, Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled
