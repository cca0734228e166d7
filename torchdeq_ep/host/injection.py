"""A penalty that reaches the parameters by itself, in each backward pass that comes through a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.closing import is_transforming
from torchdeq_ep.errors import TransformError
from torchdeq_ep.state import contained, container_of


class Nothing:
    """What is left of a regulator in a copy of its DEQ, whose penalty nobody could ask for."""

    def __call__(self, *_: Any) -> None:
        return None


_WITHOUT: ContextVar[bool] = ContextVar("without_homeostasis", default=False)


@contextmanager
def without_homeostasis() -> Iterator[None]:
    """A context whose forward passes are only looked at: no penalty is measured in them, and none left behind."""
    before = _WITHOUT.set(True)
    try:
        yield
    finally:
        _WITHOUT.reset(before)


def is_without_homeostasis() -> bool:
    """Whether a forward pass is only looked at."""
    return _WITHOUT.get()


def refuse_transforms() -> None:
    """Raise TransformError inside a transform of `torch.func`, which would differentiate a penalty with the loss."""
    if is_transforming():
        raise TransformError(
            "homeostasis is a term of a training loss that its hook adds, and a transform of torch.func would "
            "differentiate that too. Remove the homeostasis first: handle.remove()."
        )


def with_gradient(state: Any, term: Tensor, factor: Callable[[], float]) -> Any:
    """A state whose backward pass also starts one from a penalty.

    Args:
        state: A tensor, or a list or tuple of them.
        term: The penalty, weighted.
        factor: What its gradient is multiplied by; asked in the backward pass.

    Returns:
        The same values.
    """
    tensors = [state] if isinstance(state, Tensor) else state
    return contained(container_of(state), _Inject.apply(term, factor, *tensors))  # type: ignore[no-untyped-call]


class _Inject(torch.autograd.Function):
    """The identity on a state, whose backward pass also starts one from a penalty.

    One node for all tensors of the state, so that the penalty's gradient is added once, whichever of them are used.
    """

    @staticmethod
    def forward(ctx: Any, term: Tensor, factor: Callable[[], float], *state: Tensor) -> tuple[Tensor, ...]:
        ctx.factor = factor
        ctx.like = term.detach()
        ctx.set_materialize_grads(False)
        # A view of several tensors could not be written to by its user.
        return tuple(tensor.clone() for tensor in state)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return torch.full_like(ctx.like, ctx.factor()), None, *cotangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tangents[2:]
