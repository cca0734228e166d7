"""The asymmetry of a Jacobian along an error vector, and its gradient: a penalty that exists in backward passes only.

The error vector `v = J v + g` of equilibrium propagation leaves `(J - J^T) v` in the exact equation, and no other
asymmetry touches the gradient. With `u = v / |v|` for each sample, the penalty is half the mean over the samples of
`|a|^2`, `a = (J - J^T) u`. With `u` and `a` held fixed its differential is `<a, dJ u> - <a, dJ^T u>`, so its gradient
is that of `<J^T a, u> - <J^T u, a>`: two products with `J^T`, differentiated once. With a metric `a` is
`M^-1 J M u - J^T u`, and the first product that of `M^-1 a` with `M u`. Eq. (23) of the theory page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.jacobian.symmetry import linearize
from torchdeq_ep.state import Autocast, Equilibrium, FrozenStatistics, Rows, norm, row_norms

_TINY = 1e-30


@dataclass(frozen=True)
class AsymmetryPenalty:
    """The penalty of one call of a layer, as its autograd node remembers it.

    Args:
        leaves: What the gradient is wanted for: all leaves that the value of the map depends on.
        on_value: Called with the value of the penalty, before any weight and without the half.
    """

    leaves: tuple[Tensor, ...]
    on_value: Callable[[float], None]

    def gradients(
        self, equilibrium: Equilibrium, v: Tensor, autocast: Autocast, weight: Tensor
    ) -> tuple[Tensor | None, ...]:
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
        rows, metric = equilibrium.independent_rows(), equilibrium.used.metric
        m = torch.ones((), dtype=v.dtype, device=v.device) if metric is None else metric.to(v.dtype)
        with FrozenStatistics():
            local = linearize(equilibrium.f, equilibrium.z, autocast, batched=False)
        if equilibrium.used.assumed_symmetry:  # v = M^-1 J M v + g: the product is known
            through = v - equilibrium.cotangent
        else:
            through = local.forward((m * v).unsqueeze(0))[0] / m
        count, scale = _scale(v, rows)
        u, pushed = v * scale, through * scale
        is_weighed = float(weight) != 0.0
        with torch.enable_grad(), autocast.restored(False):
            pulled = local.adjoint(u.unsqueeze(0), create_graph=is_weighed)[0]
            a = pushed - pulled.detach()
            self.on_value(float(a.float().square().sum()) / count)
            if not is_weighed:
                return (None,) * len(self.leaves)
            left = local.adjoint((a / m).unsqueeze(0), create_graph=True)[0]
            bilinear = ((left * (m * u)).sum() - (pulled * a).sum()) / count
        if not bilinear.requires_grad:
            return (None,) * len(self.leaves)
        return torch.autograd.grad(bilinear, self.leaves, weight.to(bilinear), retain_graph=True, allow_unused=True)


def _scale(v: Tensor, rows: Rows | None) -> tuple[int, Tensor]:
    """The number of samples, and one over the norm of each, in the layout of the state."""
    if rows is None:
        return 1, torch.full((), 1 / max(norm(v), _TINY), dtype=v.dtype, device=v.device)
    matrix = rows.split(v.unsqueeze(0))
    sizes = row_norms(matrix).unsqueeze(1)
    inverse = torch.where(sizes > _TINY, 1 / sizes, 0.0).to(v.dtype)
    return rows.count, rows.join(inverse.expand_as(matrix), v.unsqueeze(0))[0]
