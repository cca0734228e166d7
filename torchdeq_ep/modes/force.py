"""What nudges a state: the cotangent, or the loss re-evaluated where the state has gone; with a metric, times `M`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError, LossMismatchWarning, MapContractError, NonFiniteError
from torchdeq_ep.holomorphic import Piecewise, holomorphic_map
from torchdeq_ep.jacobian import Metric
from torchdeq_ep.jacobian.metric import diagonal_metric
from torchdeq_ep.modes.base import Correction
from torchdeq_ep.modes.nudged_map import AsymmetricCorrection, Force, UnitsForce
from torchdeq_ep.nn.losses import ReadoutLoss
from torchdeq_ep.state import Equilibrium, norm

_LOSS_MISMATCH = 1e-2


@dataclass(frozen=True)
class NudgedProblem:
    """What the nudged phases of one backward pass share.

    Args:
        equilibrium: The free equilibrium.
        metric: Diagonal of `M`, or `None` for the identity.
        metric_calls: What it cost.
        force: `M g`, in single precision at least.
        force_size: Its norm.
        correction: The term that makes the limit exact, or `None`.
        state_force: The force as a function of the nudged state, for loss nudging.
        unit: `|z*| / |M g|`, the absolute amplitude of a relative one of 1.
    """

    equilibrium: Equilibrium
    metric: Tensor | None
    metric_calls: int
    force: Tensor
    force_size: float
    correction: AsymmetricCorrection | None
    state_force: Callable[[Tensor], Tensor] | None
    unit: float

    @property
    def calls_of_a_step(self) -> int:
        """Calls of `f`, and products with its Jacobian, that one evaluation of the nudged map takes."""
        return 1 if self.correction is None else 3

    @classmethod
    def pose(
        cls,
        equilibrium: Equilibrium,
        metric: Metric | None,
        correction: Correction | None,
        piecewise: Piecewise | None,
    ) -> NudgedProblem:
        """The problem at an equilibrium.

        Args:
            equilibrium: The free equilibrium.
            metric: As for [`EquilibriumPropagation`][torchdeq_ep.EquilibriumPropagation].
            correction: Likewise.
            piecewise: Likewise.

        Returns:
            The problem.

        Raises:
            NonFiniteError: If the force is not finite.
        """
        diagonal, metric_calls = diagonal_metric(metric, equilibrium.f, equilibrium.z)
        wide = torch.promote_types(equilibrium.z.dtype, torch.float32)
        force = (equilibrium.cotangent if diagonal is None else diagonal * equilibrium.cotangent).to(wide)
        state_force = None
        if equilibrium.loss_of_state is not None:
            state_force, mismatch = loss_force(equilibrium, metric, diagonal, piecewise)
            if mismatch > _LOSS_MISMATCH:
                equilibrium.memory.warn(
                    LossMismatchWarning,
                    "loss",
                    "the loss given to nudge_loss has another gradient at the equilibrium than the one that reached "
                    f"the layer (they differ by {mismatch:.0%} beyond a factor), so the layer is nudged by another "
                    "loss than the one being minimised",
                    lambda: "Include every term of the training loss, read-out included.",
                    mismatch,
                )
        term = AsymmetricCorrection.at(equilibrium, diagonal) if correction else None
        # A fixed point at zero has no scale of its own: one per entry then stands for it.
        state_size = equilibrium.size or equilibrium.z.numel() ** 0.5
        force_size = equilibrium.cotangent_size if diagonal is None else norm(force)
        if not math.isfinite(force_size):
            raise NonFiniteError(
                f"the cotangent times the metric is not finite in {force.dtype}: the metric is up to "
                f"{float(cast(Tensor, diagonal).max()):.1e} at z*. Bound it; if it is one over a slope, keep the slope "
                "away from zero."
            )
        return cls(equilibrium, diagonal, metric_calls, force, force_size, term, state_force, state_size / force_size)


def loss_force(
    equilibrium: Equilibrium,
    metric: Metric | None,
    diagonal: Tensor | None,
    piecewise: Piecewise | None = None,
) -> tuple[Force, float]:
    """The force of loss nudging, `z -> M(z) dL/dz`, in the scale of the cotangent: [eq. (7)][eq-7] of the theory page.

    The metric is that of the nudged state, as in arXiv 2309.02214, where potentials are nudged by `dL/dphi`: with that
    of the free state, a unit that was saturated there and no longer is would be pulled by many times that.

    The layer returned `f(z*)`, and took its cotangent there: so a state is moved by `f(z*) - z*`, which a free phase
    that stopped early has left, before the loss is asked. The user's loss may differ from the one that was
    differentiated by a factor (gradient accumulation, a GradScaler, a mean instead of a sum); the factor is found from
    the two gradients at the state that the layer returned. At a complex state PyTorch returns the conjugate of the
    holomorphic derivative. A [`ReadoutLoss`][torchdeq_ep.nn.ReadoutLoss] is asked for its own gradient instead, and for
    nothing where the loss does not depend on the state.

    Args:
        equilibrium: The free equilibrium; its `loss_of_state` is not `None`.
        metric: As for [`diagonal_metric`][torchdeq_ep.jacobian.diagonal_metric].
        diagonal: What that returned. It stands for `"auto"` at every state.
        piecewise: As for [`NudgedMap`][torchdeq_ep.modes.NudgedMap].

    Returns:
        The force, and how far the two gradients are from parallel: `|g - factor dL/dz| / |g|`.

    Raises:
        InvalidOptionError: If the equilibrium has no `loss_of_state`.
        MapContractError: If the loss is not a scalar.

    Example:
        >>> z = torch.tensor([1.0, 2.0])
        >>> free = Equilibrium(lambda z: z, z, z, 2 * z, 1e-7, loss_of_state=lambda z: z.square().sum() / 2)
        >>> force, mismatch = loss_force(free, None, None)
        >>> force(torch.ones(2)), mismatch
        (tensor([2., 2.]), 0.0)
    """
    loss = equilibrium.loss_of_state
    if loss is None:
        raise InvalidOptionError("loss nudging needs a loss_of_state: use tep.nudge_loss(module, loss_of_state).")
    if isinstance(loss, ReadoutLoss):
        return _units_force(equilibrium, loss, metric, diagonal)

    continued_loss = holomorphic_map(loss, piecewise)
    # Where a metric is cut off, the bound holds at complex states too.
    continued_metric = holomorphic_map(metric, "real-part") if callable(metric) else None

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

    factor, mismatch = _compared(equilibrium.cotangent, gradient(equilibrium.value))
    ahead = equilibrium.value - equilibrium.z

    def force(z: Tensor) -> Tensor:
        scale = diagonal if continued_metric is None else continued_metric(z)
        slope = gradient(z + ahead)
        return factor * (slope if scale is None else scale * slope)

    return force, mismatch


def _units_force(
    equilibrium: Equilibrium, loss: ReadoutLoss, metric: Metric | None, diagonal: Tensor | None
) -> tuple[UnitsForce, float]:
    """The same for a loss that knows its gradient, on the units that it depends on."""
    units = loss.units
    own = torch.zeros_like(equilibrium.value)
    own[..., units] = loss.gradient(equilibrium.value[..., units]).to(own.dtype)
    factor, mismatch = _compared(equilibrium.cotangent, own)
    ahead = (equilibrium.value - equilibrium.z)[..., units]
    scale = _metric_of_units(metric, diagonal, units, equilibrium.z)

    def of_states(states: Tensor) -> Tensor:
        slope = loss.gradient(states[..., units] + ahead)
        return factor * slope if scale is None else slope * (factor * scale(states))

    return UnitsForce(units, of_states), mismatch


def _metric_of_units(
    metric: Metric | None, diagonal: Tensor | None, units: slice, like: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """From a stack of states to the metric on some units; a metric with `on_units` is not asked for the others."""
    if diagonal is None:
        return None
    if not callable(metric):
        fixed = diagonal[..., units]
        return lambda states: fixed
    on_units = getattr(metric, "on_units", None)
    part = None if on_units is None else on_units(units, like)

    def of_states(states: Tensor) -> Tensor:
        if part is not None:
            return cast(Tensor, continued(states[..., units]))
        return torch.stack([continued(state)[..., units] for state in states])

    # Where a metric is cut off, the bound holds at complex states too.
    continued = holomorphic_map(metric if part is None else part, "real-part")
    return of_states


def _compared(cotangent: Tensor, own: Tensor) -> tuple[float, float]:
    """The factor between two gradients, and how far they are from parallel."""
    size = norm(own)
    square = size * size
    factor = float((own * cotangent).sum()) / square if square > 0 else 0.0
    return factor, norm(cotangent - factor * own) / norm(cotangent)
