"""The states of a loop: without derivatives, with those of another, chosen for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.linear_solve import in_front
from torchdeq_ep.state import State, contained, container_of


def detached(state: State) -> State:
    """A state without its graph, and without tangents."""
    if isinstance(state, Tensor):
        return state.detach()
    return in_container(state, [tensor.detach() for tensor in state])


def in_container(like: State, tensors: Sequence[Any]) -> State:
    """Tensors in the container of a state."""
    return contained(container_of(like), list(tensors))


def where(active: Tensor, new: State, old: State) -> State:
    """One state for the samples that are active, another for the rest."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return torch.where(active.reshape(-1, *[1] * (new.dim() - 1)), new, old)
    return in_container(old, [where(active, a, b) for a, b in zip(new, old, strict=True)])


def with_gradient(value: State, end: State) -> State:
    """A state with the derivatives of another."""
    if isinstance(value, Tensor) and isinstance(end, Tensor):
        result: Tensor = _SameValue.apply(value, end)  # type: ignore[no-untyped-call]
        return result
    return in_container(value, [with_gradient(a, b) for a, b in zip(value, end, strict=True)])


class _SameValue(torch.autograd.Function):
    """One tensor, with the derivatives of another."""

    @staticmethod
    def forward(value: Tensor, end: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, cotangent

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], value: Tensor, end: Tensor) -> tuple[Tensor, int]:
        stacks = (in_front(info, tensor, dim) for tensor, dim in zip((value, end), in_dims, strict=True))
        return _SameValue.apply(*stacks), 0  # type: ignore[no-untyped-call]
