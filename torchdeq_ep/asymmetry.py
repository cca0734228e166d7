"""The asymmetry of a Jacobian along an error vector, and its gradient: a penalty that exists in backward passes only.

The error vector `v = J v + g` of equilibrium propagation leaves `(J - J^T) v` in the exact equation, and no other
asymmetry touches the gradient. With `u = v / |v|` for each sample, the penalty is half the mean over the samples of
`|a|^2`, `a = (J - J^T) u`. With `u` and `a` held fixed its differential is `<a, dJ u> - <a, dJ^T u>`, so its gradient
is that of `<J^T a, u> - <J^T u, a>`: two products with `J^T`, differentiated once. With a metric `a` is
`M^-1 J M u - J^T u`, and the first product that of `M^-1 a` with `M u`. Eq. (23) of the theory page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.recording import Recording, leaves_of
from torchdeq_ep.state import Packing, Rows

_TINY = 1e-30


@dataclass(frozen=True)
class AsymmetryPenalty:
    """The penalty of one call of a layer, as its autograd node remembers it.

    Args:
        value: `f(z*)`, packed, with its graph.
        state: The tensors that it was recorded at.
        leaves: What the gradient is wanted for: all leaves that the value depends on.
        on_value: Called with the value of the penalty, before any weight and without the half.
    """

    value: Tensor
    state: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    on_value: Callable[[float], None]

    @classmethod
    def of(
        cls, value: Tensor, state: Sequence[Tensor], recording: Recording, on_value: Callable[[float], None]
    ) -> AsymmetryPenalty:
        """The penalty of a recorded value.

        Args:
            value: `f(z*)`, packed, with its graph.
            state: The tensors that it was recorded at.
            recording: Of the state.
            on_value: See the class.

        Returns:
            The penalty.
        """
        return cls(value, tuple(state), leaves_of(value, recording), on_value)

    def gradients(
        self, v: Tensor, through: Tensor, metric: Tensor | None, rows: Rows | None, packing: Packing, weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        """What is added to the gradient of each leaf.

        Args:
            v: The error vector, packed.
            through: `M^-1 J M v`: for equilibrium propagation `v - g`.
            metric: Diagonal of `M`, or `None`.
            rows: Where independent samples lie, each of which has a norm of its own; `None` for one norm.
            packing: Of the state.
            weight: Factor of the penalty, a scalar.

        Returns:
            A tensor or `None` for each leaf.
        """
        count, scale = _scale(v, rows)
        u, pushed = v * scale, through * scale
        with torch.enable_grad():
            pulled = self._adjoint(u, packing)
            a = pushed - pulled.detach()
            left = a if metric is None else a / metric
            right = u if metric is None else metric * u
            bilinear = ((self._adjoint(left, packing) * right).sum() - (pulled * a).sum()) / count
        self.on_value(float(a.float().square().sum()) / count)
        if not bilinear.requires_grad:
            return (None,) * len(self.leaves)
        return torch.autograd.grad(bilinear, self.leaves, weight.to(bilinear), retain_graph=True, allow_unused=True)

    def _adjoint(self, vector: Tensor, packing: Packing) -> Tensor:
        products = torch.autograd.grad(
            self.value, self.state, vector.to(self.value.dtype), create_graph=True, materialize_grads=True
        )
        whole = products[0] if len(products) == 1 and products[0].shape == vector.shape else packing.pack(products)
        return whole.to(vector.dtype)


def _scale(v: Tensor, rows: Rows | None) -> tuple[int, Tensor]:
    """The number of samples, and one over the norm of each, in the layout of the state."""
    if rows is None:
        return 1, 1 / torch.linalg.vector_norm(v.float()).clamp(min=_TINY).to(v.dtype)
    matrix = rows.split(v.unsqueeze(0))
    sizes = torch.linalg.vector_norm(matrix.float(), dim=1, keepdim=True)
    inverse = torch.where(sizes > _TINY, 1 / sizes, 0.0).to(v.dtype)
    return rows.count, rows.join(inverse.expand_as(matrix), v.unsqueeze(0))[0]
