"""The nudged map, whose fixed point is the error vector as a nudge of amplitude `b` sees it.

With `z*` the free state, the nudged map and the displacement of its fixed point `z_b` are

    N_b(z) = f(z) + b g + (z* - f(z*)),        d_b = (z_b - z*) / b.

The last term cancels the residual that the free phase left in `z*`. In the displacement the same map reads
`D_b(d) = (N_b(z* + b d) - z*) / b = (f(z* + b d) - f(z*)) / b + g`, which has the scale of `g` at every amplitude, and
`D_0(d) = J d + g`: finite, complex and infinitesimal nudges are one equation. It is iterated in `z`, where a step
takes one sum beside the call of `f`, and residuals are measured in `d`. These are eqs. (5) and (6) of the theory page;
with a metric eq. (13), with the asymmetric correction eq. (19).
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


class NudgedMap:
    """`z -> N_b(z)`, whose displacements follow [eq. (6)][eq-6] of the theory page, for nodes all real or all complex.

    Args:
        equilibrium: The free equilibrium.
        nudges: The amplitudes `b_k`, absolute: already multiplied by `|z*| / |g|` if they are to be relative. Several
            are evaluated in one call of `f` by `torch.vmap`.
        force: `M g`, of the shape of the state, `b_k` times which is added for each node.
        correction: A linear term added to `D_b`.
        state_force: `M dL/dz` as a function of one nudged state, which replaces `force` (loss nudging).
        piecewise: What complex nodes make of piecewise analytic operations, see
            [`mode`][torchdeq_ep.holomorphic.mode.mode].

    Raises:
        InvalidOptionError: If `piecewise` is not acceptable.
        NotHolomorphicError: In a call, if the nudges are complex and `f` cannot be evaluated there.

    Example:
        >>> z = torch.zeros(2)
        >>> free = Equilibrium(lambda z: 0.5 * z, z, z, torch.ones(2), eps=1e-7)
        >>> nudged = NudgedMap(free, (0.5,), torch.ones(2))
        >>> states = nudged.states(torch.full((1, 2), 2.0))  # 0.5 d + g has the fixed point 2 g
        >>> nudged.displacements(nudged(states))
        tensor([[2., 2.]])
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
        self.smallest = min(map(abs, nudges))
        self._holomorphic = mode(piecewise)
        self._amplitudes: Node | Tensor = nudges[0]
        if len(nudges) > 1:
            stack = torch.tensor(nudges, dtype=self.dtype, device=force.device)
            self._amplitudes = stack.reshape(-1, *(1 for _ in force.shape))
        self._free = equilibrium.z.to(self.dtype).unsqueeze(0)
        pull = self._free - equilibrium.value
        self._pull = pull if state_force is not None else _multiply_add(pull, self._amplitudes, force.to(self.dtype))

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """How many units of piecewise analytic operations may have left their piece at complex states."""
        return self._holomorphic.crossings

    def states(self, d: Tensor) -> Tensor:
        """The states of displacements, `z* + b_k d_k`.

        Args:
            d: Displacements of shape `(K, *shape)`, `K` the number of nodes.

        Returns:
            States of the same shape.
        """
        return _multiply_add(self._free, self._amplitudes, d.to(self.dtype))

    def displacements(self, states: Tensor) -> Tensor:
        """The displacements of states, `(z_k - z*) / b_k`.

        Args:
            states: States of shape `(K, *shape)`.

        Returns:
            Displacements of the same shape.
        """
        # By the inverse, because a complex division costs ten products.
        return (states - self._free) * (1 / self._amplitudes)

    def __call__(self, states: Tensor) -> Tensor:
        """`N_b(z)` for a stack of states of shape `(K, *shape)`."""
        value = self._holomorphic_value(states) if self.is_complex else self._evaluate(states)
        moved = value + self._pull
        if self._correction is not None:
            moved += torch.stack([self._correction(state) for state in states - self._free])
        if self._state_force is not None:
            moved += self._amplitudes * torch.stack([self._state_force(state) for state in states])
        return moved

    def _evaluate(self, states: Tensor) -> Tensor:
        if not self.is_complex:
            states = states.to(self._equilibrium.z.dtype)
        f = self._equilibrium.f
        return torch.vmap(f)(states) if isinstance(self._amplitudes, Tensor) else f(states[0])

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

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> correction = AsymmetricCorrection(limit=lambda d: turn.T @ d, forward=lambda d: turn @ d)
        >>> correction(torch.tensor([1.0, 0.0]))
        tensor([0., 2.])
    """

    limit: Product
    forward: Product

    @classmethod
    def at(cls, equilibrium: Equilibrium, metric: Tensor | None) -> AsymmetricCorrection:
        """The correction at an equilibrium.

        Args:
            equilibrium: The free equilibrium.
            metric: Diagonal of `M`, or `None` for the identity.

        Returns:
            The term, with products of the Jacobian at the free state.
        """
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

    Example:
        >>> product = scaled_adjoint(lambda v: v.flip(0), torch.tensor([1.0, 2.0]))
        >>> product(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 2.0000])
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

    Example:
        >>> diagonal_metric(lambda z: 1 - z**2, torch.tanh, torch.tensor([0.0, 0.5]))
        (tensor([1.0000, 0.7500]), 0)
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
    equilibrium: Equilibrium,
    returned: Tensor,
    metric: Metric | None,
    diagonal: Tensor | None,
    piecewise: Piecewise | None = None,
) -> tuple[Force, float]:
    """The force of loss nudging, `z -> M(z) dL/dz`, in the scale of the cotangent: [eq. (7)][eq-7] of the theory page.

    The metric is that of the nudged state, as in arXiv 2309.02214, where potentials are nudged by `dL/dphi`: with that
    of the free state, a unit that was saturated there and no longer is would be pulled by many times that.

    The user's loss may differ from the one that was differentiated by a factor (gradient accumulation, a GradScaler, a
    mean instead of a sum); the factor is found from the two gradients at the state that the layer returned. At a
    complex state PyTorch returns the conjugate of the holomorphic derivative.

    Args:
        equilibrium: The free equilibrium; its `loss_of_state` is not `None`.
        returned: The state at which the cotangent was taken. A free phase that stopped early leaves it at some distance
            from the free state.
        metric: As for [`diagonal_metric`][torchdeq_ep.displacement.diagonal_metric].
        diagonal: What that returned. It stands for `"auto"` at every state.
        piecewise: As for [`NudgedMap`][torchdeq_ep.displacement.NudgedMap].

    Returns:
        The force, and how far the two gradients are from parallel: `|g - factor dL/dz| / |g|`.

    Raises:
        InvalidOptionError: If the equilibrium has no `loss_of_state`.
        MapContractError: If the loss is not a scalar.

    Example:
        >>> z = torch.tensor([1.0, 2.0])
        >>> free = Equilibrium(lambda z: z, z, z, 2 * z, 1e-7, loss_of_state=lambda z: z.square().sum() / 2)
        >>> force, mismatch = loss_force(free, z, None, None)
        >>> force(torch.ones(2)), mismatch
        (tensor([2., 2.]), 0.0)
    """
    loss = equilibrium.loss_of_state
    if loss is None:
        raise InvalidOptionError("loss nudging needs a loss_of_state: use tep.nudge_loss(module, loss_of_state).")

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

    cotangent = equilibrium.cotangent
    own = gradient(returned)
    square = norm(own) ** 2
    factor = float((own * cotangent).sum()) / square if square > 0 else 0.0
    mismatch = norm(cotangent - factor * own) / norm(cotangent)

    def force(z: Tensor) -> Tensor:
        scale = diagonal if continued_metric is None else continued_metric(z)
        return factor * (gradient(z) if scale is None else scale * gradient(z))

    return force, mismatch
