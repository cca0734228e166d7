"""Derivatives: a directional one by forward mode, and one that may be used, and not be differentiated again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq_ep.errors import DoubleBackwardError

NO_SECOND_DERIVATIVE = (
    "a second derivative was asked of an equilibrium, but its backward pass (a nudged or adjoint solve) defines the "
    "first one only. Drop create_graph=True. Higher derivatives come from torch.func (grad, jvp, hessian), with 'ift' "
    "or 'aep'; of a black box there are none."
)


def forward_derivative(f: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """The derivative of a map along a direction, by forward mode.

    Args:
        f: A map of one tensor.
        point: Where to differentiate.
        direction: Of the shape of `point`.

    Returns:
        Of the shape of the value. It builds no graph.

    Example:
        >>> forward_derivative(torch.sin, torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """
    _load_forward_mode()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward mode
        derivative: Tensor = torch.func.jvp(f, (point.detach(),), (direction,))[1]
    return derivative


@cache
def _load_forward_mode() -> None:
    """Torch compiles some formulas at the first use of forward mode, and warns about its own way to do so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


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
