"""One call of an implicit layer, and the solve of its error vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchdeq_ep.asymmetry import AsymmetryPenalty
from torchdeq_ep.certificate import compare_derivatives
from torchdeq_ep.errors import MapChangedError, MapContractError, StochasticMapError
from torchdeq_ep.modes import Mode, ModeLike, NudgeReport
from torchdeq_ep.state import (
    STATEFUL,
    Autocast,
    Equilibrium,
    Map,
    Memory,
    Packing,
    Rows,
    change_tolerance,
    norm,
    relative_difference,
    undisturbed,
)


@dataclass
class Layer:
    """One call of an implicit layer, as its autograd node remembers it.

    Args:
        f: The map, on packed states.
        mode: The backward mode.
        autocast: The autocast state of the forward pass.
        packing: What the packed state stands for.
        writer: Called with the report of each backward pass.
        loss_of_state: A function that returns the loss as a function of the packed state, for loss nudging, or `None`;
            asked at backward time.
        memory: What is remembered of the layer's earlier passes.
        penalty: The asymmetry along the error vector, if that is to be penalised.
        controller: What is shown each error vector with its equilibrium, beside the penalty.
        history: What the solver left for a mode that needs it.
    """

    f: Map
    mode: ModeLike
    autocast: Autocast
    packing: Packing
    writer: Callable[[NudgeReport], None] | None = None
    loss_of_state: Callable[[], Map | None] = lambda: None
    memory: Memory = field(default_factory=Memory)
    penalty: AsymmetryPenalty | None = None
    controller: Callable[[Equilibrium, Tensor], None] | None = None
    history: object = None
    samples: int = 0
    """The number of states in a stack of them, each on its own; 0 if there is one."""

    def rows(self, z: Tensor) -> Rows | None:
        """Where samples may lie in a packed state: each of a stack is one."""
        return Rows(self.samples, (z.numel() // self.samples,)) if self.samples else self.packing.rows


def solve(
    layer: Layer, free_state: Tensor, value: Tensor, cotangent: Tensor, weight: Tensor
) -> tuple[Equilibrium, Tensor, NudgeReport, tuple[Tensor | None, ...]]:
    """The error vector of a layer.

    Args:
        layer: The layer.
        free_state: Packed `z*`, detached.
        value: `f(z*)` in the forward pass, detached.
        cotangent: Packed, detached.
        weight: Of the penalty of the layer.

    Returns:
        The equilibrium, its error vector, the report, and what the penalty adds to the gradient of its leaves.

    Raises:
        MapChangedError: If `f` is no longer the same function.
        StochasticMapError: If `f` gives different answers for the same state.
    """
    # Autocast rounds f far more coarsely than the state's dtype: nudge in full precision wherever f allows it.
    autocast, z = layer.autocast, free_state
    in_force, value_now, records = _evaluate(layer, z)
    eps_then = torch.finfo(autocast.dtype if autocast.enabled else z.dtype).eps
    eps_now = torch.finfo(autocast.dtype if in_force else z.dtype).eps
    with autocast.restored(in_force):
        if torch.equal(value, value_now):
            value_now = value  # one state less in memory
        else:
            _require_same_function(layer.f, z, value, value_now, change_tolerance(eps_then))
        equilibrium = Equilibrium(
            layer.f,
            z,
            value_now,
            cotangent,
            eps_now,
            records,
            layer.loss_of_state(),
            layer.rows(z),
            layer.memory,
            history=layer.history,
        )
        if isinstance(layer.mode, Mode):
            error_vector, report = layer.mode.solve(equilibrium)
        else:
            error_vector, report = _solve_by_callable(layer.mode, equilibrium)
        error_vector = error_vector.detach()
        with undisturbed(records):
            calls = compare_derivatives(layer.mode, equilibrium, error_vector)
            added = _penalised(layer, equilibrium, error_vector, weight)
    return equilibrium, error_vector, replace(report, calls=report.calls + calls), added


def _penalised(layer: Layer, equilibrium: Equilibrium, v: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    if layer.penalty is None:
        return ()
    if equilibrium.cotangent_size == 0.0:  # no loss, no error vector
        return (None,) * len(layer.penalty.leaves)
    if layer.controller is not None:
        layer.controller(equilibrium, v)
    return layer.penalty.gradients(equilibrium, v, layer.autocast, weight)


def _solve_by_callable(mode: ModeLike, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
    equilibrium.require_finite()
    with undisturbed(equilibrium.records):
        error_vector = mode(equilibrium.f, equilibrium.z, equilibrium.cotangent)
    shape = tuple(equilibrium.z.shape)
    if not isinstance(error_vector, Tensor) or error_vector.shape != equilibrium.z.shape:
        got = tuple(error_vector.shape) if isinstance(error_vector, Tensor) else type(error_vector).__name__
        raise MapContractError(f"the backward {mode!r} must return a tensor of shape {shape}, not {got}.")
    return error_vector, NudgeReport(repr(mode))


def _evaluate(layer: Layer, z: Tensor) -> tuple[bool, Tensor, bool]:
    """Whether `f` needs the autocast of the forward pass, a copy of `f(z*)`, and whether `f` records statistics."""
    with undisturbed() as guard:
        if layer.autocast.enabled:
            try:
                with layer.autocast.restored(False):
                    return False, layer.f(z).clone(), guard.withheld
            except RuntimeError:  # mixed dtypes: inputs were cast in the forward pass, and f relies on it
                pass
        with layer.autocast.restored(True):
            return layer.autocast.enabled, layer.f(z).clone(), guard.withheld


def _require_same_function(f: Map, z: Tensor, then: Tensor, now: Tensor, tolerance: float) -> None:
    if not norm(then - now) > tolerance * norm(then):
        return
    difference = relative_difference(now, then)
    with undisturbed():
        again = f(z)
    if norm(again - now) > tolerance * norm(now):
        raise StochasticMapError(
            f"f gives different answers for the same state (by {difference:.1e}), so it has no fixed point. {STATEFUL}"
        )
    raise MapChangedError(
        f"f(z*) differs by {difference:.1e} from its value in the forward pass, so f was changed in between and the "
        "gradient would be that of another model. Call backward() before reset_deq(), optimizer.step() or "
        "train()/eval(), and do not write into tensors that f uses."
    )
