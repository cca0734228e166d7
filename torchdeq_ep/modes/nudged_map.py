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

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.errors import EPError, NotHolomorphicError
from torchdeq_ep.holomorphic.context import Crossing, Piecewise, location_of, mode
from torchdeq_ep.jacobian import Product, products
from torchdeq_ep.jacobian.metric import scaled_adjoint
from torchdeq_ep.modes.stencils import Node
from torchdeq_ep.state import Equilibrium

Force = Callable[[Tensor], Tensor]
_END_OF_SENTENCE = re.compile(r"[.!?]\s|\n")
_HOLOMORPHIC_ADVICE = (
    "Use a stencil with real nodes ('ep', or 'ep-richardson' for high order), or teach the operation with "
    "torchdeq_ep.holomorphic.register_rule."
)


@dataclass(frozen=True)
class UnitsForce:
    """A force that acts on some units alone, as that of a loss does that depends on no others.

    Args:
        units: Entries of the last dimension of the state.
        of_states: From a stack of states, `(K, *shape)`, to the force on those units of each.

    Example:
        >>> force = UnitsForce(slice(1, 3), lambda states: 2 * states[..., 1:3])
        >>> force(torch.ones(1, 4))
        tensor([[0., 2., 2., 0.]])
    """

    units: slice
    of_states: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """The force on all units of one state."""
        force = torch.zeros_like(z)
        force[..., self.units] = self.of_states(z.unsqueeze(0))[0]
        return force


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
            [`mode`][torchdeq_ep.holomorphic.mode].

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
        self.free = equilibrium.z.to(self.dtype).unsqueeze(0)
        pull = self.free - equilibrium.value
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
        return _multiply_add(self.free, self._amplitudes, d.to(self.dtype))

    def displacements(self, states: Tensor) -> Tensor:
        """The displacements of states, `(z_k - z*) / b_k`.

        Args:
            states: States of shape `(K, *shape)`.

        Returns:
            Displacements of the same shape.
        """
        # By the inverse, because a complex division costs ten products.
        return (states - self.free) * (1 / self._amplitudes)

    def __call__(self, states: Tensor) -> Tensor:
        """`N_b(z)` for a stack of states of shape `(K, *shape)`."""
        value = self._holomorphic_value(states) if self.is_complex else self._evaluate(states)
        moved = value + self._pull
        if self._correction is not None:
            moved += torch.stack([self._correction(state) for state in states - self.free])
        if isinstance(self._state_force, UnitsForce):
            moved[..., self._state_force.units] += self._amplitudes * self._state_force.of_states(states)
        elif self._state_force is not None:
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
            except (EPError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # an assertion, a look-up by dtype: whatever code for real states does
                raise NotHolomorphicError(
                    f"f cannot be evaluated at a complex state: {_first_sentence(error)}. {location_of(error)} "
                    f"{_HOLOMORPHIC_ADVICE}"
                ) from error
        if not value.is_complex():
            raise NotHolomorphicError(
                "f returned real values at a complex state: code that PyTorch does not see (NumPy, a compiled "
                f"extension) drops the imaginary part. {_HOLOMORPHIC_ADVICE}"
            )
        return value


def _first_sentence(error: Exception) -> str:
    """What happened, without the advice that follows: to cast to a real dtype would drop the imaginary part."""
    said = _END_OF_SENTENCE.split(str(error).strip())[0].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


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
