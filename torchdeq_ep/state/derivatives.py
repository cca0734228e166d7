"""A derivative that may be used, and not be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import DoubleBackwardError

NO_SECOND_DERIVATIVE = (
    "a second derivative was asked of an equilibrium, but its backward pass (a nudged or adjoint solve) defines the "
    "first one only. Drop create_graph=True. Higher derivatives come from torch.func (grad, jvp, hessian), with 'ift' "
    "or 'aep'; of a black box there are none."
)


def first_derivative_only(derivative: Tensor, source: Tensor, message: str = NO_SECOND_DERIVATIVE) -> Tensor:
    """The identity on a derivative; if a graph of it is being built, one whose own derivative is refused.

    Args:
        derivative: What a backward pass returns.
        source: A tensor that it depends on and that may require a gradient.
        message: Of the DoubleBackwardError that a derivative of the result raises.

    Returns:
        The same values.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return derivative
    guarded: Tensor = _FirstDerivativeOnly.apply(derivative, source, message)  # type: ignore[no-untyped-call]
    return guarded


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, derivative: Tensor, source: Tensor, message: str) -> Tensor:
        ctx.message = message
        return derivative.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, None]:
        raise DoubleBackwardError(ctx.message)
