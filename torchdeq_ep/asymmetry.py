"""The asymmetry of a Jacobian along an error vector, and its gradient: a penalty that exists in backward passes only.

The error vector `v = J v + g` of equilibrium propagation leaves `(J - J^T) v` in the exact equation, and no other
asymmetry touches the gradient. With `u = v / |v|` for each sample, the penalty is half the mean over the samples of
`|a|^2`, `a = (J - J^T) u`. With `u` and `a` held fixed its differential is `<a, dJ u> - <a, dJ^T u>`, so its gradient
is that of `<J^T a, u> - <J^T u, a>`: two products with `J^T`, differentiated once. With a metric `a` is
`M^-1 J M u - J^T u`, and the first product that of `M^-1 a` with `M u`. Eq. (23) of the theory page.

An error vector that is amplified lies along the slow directions of `J`, so `|J^T u|` tells where the spectral radius
nears 1, and beyond. The guard is half the mean over the samples of the square of what `|J^T u|` has above 0.95; its
gradient comes with the same products, eq. (24).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.jacobian.metric import as_operator
from torchdeq_ep.jacobian.symmetry import linearize
from torchdeq_ep.modes.judgement import NEAR_ONE
from torchdeq_ep.state import Autocast, Equilibrium, FrozenStatistics, Rows, norm, row_norms, split_rows

Gradients = tuple[Tensor | None, ...]
Keep = Callable[[Sequence[Tensor], Gradients, float], None]

_TINY = 1e-30
_MOST = 0.9


@dataclass(frozen=True)
class AsymmetryPenalty:
    """The penalty of one call of a layer, as its autograd node remembers it.

    Args:
        leaves: What the gradient is wanted for, of the leaves that the value of the map depends on.
        on_value: Called with the value of the penalty, before any weight and without the half, and with `|J^T u|` where
            nine of ten samples have less.
        guard: Weight of the guard, relative to that of the asymmetry.
        keep: Takes the leaves, the gradients of a penalty of weight 1, and its value, if they are not to be added to
            the gradient of the loss.
    """

    leaves: tuple[Tensor, ...]
    on_value: Callable[[float, float], None]
    guard: float = 0.0
    keep: Keep | None = None

    def gradients(self, equilibrium: Equilibrium, v: Tensor, autocast: Autocast, weight: Tensor) -> Gradients:
        """What is added to the gradient of each leaf; `f` is evaluated once.

        Args:
            equilibrium: The free equilibrium, and what was used for it.
            v: The error vector, packed.
            autocast: The autocast state of the forward pass.
            weight: Factor of the penalty, a scalar.

        Returns:
            A tensor or `None` for each leaf.

        Raises:
            JacobianProductError: If an operation in `f` cannot be differentiated twice.
        """
        rows, metric = equilibrium.independent_rows(), as_operator(equilibrium.used.metric)
        with FrozenStatistics():
            local = linearize(equilibrium.f, equilibrium.z, autocast, batched=False)
        if equilibrium.used.assumed_symmetry:  # v = M^-1 J M v + g: the product is known
            through = v - equilibrium.cotangent
        else:
            through = metric.inverse(local.forward(metric.apply(v).unsqueeze(0))[0])
        samples = _Samples(rows, v)
        scale = samples.spread(_inverse(samples.norms(v)))
        u, pushed = v * scale, through * scale
        is_weighed = self.keep is not None or float(weight) != 0.0
        with torch.enable_grad(), autocast.restored(False):
            pulled = local.adjoint(u.unsqueeze(0), create_graph=is_weighed)[0]
            a, rates = pushed - pulled.detach(), samples.norms(pulled.detach())
            size = norm(a)
            value = size * size / samples.count
            self.on_value(value, float(rates.quantile(_MOST)))
            if not is_weighed:
                return (None,) * len(self.leaves)
            left = local.adjoint(metric.inverse(a).unsqueeze(0), create_graph=True)[0]
            excess = (rates - NEAR_ONE).clamp(min=0)
            away = self.guard * samples.spread(excess * _inverse(rates)) * pulled.detach()
            bilinear = ((left * metric.apply(u)).sum() - (pulled * (a - away)).sum()) / samples.count
        if not bilinear.requires_grad:
            return (None,) * len(self.leaves)
        weight = torch.ones_like(bilinear) if self.keep is not None else weight.to(bilinear)
        found = torch.autograd.grad(bilinear, self.leaves, weight, retain_graph=True, allow_unused=True)
        if self.keep is None:
            return found
        self.keep(self.leaves, found, (value + self.guard * float(excess.square().sum()) / samples.count) / 2)
        return (None,) * len(self.leaves)


@dataclass(frozen=True)
class _Samples:
    """The samples of a state, or all of it as one where they are coupled."""

    rows: Rows | None
    like: Tensor

    @property
    def count(self) -> int:
        return 1 if self.rows is None else self.rows.count

    def norms(self, state: Tensor) -> Tensor:
        """The norm of each sample."""
        return row_norms(split_rows(state.unsqueeze(0), self.rows))

    def spread(self, numbers: Tensor) -> Tensor:
        """A number for each sample, in the layout of the state."""
        numbers = numbers.to(self.like.dtype)
        if self.rows is None:
            return numbers.reshape(())
        matrix = numbers.unsqueeze(1).expand(-1, self.like.numel() // self.count)
        return self.rows.join(matrix, self.like.unsqueeze(0))[0]


def _inverse(sizes: Tensor) -> Tensor:
    return torch.where(sizes > _TINY, 1 / sizes, 0.0)
