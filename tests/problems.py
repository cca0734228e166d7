"""Fixed-point problems with a known Jacobian, and the dense answers that modes are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.jacobian import dense_jacobian
from torchdeq_ep.modes import Mode, NudgeReport
from torchdeq_ep.state import Equilibrium

SOLVERS = [None, "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]


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


def chain(gain: float, units: int) -> tuple[Equilibrium, Tensor]:
    """Each unit drives the next, so that powers of `J` grow before they vanish; and its exact error vector."""
    jacobian = gain * torch.diag(torch.ones(units - 1, dtype=torch.float64), -1)
    z, g = torch.zeros(1, units, dtype=torch.float64), torch.ones(1, units, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(units, dtype=torch.float64) - jacobian.T, g.T).T
    return Equilibrium(lambda z: torch.sin(z @ jacobian.T), z, z, g, eps=1e-6), exact


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same ones for the same seed."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`|value - reference| / |reference|`."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def report_of(
    mode: Mode, problem: Problem, loss_of_state: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, NudgeReport]:
    """The error vector of a problem, and the report."""
    eps = torch.finfo(problem.z.dtype).eps
    return mode.solve(
        Equilibrium(problem.f, problem.z, problem.f(problem.z), problem.g, eps, loss_of_state=loss_of_state)
    )


class Affine:
    """`d -> A d + c` on a stack of nodes, counting its calls."""

    def __init__(self, gain, n=20, nodes=2, seed=0):
        self.matrix = contraction(n, seed, gain)
        self.offset = torch.randn(nodes, n, dtype=torch.float64)
        self.calls = 0

    def __call__(self, d):
        self.calls += 1
        return d @ self.matrix.T + self.offset

    @property
    def scale(self):
        return float(self.offset.norm(dim=1).min())

    def residual(self, d):
        return float((d @ self.matrix.T + self.offset - d).norm(dim=1).max()) / self.scale


def dense_penalty(jacobian: Tensor, metric: Tensor | None = None) -> Tensor:
    """`|J M - M J^T|^2 / 2`, per entry of the state."""
    product = jacobian if metric is None else jacobian * metric.flatten()
    return (product - product.T).square().sum() / 2 / len(product)


def misaligned(n: int, asymmetry: float, gain: float = 0.8) -> Tensor:
    """`S + A` with |A| / |S + A| = asymmetry."""
    symmetric = contraction(n, 0, 1.0, symmetric=True)
    skew = contraction(n, 1, 1.0)
    skew = skew - skew.T
    ratio = asymmetry / math.sqrt(1 - asymmetry**2)
    matrix = symmetric + ratio * skew * symmetric.norm() / skew.norm()
    return gain * matrix / torch.linalg.matrix_norm(matrix, 2)


# Maps that the rules for complex states can continue.

WEIGHT = contraction(12, 0, 0.5)
DRIVE = normal(2, 12, seed=5)


def _attention(z):
    heads = (z @ WEIGHT.T + DRIVE).reshape(2, 3, 4)
    return 0.5 * functional.scaled_dot_product_attention(heads, 2 * heads, heads).reshape(2, 12) + 0.1 * DRIVE


ANALYTIC_MAPS = {
    "sigmoid": lambda z: torch.sigmoid(2 * (z @ WEIGHT.T) + DRIVE),
    "tanh": lambda z: torch.tanh(functional.linear(z, WEIGHT) + DRIVE),
    "gelu": lambda z: 0.8 * functional.gelu(functional.linear(z, WEIGHT) + DRIVE),
    "gelu-tanh": lambda z: 0.8 * functional.gelu(functional.linear(z, WEIGHT) + DRIVE, approximate="tanh"),
    "softmax": lambda z: 2 * torch.softmax(z @ WEIGHT.T + DRIVE, dim=-1),
    "group-norm": lambda z: 0.6 * torch.tanh(functional.group_norm(z @ WEIGHT.T + DRIVE, 3)),
    "attention": _attention,
}


def analytic_problem(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """A map, its fixed point, a cotangent, and the limit of its nudged equilibria."""
    f = ANALYTIC_MAPS[name]
    z = solve(f, torch.zeros(2, 12, dtype=torch.float64))
    g = torch.randn(2, 12, dtype=torch.float64)
    matrix = torch.eye(24, dtype=torch.float64) - dense_jacobian(f, z)
    return f, z, g, torch.linalg.solve(matrix, g.flatten()).reshape(2, 12)


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
