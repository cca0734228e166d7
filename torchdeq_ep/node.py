"""The autograd node that makes an error vector the gradient of an implicit layer. It knows nothing of torchdeq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchdeq_ep.asymmetry import AsymmetryPenalty
from torchdeq_ep.certificate import Certificate, certified, certify, compare_derivatives, speak_up_of_certificate
from torchdeq_ep.errors import MapChangedError, MapContractError, StochasticMapError
from torchdeq_ep.modes import Mode, ModeLike, NudgeReport, get_backward
from torchdeq_ep.recording import Recording, depends_on_more, reaches_state, recorded, recording_of
from torchdeq_ep.state import (
    STATEFUL,
    Autocast,
    Equilibrium,
    Map,
    Memory,
    Packing,
    change_tolerance,
    first_derivative_only,
    forget_casts,
    norm,
    relative_difference,
    tensors_of,
    undisturbed,
)

AnyState = TypeVar("AnyState", bound=Tensor | Sequence[Tensor])


def attach(
    f: Callable[..., Any],
    z_star: AnyState,
    backward: str | ModeLike = "ep",
    *,
    writer: Callable[[NudgeReport], None] | None = None,
    certificate: bool = True,
) -> AnyState:
    """Give a fixed point, found by whatever means, the gradient of the implicit layer it belongs to.

    `f` is called once now, to record how it depends on its parameters and inputs, and again in the backward pass, where
    the mode finds the error vector `v`; the gradients are `(df/dtheta)^T v` and `(df/dx)^T v`, [eq. (2)][eq-2] of the
    theory page.

    Args:
        f: The map, with `z_star = f(z_star)`: a closure or module over parameters and inputs. Several tensors
            are passed as `f(*z_star)`, as torchdeq does, or as one sequence if `f` takes exactly one required argument.
        z_star: The fixed point: a tensor of any shape, or a tuple or list of tensors. Gradients do not flow into it.
        backward: Name or spec of a backward mode (`"ep"`, `"hep:n_points=6"`), or a mode.
        writer: Called with the [`NudgeReport`][torchdeq_ep.modes.NudgeReport] of each backward pass, at its end.
        certificate: Whether `f` is recorded at a state that asks for a gradient, so that each pass reports its
            [adjoint residual](certificate.md) at the price of one `J^T v` beside the gradients of the parameters.

    Returns:
        `z_star`, with the same values and container, and a gradient. Without one where autograd is off, or where `f`
        depends on nothing that requires a gradient.

    Raises:
        UnknownBackwardError: If no backward mode has that name.
        MapContractError: If `z_star` is no state, or `f` does not return one of the same shapes and dtypes.
        MapChangedError: In the backward pass, if `f` is no longer the same function.
        StochasticMapError: In the backward pass, if `f` gives different answers for the same state.

    Example:
        >>> import torch
        >>> bias = torch.tensor([0.5], requires_grad=True)
        >>> z = torch.zeros(1)
        >>> for _ in range(50):
        ...     z = 0.5 * torch.tanh(z) + bias.detach()
        >>> attach(lambda z: 0.5 * torch.tanh(z) + bias, z, backward="ep").backward()
        >>> bias.grad.round(decimals=2)
        tensor([1.3600])
    """
    mode = get_backward(backward)
    first, *_ = tensors_of(z_star)
    if not torch.is_grad_enabled():
        return z_star
    autocast = Autocast.current(first.device.type)
    packing = Packing.of(z_star, lenient=autocast.enabled)
    map_of_states = packing.map(f)
    free_state = packing.pack(z_star, "z_star").detach()
    value, recording = _value_at(map_of_states, free_state, certificate)
    layer = Layer(map_of_states, mode, autocast, packing, writer)
    connected = connect(layer, free_state, value, free_state, recording)
    return cast(AnyState, packing.restore(connected, like=z_star))


def _value_at(f: Map, z: Tensor, certificate: bool) -> tuple[Tensor, Recording | None]:
    """`f(z)`, recorded at a state that asks for a gradient where `f` allows it."""
    forget_casts()
    if certificate:
        state = recorded(z)
        try:
            value = f(state)
        except RuntimeError:  # f writes into its state, or takes it out of autograd's hands
            pass
        else:
            if reaches_state(value, state):
                return value, recording_of(state)
    return f(z), None


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


def connect(
    layer: Layer, free_state: Tensor, value: Tensor, returned: Tensor, recording: Recording | None = None
) -> Tensor:
    """The node itself: `returned`, with the error vector flowing back into `value`.

    Args:
        layer: The layer.
        free_state: Packed `z*`, detached.
        value: `f(z*)`, with its graph to parameters and inputs.
        returned: The tensor whose values the result has: `free_state` or `value`.
        recording: Of the state at which `value` was taken.

    Returns:
        A new tensor.
    """
    if not depends_on_more(value, recording):
        return returned.detach()
    return connect_with_penalty(layer, free_state, value, returned, recording)[0]


def connect_with_penalty(
    layer: Layer, free_state: Tensor, value: Tensor, returned: Tensor, recording: Recording | None
) -> tuple[Tensor, Tensor]:
    """The same, for a value that depends on something, and what a penalty on the asymmetry is weighed by.

    Args:
        layer: The layer.
        free_state: Packed `z*`, detached.
        value: `f(z*)`, with its graph to parameters and inputs.
        returned: The tensor whose values the result has.
        recording: Of the state at which `value` was taken, if any.

    Returns:
        The new tensor; and a scalar of value 0, whose cotangent is the weight of the layer's penalty, if it has one.
    """
    leaves = () if layer.penalty is None else layer.penalty.leaves
    arguments = layer, recording, free_state, value, returned.detach(), *leaves
    connected, zero = _EquilibriumGradient.apply(*arguments)  # type: ignore[no-untyped-call]
    return connected, zero


class _EquilibriumGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        recording: Recording | None,
        free_state: Tensor,
        value: Tensor,
        returned: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.recording = layer, recording
        ctx.save_for_backward(free_state, value.clone())  # f may return a buffer that its next call overwrites
        zero = returned.new_zeros(())
        if layer.penalty is None:
            ctx.mark_non_differentiable(zero)
        return returned.clone(), zero

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, weight = cotangents
        free_state, value = ctx.saved_tensors
        backward = _Pass(ctx.layer, free_state, value.detach(), cotangent.detach(), weight.detach())
        if ctx.recording is None:
            backward.deliver()
        else:
            if ctx.recording.is_hidden:
                backward.certify(torch.zeros_like(free_state))
            # J^T v comes with the gradients of the parameters, after this; the report once all is done.
            ctx.recording.taker = backward.take
            torch.autograd.Variable._execution_engine.queue_callback(backward.deliver)
        return None, None, None, first_derivative_only(backward.error_vector, cotangent), None, *backward.added


class _Pass:
    """One backward pass of a layer: its error vector now, its certificate when `J^T v` has come."""

    def __init__(self, layer: Layer, free_state: Tensor, value: Tensor, cotangent: Tensor, weight: Tensor) -> None:
        self._layer = layer
        equilibrium, self.error_vector, self._report, self.added = _solve(layer, free_state, value, cotangent, weight)
        self._certificate: Certificate | None = None
        self._open: tuple[Tensor, Tensor, Tensor | None, float] | None = (
            self.error_vector,
            equilibrium.cotangent,
            equilibrium.used.metric,
            torch.finfo(layer.autocast.dtype).eps if layer.autocast.enabled else equilibrium.eps,
        )

    def take(self, cotangents: Sequence[Tensor]) -> None:
        """Make the certificate from `J^T v`, as the state has it."""
        first = cotangents[0]
        is_packed = len(cotangents) == 1 and first.shape == self.error_vector.shape
        self.certify(first if is_packed else self._layer.packing.pack(cotangents, "J^T v"))

    def certify(self, adjoint: Tensor) -> None:
        """Make the certificate from `J^T v`, packed."""
        if self._open is not None:
            v, g, metric, rounding = self._open
            self._open, self._certificate = None, certify(v, g, adjoint, metric, self._report, rounding)

    def deliver(self) -> None:
        """Hand the report out, and say what the certificate has to say."""
        self._open = None
        layer, report = self._layer, self._report
        if self._certificate is not None:
            report = certified(layer.mode, report, self._certificate)
            layer.memory.certify(report.adjoint_residual)
        if layer.writer is not None:
            layer.writer(report)
        speak_up_of_certificate(layer.mode, self._certificate, report, layer.memory)


def _solve(
    layer: Layer, free_state: Tensor, value: Tensor, cotangent: Tensor, weight: Tensor
) -> tuple[Equilibrium, Tensor, NudgeReport, tuple[Tensor | None, ...]]:
    """The equilibrium, its error vector, the report, and what the penalty of that weight adds to its leaves."""
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
            layer.packing.rows,
            layer.memory,
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
