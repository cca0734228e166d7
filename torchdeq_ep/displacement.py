"""The displacement map `D_b`, whose fixed point is the error vector as a nudge of amplitude `b` sees it.

With `z_b = f(z_b) + b g` the nudged equilibrium, the displacement `d = (z_b - z*) / b` is the fixed point of

    D_b(d) = (f(z* + b d) - f(z*)) / b + g,        D_0(d) = J d + g.

It has the scale of `g` at every amplitude, and the residual that the free phase left in `z*` cancels. Solving for `d`
instead of `z_b` turns finite, complex and infinitesimal nudges into one equation. These are eqs. (5) and (6) of the
theory page; with a metric eq. (13), with the asymmetric correction eq. (19).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.equilibrium import Equilibrium, norm
from torchdeq_ep.errors import EPError, InvalidOptionError, MapContractError, NotHolomorphicError
from torchdeq_ep.evaluation import Map
from torchdeq_ep.holomorphic.mode import Crossing, Piecewise, holomorphic_map, mode
from torchdeq_ep.jacobian import Product, products
from torchdeq_ep.metric import Metric, fit
from torchdeq_ep.stencils import Node

Force = Callable[[Tensor], Tensor]

_HOLOMORPHIC_ADVICE = (
    "Use a stencil with real nodes ('ep', or 'ep-richardson' for high order), or teach the operation with "
    "torchdeq_ep.holomorphic.register_rule."
)


class DisplacementMap:
    """`d -> D_b(d)`, [eq. (6)][eq-6] of the theory page, for a stack of nodes, all real or all complex.

    Args:
        equilibrium: The free equilibrium.
        nudges: The amplitudes `b_k`, absolute: already multiplied by `|z*| / |g|` if they are to be relative. Several
            are evaluated in one call of `f` by `torch.vmap`.
        force: `M g`, of the shape of the state, added to each displacement.
        correction: A linear term added to `D_b`.
        state_force: `M dL/dz` as a function of one nudged state, which replaces `force` (loss nudging).
        piecewise: What complex nodes make of piecewise analytic operations, see
            [`mode`][torchdeq_ep.holomorphic.mode.mode].
    """

    def __init__(
        self,
        equilibrium: Equilibrium,
        nudges: tuple[Node, ...],
        force: Tensor,
        *,
        correction: Product | None = None,
        state_force: Force | None = None,
        piecewise: Piecewise | None = None,
    ) -> None:
        self._equilibrium = equilibrium
        self._correction = correction
        self._state_force = state_force
        self.is_complex = any(isinstance(nudge, complex) for nudge in nudges)
        self.dtype = force.dtype.to_complex() if self.is_complex else force.dtype
        self._holomorphic = mode(piecewise)
        self._amplitudes: Node | Tensor = nudges[0]
        if len(nudges) > 1:
            stack = torch.tensor(nudges, dtype=self.dtype, device=force.device)
            self._amplitudes = stack.reshape(-1, *(1 for _ in force.shape))
        self._inverse_amplitudes = 1 / self._amplitudes  # a complex division costs ten products
        self._z = equilibrium.z.to(self.dtype)
        # All that does not depend on d, so that an evaluation takes one sum before the call of f and one after it.
        self._constant = -equilibrium.value.to(self.dtype) * self._inverse_amplitudes
        if state_force is None:
            self._constant += force

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """How many units of piecewise analytic operations may have left their piece at complex states."""
        return self._holomorphic.crossings

    def __call__(self, d: Tensor) -> Tensor:
        """`D_b(d)` for a stack `d` of shape `(K, *shape)`, `K` the number of nodes."""
        states = _multiply_add(self._z, self._amplitudes, d)
        value = self._holomorphic_value(states) if self.is_complex else self._evaluate(states)
        response = _multiply_add(self._constant, self._inverse_amplitudes, value.to(self.dtype))
        if self._correction is not None:
            response += torch.stack([self._correction(node) for node in d])
        if self._state_force is not None:
            response += torch.stack([self._state_force(state) for state in states])
        return response

    def _evaluate(self, states: Tensor) -> Tensor:
        states = states.to(self._equilibrium.z.dtype) if not self.is_complex else states
        f = self._equilibrium.f
        if len(states) == 1:
            return f(states[0]).unsqueeze(0)
        stacked: Tensor = torch.vmap(f)(states)
        return stacked

    def _holomorphic_value(self, states: Tensor) -> Tensor:
        with self._holomorphic:
            try:
                value = self._evaluate(states)
            except EPError:
                raise
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise NotHolomorphicError(
                    f"f cannot be evaluated at a complex state: {error}. {_HOLOMORPHIC_ADVICE}"
                ) from error
        if not value.is_complex():
            raise NotHolomorphicError(
                "f returned real values at a complex state: code that PyTorch does not see (NumPy, a compiled "
                f"extension) drops the imaginary part. {_HOLOMORPHIC_ADVICE}"
            )
        return value


def _multiply_add(base: Tensor, factor: Node | Tensor, d: Tensor) -> Tensor:
    """`base + factor d` in one pass."""
    return torch.addcmul(base, factor, d) if isinstance(factor, Tensor) else torch.add(base, d, alpha=factor)


@dataclass(frozen=True)
class AsymmetricCorrection:
    """`d -> M J^T M^-1 d - J d`: makes the limit of every nudge the exact adjoint, whatever `J`.

    See [eq. (19)][eq-19] of the theory page. Without a metric it is the term of Scurria et al. 2026 (arXiv 2602.03670).
    A complex displacement is corrected in its real and imaginary parts, the term being linear.

    Args:
        limit: `d -> M J^T M^-1 d`, which is all of the map that is left as the nudge vanishes.
        forward: `d -> J d`.
    """

    limit: Product
    forward: Product

    @classmethod
    def at(cls, equilibrium: Equilibrium, metric: Tensor | None) -> AsymmetricCorrection:
        """The correction at an equilibrium."""
        forward, adjoint = products(equilibrium.f, equilibrium.z)
        return cls(scaled_adjoint(adjoint, metric), forward)

    def __call__(self, d: Tensor) -> Tensor:
        """The term for one displacement."""
        if d.is_complex():
            return torch.complex(self(d.real), self(d.imag))
        return self.limit(d) - self.forward(d)


def scaled_adjoint(adjoint: Product, metric: Tensor | None) -> Product:
    """`d -> M J^T M^-1 d`.

    Args:
        adjoint: `v -> J^T v`.
        metric: Diagonal of `M`, or `None` for the identity.

    Returns:
        The map of one displacement.
    """
    return adjoint if metric is None else lambda d: metric * adjoint(d / metric)


def diagonal_metric(metric: Metric | None, f: Map, z: Tensor) -> tuple[Tensor | None, int]:
    """The diagonal of `M` at `z*`, checked.

    Args:
        metric: A function from the state to a positive tensor of the same shape; `"auto"`, which fits one to the
            Jacobian of `f`; or `None`.
        f: The map, on packed states.
        z: The packed free state.

    Returns:
        The diagonal, or `None` for the identity; and the calls of `f` and products with its Jacobian that it took.

    Raises:
        InvalidOptionError: If the metric is not positive and finite, or has another shape.
    """
    if metric is None:
        return None, 0
    diagonal, calls = fit(f, z) if isinstance(metric, str) else (metric(z), 0)
    if not isinstance(diagonal, Tensor) or diagonal.shape != z.shape:
        got = tuple(diagonal.shape) if isinstance(diagonal, Tensor) else type(diagonal).__name__
        raise InvalidOptionError(f"metric(z*) must be a tensor of the state's shape {tuple(z.shape)}, not {got}.")
    if not bool(torch.isfinite(diagonal).all()) or not bool((diagonal > 0).all()):
        raise InvalidOptionError(
            "metric(z*) must be positive and finite everywhere: it is the diagonal of M in v = M^-1 (I - J)^-1 M g. "
            "Clamp it away from zero, e.g. metric=lambda z: phi_prime(z).clamp_min(1e-3)."
        )
    return diagonal.detach(), calls


def loss_force(
    equilibrium: Equilibrium, metric: Tensor | None, piecewise: Piecewise | None = None
) -> tuple[Force, float]:
    """The force of loss nudging, `z -> M dL/dz`, in the scale of the cotangent: [eq. (7)][eq-7] of the theory page.

    The user's loss may differ from the one that was differentiated by a factor (gradient accumulation, a GradScaler, a
    mean instead of a sum); the factor is found from the two gradients at the free state. At a complex state
    PyTorch returns the conjugate of the holomorphic derivative.

    Args:
        equilibrium: The free equilibrium; its `loss_of_state` is not `None`.
        metric: Diagonal of `M`, or `None` for the identity.
        piecewise: As for [`DisplacementMap`][torchdeq_ep.displacement.DisplacementMap].

    Returns:
        The force, and how far the two gradients are from parallel: `|g - factor dL/dz| / |g|`.
    """
    loss = equilibrium.loss_of_state
    if loss is None:
        raise InvalidOptionError("loss nudging needs a loss_of_state: use tep.nudge_loss(module, loss_of_state).")

    continued_loss = holomorphic_map(loss, piecewise)

    def gradient(z: Tensor) -> Tensor:
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            value = continued_loss(point)
            if value.dim() != 0:
                raise MapContractError(
                    f"loss_of_state must return a scalar, but returned shape {tuple(value.shape)}: reduce it as the "
                    "training loss is reduced, with .sum() or .mean()."
                )
            (result,) = torch.autograd.grad(value, point, torch.ones_like(value), materialize_grads=True)
        return result.conj() if result.is_complex() else result

    cotangent = equilibrium.cotangent
    at_rest = gradient(equilibrium.z)
    square = norm(at_rest) ** 2
    factor = float((at_rest * cotangent).sum()) / square if square > 0 else 0.0
    mismatch = norm(cotangent - factor * at_rest) / norm(cotangent)

    def force(z: Tensor) -> Tensor:
        return factor * (gradient(z) if metric is None else metric * gradient(z))

    return force, mismatch
