"""Fixed-point problems with a known Jacobian, and the dense answers that modes are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """`f`, its fixed point, a cotangent, and the Jacobian of each sample."""

    f: Callable[[Tensor], Tensor]
    z: Tensor
    g: Tensor
    jacobians: Tensor

    def dense(self, metric: Tensor | None = None, transpose: bool = False) -> Tensor:
        """`M^-1 (I - J)^-1 M g`, or `(I - J^T)^-1 g`, sample by sample in float64."""
        n = self.jacobians.shape[-1]
        rows = []
        flat_g = self.g.reshape(-1, n).double()
        flat_m = torch.ones_like(flat_g) if metric is None else metric.reshape(-1, n).double()
        for jacobian, g, m in zip(self.jacobians.double(), flat_g, flat_m, strict=True):
            matrix = torch.eye(n, dtype=torch.float64) - (jacobian.T if transpose else jacobian)
            rows.append(torch.linalg.solve(matrix, m * g) / m)
        return torch.stack(rows).reshape(self.g.shape)


def contraction(n: int, seed: int, gain: float = 0.6, symmetric: bool = False) -> Tensor:
    """A random matrix of spectral norm `gain`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if symmetric:
        matrix = matrix + matrix.T
    return gain * matrix / torch.linalg.matrix_norm(matrix, 2)


def solve(f: Callable[[Tensor], Tensor], z: Tensor, steps: int = 400) -> Tensor:
    """Plain iteration, long enough for every problem here."""
    with torch.no_grad():
        for _ in range(steps):
            z = f(z)
    return z


def tanh_problem(
    n: int = 8,
    batch: tuple[int, ...] = (3,),
    seed: int = 0,
    *,
    gain: float = 0.6,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """`f(z) = tanh(W z + x)`, which also takes complex states; `J = diag(1 - z^2) W`."""
    weight = contraction(n, seed, gain, symmetric)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(*batch, n, generator=generator, dtype=torch.float64)
    g = torch.randn(*batch, n, generator=generator, dtype=torch.float64)
    low, low_x = weight.to(dtype), x.to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ low.T.to(z.dtype) + low_x)

    z = solve(lambda z: torch.tanh(z @ weight.T + x), torch.zeros(*batch, n, dtype=torch.float64))
    slope = 1 - z.reshape(-1, n) ** 2
    return Problem(f, z.to(dtype), g.to(dtype), slope[:, :, None] * weight)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`|value - reference| / |reference|`."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


class AwkwardTanh(torch.autograd.Function):
    """tanh without a forward-mode formula, whose backward looks at data, which vmap cannot do."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        assert torch.isfinite(gradient).all()
        return gradient * (1 - y**2)


class PlainSine(torch.autograd.Function):
    """An operation with a backward, itself differentiable, and neither vmap nor forward mode."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        return gradient * z.cos()


class OnceDifferentiableSine(PlainSine):
    """torch leaves it out of a second derivative without a word."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        return gradient * z.cos()
