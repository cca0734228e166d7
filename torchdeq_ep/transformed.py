"""An equilibrium as a function of all that its map uses: what the transforms of `torch.func` differentiate and batch.

With `z* = f(z*, theta)`, a cotangent `g` goes to `(df/dtheta)^T v`, eq. (2) of the theory page, and a tangent `dtheta`
to the solution of `d = J d + (df/dtheta) dtheta`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.closing import close
from torchdeq_ep.layer import Layer
from torchdeq_ep.linear_solve import Linear, change, for_forward_mode, in_front, linear_solve, of_differentiable
from torchdeq_ep.modes import require_equilibrium
from torchdeq_ep.state import undisturbed


def connect_transformed(layer: Layer, free_state: Tensor, returned: Tensor, is_penalised: bool = False) -> Tensor:
    """The result of a layer under transforms of `torch.func`, with derivatives of every kind by all that `f` uses.

    Args:
        layer: The layer.
        free_state: Packed `z*`.
        returned: The tensor whose values the result has.
        is_penalised: Whether homeostasis along the error vector waits for a backward pass: then there is no gradient.

    Returns:
        A new tensor.

    Raises:
        TransformError: If `f` cannot be evaluated under the transforms, or the mode is not one of the equilibrium.
    """
    require_equilibrium(layer.mode)
    z = free_state.detach()
    with undisturbed():
        value, closed = close(layer.f, z)
    problem = Linear(layer, closed, is_penalised=is_penalised)
    connected: Tensor = _Equilibrium.apply(problem, z, value, returned, *closed.originals)[0]  # type: ignore[no-untyped-call]
    return connected


class _Equilibrium(torch.autograd.Function):
    """`z*` as a function of the leaves, in the values that are returned and in its own."""

    @staticmethod
    def forward(problem: Linear, z: Tensor, value: Tensor, returned: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        return returned.clone(), z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.problem, _, value, _, *leaves = inputs
        ctx.save_for_backward(output[1], value, *leaves)
        ctx.save_for_forward(output[1], value, *leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        z, value, *leaves = ctx.saved_tensors
        v = linear_solve(ctx.problem, cotangents[0] + cotangents[1], z, value, leaves)
        chosen, of_leaves = of_differentiable(leaves, lambda filled: ctx.problem.evaluate(z, filled))
        gradients: list[Tensor | None] = [None] * len(leaves)
        if chosen:
            found = torch.func.vjp(of_leaves, *(leaves[k] for k in chosen))[1](v)
            for k, gradient in zip(chosen, found, strict=True):
                gradients[k] = gradient
        return None, None, None, None, *gradients

    @staticmethod
    @for_forward_mode
    def jvp(problem: Linear, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        z, value, *leaves = saved
        force = change(leaves, tangents[4:], lambda filled: problem.evaluate(z, filled), torch.zeros_like(z))
        d = linear_solve(problem.transposed, force, z, value, leaves)
        return d, d.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], problem: Linear, *tensors: Tensor) -> Any:
        states = [in_front(info, t, dim) for t, dim in zip(tensors[:3], in_dims[1:4], strict=True)]
        stacked = problem.stacked(info.batch_size, in_dims[4:])
        return _Equilibrium.apply(stacked, *states, *tensors[3:]), (0, 0)  # type: ignore[no-untyped-call]
