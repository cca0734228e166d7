"""A penalty that reaches the parameters by itself, in each backward pass that comes through a state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torchdeq_ep.closing import is_transforming
from torchdeq_ep.errors import EPWarning, TransformError
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


def outside_checkpoints() -> AbstractContextManager[object]:
    """A context whose graph keeps its own tensors: a checkpoint makes a state anew, and not its penalty."""
    return saved_tensors_hooks(_itself, _itself) if _is_in_checkpoint() else nullcontext()


def is_made_anew() -> bool:
    """Whether a forward pass is made once more in a backward pass, for what its first graph did not keep."""
    return _is_in_backward() and _is_in_checkpoint()


def is_too_late(name: str, weight: float) -> bool:
    """Whether the loss that a penalty would be added to is being differentiated already.

    Args:
        name: What the DEQ is called in the warning.
        weight: Of the penalty; without one there is nothing to warn of.
    """
    if not (_is_in_backward() and torch.is_grad_enabled()):
        return False
    if weight == 0:
        return True
    warnings.warn(
        f"homeostasis leaves {name or 'the DEQ'} as it is: its forward pass with a graph comes in the backward pass of "
        "the loss, and a penalty is part of a loss. Likely torch.utils.checkpoint with use_reentrant=True is around "
        "the model: say use_reentrant=False there, or register_homeostasis(..., inject=True).",
        EPWarning,
        stacklevel=2,
    )
    return True


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_in_checkpoint() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.7 does not tell
    hooks = None if top is None else top(False)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


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
