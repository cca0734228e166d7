"""The metric that makes a splitting step symmetric: the proximal map, or gradient step, of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.jacobian import OperatorMetric

_STEPS = 200


def proximal_metric(iterator: Any, parameters: Any, physics: Any) -> OperatorMetric:
    """The operator `S` of the data in a splitting step with `|A x - y|^2 / 2`, or its inverse, as a metric.

    A step is `f(x) = D(S x + c)`, or `S D(x) + c` with `g_first`; `D` is the step of the prior. For half-quadratic
    splitting, and for proximal gradient descent with `g_first`, `S = (I + gamma A^T A)^-1`, a proximal map. Otherwise,
    for proximal gradient descent, `S = I - gamma A^T A`, which is positive for small steps. If `D` is the proximal map
    or the gradient step of a potential, its Jacobian is symmetric, and so is `J M` with `M = S^-1`, or `M = S` with
    `g_first`.

    Args:
        iterator: A deepinv iterator: `HQSIteration` or `PGDIteration`.
        parameters: Of the step; `stepsize` is used.
        physics: A linear physics of deepinv.

    Returns:
        The metric.

    Raises:
        InvalidOptionError: If the iterator is another one, or the physics is not linear.
    """
    from deepinv.optim.optim_iterators import HQSIteration, PGDIteration

    if not isinstance(iterator, (HQSIteration, PGDIteration)) or not hasattr(physics, "A_adjoint"):
        raise InvalidOptionError(
            "metric='proximal' is that of half-quadratic splitting (HQS) or proximal gradient descent (PGD) with a "
            f"linear physics, and this is {type(iterator).__name__} with {type(physics).__name__}."
        )
    gamma = parameters["stepsize"]
    gamma = float(gamma) if not isinstance(gamma, Tensor) else gamma.detach()

    def normal(v: Tensor) -> Tensor:
        pulled: Tensor = physics.A_adjoint(physics.A(v))
        return gamma * pulled

    is_proximal = isinstance(iterator, HQSIteration) or iterator.g_first

    def easy(v: Tensor) -> Tensor:
        return v + normal(v) if is_proximal else v - normal(v)

    def hard(v: Tensor) -> Tensor:
        return _conjugate_gradients(easy, v)

    step, inverse = (hard, easy) if is_proximal else (easy, hard)
    return OperatorMetric(step, inverse) if iterator.g_first else OperatorMetric(inverse, step)


def _conjugate_gradients(operator: Any, right: Tensor) -> Tensor:
    """Solve `operator(x) = right` for a symmetric positive operator, to rounding."""
    x, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), residual.square().sum()
    target = size * (10 * torch.finfo(right.dtype).eps) ** 2
    for _ in range(_STEPS):
        if not bool(size > target):
            break
        image = operator(direction)
        step = size / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum()
        direction = residual + (size / before) * direction
    return x
