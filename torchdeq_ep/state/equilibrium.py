"""The free equilibrium with its cotangent: all that a backward mode is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import NonFiniteError
from torchdeq_ep.state.calls import Map
from torchdeq_ep.state.memory import Key, Memory
from torchdeq_ep.state.norms import MIN_NORM, norm, row_norms
from torchdeq_ep.state.rounding import measured_rounding, precision_settings
from torchdeq_ep.state.rows import Rows, are_independent


@dataclass
class Used:
    """What a mode used, for those who judge its error vector.

    Args:
        metric: Diagonal of `M`, an operator with `apply` and `inverse`, or `None` for the identity.
        assumed_symmetry: Whether its equation has `J` where the exact one has `J^T`.
    """

    metric: Any = None
    assumed_symmetry: bool = False


@dataclass(frozen=True)
class Equilibrium:
    """A free equilibrium with a cotangent: all that a backward mode is given.

    Args:
        f: The map, on packed states; opaque.
        z: Packed fixed point `z* = f(z*)`, real, detached.
        value: `f(z*)`. Kept apart from `z` because a solver stops early: the nudged map cancels the difference.
        cotangent: `g = dL/dz*`, of the shape of `z`.
        eps: Relative rounding error of the dtype of the state, or of the autocast that `f` runs under.
        records: Whether `f` has layers that would record running statistics.
        loss_of_state: The scalar loss as a function of the packed state, for loss nudging; `None` freezes `g`.
        rows: Where the samples of a batch lie in the state, if it may hold any.
        memory: What the layer remembers of earlier passes, and what speaks up.
        used: What the mode used for it.
        history: What the solver left for a mode that needs it.

    Example:
        >>> z = torch.tensor([3.0, 4.0])
        >>> free = Equilibrium(torch.cos, z, 1.1 * z, torch.ones(2), eps=1e-7)
        >>> free.size, round(free.residual, 3)
        (5.0, 0.1)
    """

    f: Map
    z: Tensor
    value: Tensor
    cotangent: Tensor
    eps: float
    records: bool = True
    loss_of_state: Map | None = None
    rows: Rows | None = None
    memory: Memory = field(default_factory=Memory)
    used: Used = field(default_factory=Used)
    history: object = None

    @cached_property
    def size(self) -> float:
        """Norm of `z*`."""
        return norm(self.z)

    @cached_property
    def cotangent_size(self) -> float:
        """Norm of the cotangent."""
        return norm(self.cotangent)

    @cached_property
    def residual(self) -> float:
        """Norm of `f(z*) - z*` relative to that of `z*`, over the whole state."""
        return norm(self.value - self.z) / (self.size if self.size > MIN_NORM else 1.0)

    @cached_property
    def rounding(self) -> float:
        """Relative rounding error of one call of `f`: measured once in its dtype and precision, and remembered."""
        key: Key = (str(self.z.dtype), self.eps, *precision_settings())
        found = self.memory.rounding.get(key)
        if found is None:
            measured, calls = measured_rounding(self.f, self.z, self.value)
            found = self.memory.rounding[key] = measured
            self.memory.calls += calls
        return found

    @cached_property
    def resolution(self) -> float:
        """Relative difference of two values of `f` that may be rounding: `rounding`, or `eps` if that is more."""
        return max(self.rounding, self.eps)

    def independent_rows(self) -> Rows | None:
        """Where rows lie that `f` treats apart: measured once, in one or two calls of `f`, and remembered.

        Returns:
            Their layout, or `None` if the rows are coupled or there are none.
        """
        if self.rows is None:
            return None
        key = (self.rows.count, *self.rows.parts, self.records)
        found = self.memory.independent.get(key)
        if found is None:
            found = self.memory.independent[key] = are_independent(self.f, self.z, self.value, self.rows)
            self.memory.calls += 2 if found else 1
        return self.rows if found else None

    def afresh(self, silent: bool = False) -> Equilibrium:
        """The same, as if nothing had been used for it or said of it: one solve of it must not tell on another.

        Args:
            silent: Whether what a solve of the copy warns of is no matter of the user's.

        Returns:
            A copy that knows what was measured of `f`.
        """
        known = self.memory
        memory = Memory(silent=silent, independent=known.independent, rounding=known.rounding)
        return replace(self, memory=memory, used=Used())

    def rows_below(self, share: float) -> int:
        """How many samples have a cotangent, but less than a share of that of the batch.

        Args:
            share: Of the norm of the cotangent.

        Returns:
            Their number; 0 if the state may hold no samples.
        """
        if self.rows is None:
            return 0
        sizes = row_norms(self.rows.split(self.cotangent.unsqueeze(0)))
        return int(((sizes > 0) & (sizes < share * self.cotangent_size)).sum())

    def require_finite(self) -> None:
        """Refuse a cotangent or a value of `f` that holds NaN or infinity.

        Raises:
            NonFiniteError: If one does; the message counts the entries.
        """
        if math.isfinite(self.cotangent_size) and math.isfinite(self.residual):
            return
        for name, tensor in (("the cotangent dL/dz*", self.cotangent), ("f(z*) at the free fixed point", self.value)):
            if not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise NonFiniteError(
                    f"{name} has {count} of {tensor.numel()} entries that are NaN or infinite, so no error vector "
                    "exists. Look for overflow in the loss or a free phase that diverged. If a GradScaler is meant to "
                    "skip such steps, choose on_divergence='ift', which passes them on with a warning."
                )
