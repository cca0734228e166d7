"""Modes that take a few products with `J^T` and stop: the truncated Neumann series of the exact error vector.

The exact error vector is `v = (I - J^T)^-1 g = sum_i (J^T)^i g`, if the series converges. Its first term alone is the
one-step gradient; `k` terms, plain or damped, lie in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchdeq_ep._options import check_count, check_damping
from torchdeq_ep.errors import NudgeDivergedError
from torchdeq_ep.jacobian import vjp
from torchdeq_ep.modes.base import Mode
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.state import Equilibrium


@dataclass(frozen=True)
class OneStep(Mode):
    """The one-step gradient, `v = g`: that of the last evaluation of the map, as if its argument were a constant.

    It needs no product with the Jacobian. It is a descent direction where `f` contracts and its derivative by the
    parameters is well conditioned (Fung et al. 2022, "JFB", arXiv 2103.12803, Theorem 3.1); recursive reasoning models
    were first trained with it.

    Example:
        >>> import torch
        >>> OneStep()(lambda z: 0.5 * z, torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """

    at_equilibrium: ClassVar[bool] = False

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return equilibrium.cotangent.clone(), NudgeReport(repr(self))


@dataclass(frozen=True)
class Neumann(Mode):
    """`k` terms of the Neumann series: `v = tau sum_(i < k) B^i g` with `B = tau J^T + (1 - tau) I`.

    With `tau = 1` that is `g + J^T g + ... + (J^T)^(k-1) g`, and one term is the one-step gradient. Every damping has
    the same limit, the exact error vector, and damped series converge for more maps: with `tau = 0.5` also where the
    eigenvalues of `J` reach down to -3. This is the phantom gradient in its Neumann form, NPG (Geng et al. 2021,
    arXiv 2111.05177); all products are taken at `z*`.

    Args:
        k: Number of terms, which take `k - 1` products with `J^T`.
        tau: Damping, above 0 and up to 1.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> Neumann(k=3)(lambda z: 0.5 * z, torch.zeros(1), torch.ones(1))
        tensor([1.7500])
    """

    k: int = 5
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_damping(self.tau)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        tau, term = self.tau, equilibrium.cotangent
        total = term.clone()
        product = vjp(equilibrium.f, equilibrium.z) if self.k > 1 else None
        for _ in range(self.k - 1):
            assert product is not None
            pulled = product(term)
            term = pulled if tau == 1.0 else tau * pulled + (1 - tau) * term
            total += term
        if not bool(torch.isfinite(total).all()):
            raise NudgeDivergedError(
                f"the Neumann series overflowed within {self.k} terms: the Jacobian of f has eigenvalues far beyond 1. "
                "Take fewer terms, damp them (tau=0.5), or solve the equation: backward='ift'."
            )
        return tau * total, NudgeReport(repr(self), calls=self.k if self.k > 1 else 0, iterations=self.k - 1)
