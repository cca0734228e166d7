"""The autograd node that makes an error vector the gradient of an implicit layer. It knows nothing of torchdeq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchdeq_ep.certificate import Certificate, certified, certify, speak_up_of_certificate
from torchdeq_ep.closing import has_tangent, is_in_batch, is_transforming, may_have_tangents
from torchdeq_ep.compiling import not_compiled
from torchdeq_ep.errors import DoubleBackwardError, InvalidOptionError
from torchdeq_ep.following import follow
from torchdeq_ep.layer import Layer, solve
from torchdeq_ep.linear_solve import Linear, in_batch, linear_solve
from torchdeq_ep.modes import ModeLike, NudgeReport, StepwiseMode, get_backward, require_equilibrium
from torchdeq_ep.recording import Recording, depends_on_more, reaches_state, recorded, recording_of
from torchdeq_ep.state import Autocast, Map, Memory, Packing, first_derivative_only, forget_casts, tensors_of
from torchdeq_ep.state.derivatives import NO_SECOND_DERIVATIVE
from torchdeq_ep.transformed import connect_transformed

AnyState = TypeVar("AnyState", bound=Tensor | Sequence[Tensor])


@not_compiled
def attach(
    f: Callable[..., Any],
    z_star: AnyState,
    backward: str | ModeLike = "ep",
    *,
    writer: Callable[[NudgeReport], None] | None = None,
    certificate: bool = True,
    memory: Memory | None = None,
) -> AnyState:
    """Give a fixed point, found by whatever means, the gradient of the implicit layer it belongs to.

    `f` is called once now, to record how it depends on its parameters and inputs, and again in the backward pass, where
    the mode finds the error vector `v`; the gradients are `(df/dtheta)^T v` and `(df/dx)^T v`, [eq. (2)][eq-2] of the
    theory page. Transforms of `torch.func` and forward-mode automatic differentiation go through it as well: a tangent
    takes plain nudges or products, and needs no symmetry.

    Args:
        f: The map, with `z_star = f(z_star)`: a closure or module over parameters and inputs. Several tensors
            are passed as `f(*z_star)`, as torchdeq does, or as one sequence if `f` takes exactly one required argument;
            one tensor in a sequence is passed as `f(tensor)`.
        z_star: The fixed point: a tensor of any shape, or a tuple or list of tensors. Gradients do not flow into it.
        backward: Name or spec of a backward mode (`"ep"`, `"hep:n_points=6"`), or a mode.
        writer: Called with the [`NudgeReport`][torchdeq_ep.modes.NudgeReport] of each backward pass, at its end.
        certificate: Whether `f` is recorded at a state that asks for a gradient, so that each pass reports its
            [adjoint residual](certificate.md) at the price of one `J^T v` beside the gradients of the parameters.
        memory: What is remembered from one call to the next, a `tep.Memory(lasting=True)` that the layer keeps: what
            was measured of `f` is not measured again, and warnings of asymmetry and of a hidden derivative are issued,
            once and with counts. Without one nothing is known of earlier calls, and these two are not.

    Returns:
        `z_star`, with the same values and container, and a gradient. Without one where autograd is off, or where `f`
        depends on nothing that requires a gradient.

    Raises:
        UnknownBackwardError: If no backward mode has that name.
        MapContractError: If `z_star` is no state, or `f` does not return one of the same shapes and dtypes.
        MapChangedError: In the backward pass, if `f` is no longer the same function.
        StochasticMapError: In the backward pass, if `f` gives different answers for the same state.
        TransformError: If a transform of `torch.func` asks for what an equilibrium cannot serve.

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
    if not (torch.is_grad_enabled() or may_have_tangents()):
        return z_star
    autocast = Autocast.current(first.device.type)
    packing = Packing.of(z_star, lenient=autocast.enabled)
    map_of_states = packing.map(f)
    free_state = packing.pack(z_star, "z_star").detach()
    if free_state.is_inference():  # found under torch.inference_mode: autograd saves no such tensor
        free_state = free_state.clone()
    layer = Layer(map_of_states, mode, autocast, packing, writer, memory=memory or Memory())
    if is_transforming():
        connected = connect_transformed(layer, free_state, free_state)
    else:
        value, recording = _value_at(map_of_states, free_state, certificate)
        connected = connect(layer, free_state, value, free_state, recording)
    return cast(AnyState, packing.restore(connected, like=z_star))


def _value_at(f: Map, z: Tensor, certificate: bool) -> tuple[Tensor, Recording | None]:
    """`f(z)`, recorded at a state that asks for a gradient where `f` allows it."""
    forget_casts()
    if certificate and not may_have_tangents():
        state = recorded(z)
        try:
            value = f(state)
        except RuntimeError:  # f writes into its state, or takes it out of autograd's hands
            pass
        else:
            if reaches_state(value, state):
                return value, recording_of(state)
    return f(z), None


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
    if not (has_tangent(value) or depends_on_more(value, recording)):
        return returned.detach()
    if has_tangent(value):
        require_equilibrium(layer.mode)
    if isinstance(layer.mode, StepwiseMode):
        return follow(layer, layer.mode, free_state, value, returned, recording)
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

    Raises:
        InvalidOptionError: If the mode has no error vector to penalise the asymmetry along.
    """
    if isinstance(layer.mode, StepwiseMode):
        raise InvalidOptionError(
            f"homeostasis along the error vector needs one, and {layer.mode!r} differentiates steps instead: take "
            "another backward, or random directions: tep.register_homeostasis(module, 20.0, estimator='antisymmetric')."
        )
    leaves = () if layer.penalty is None else layer.penalty.leaves
    anchor = value.reshape(-1)[:0].clone()
    arguments = layer, recording, anchor, free_state, value, returned.detach(), *leaves
    connected, zero = _EquilibriumGradient.apply(*arguments)  # type: ignore[no-untyped-call]
    return connected, zero


class _EquilibriumGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        recording: Recording | None,
        anchor: Tensor,
        free_state: Tensor,
        value: Tensor,
        returned: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.recording, ctx.has_tangent = layer, recording, False
        # v depends on whatever the anchor does, also where the loss is linear.
        ctx.save_for_backward(anchor, free_state, value.clone())  # f may return a buffer that its next call overwrites
        ctx.save_for_forward(free_state, value)
        zero = returned.new_zeros(())
        if layer.penalty is None:
            ctx.mark_non_differentiable(zero)
        return returned.clone(), zero

    @staticmethod
    @not_compiled
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, weight = cotangents
        anchor, free_state, value = ctx.saved_tensors
        if ctx.has_tangent and may_have_tangents():
            raise DoubleBackwardError(NO_SECOND_DERIVATIVE)
        if is_in_batch(cotangent):
            problem = Linear(ctx.layer, ctx.layer.f, closed=False)
            value = value + anchor.sum()
            v = in_batch(lambda g: linear_solve(problem, g, free_state, value), cotangent)
            return None, None, None, None, v, None, *(None for _ in ctx.needs_input_grad[6:])
        backward = _Pass(ctx.layer, free_state, value.detach(), cotangent.detach(), weight.detach())
        if ctx.recording is None:
            backward.deliver()
        else:
            if ctx.recording.is_hidden:
                backward.certify(torch.zeros_like(free_state))
            # J^T v comes with the gradients of the parameters, after this; the report once all is done.
            ctx.recording.taker = backward.take
            torch.autograd.Variable._execution_engine.queue_callback(backward.deliver)
        source = cotangent.sum() + anchor.sum() if torch.is_grad_enabled() else cotangent
        v = first_derivative_only(backward.error_vector, source)
        return None, None, None, None, v, None, *backward.added

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        free_state, value = ctx.saved_tensors
        force = tangents[4]
        if force is None:
            return None, None
        ctx.has_tangent = True
        problem = Linear(ctx.layer, ctx.layer.f, adjoint=False, closed=False)
        value_now = value.detach().clone()
        return in_batch(lambda h: linear_solve(problem, h, free_state, value_now), force), None


class _Pass:
    """One backward pass of a layer: its error vector now, its certificate when `J^T v` has come."""

    def __init__(self, layer: Layer, free_state: Tensor, value: Tensor, cotangent: Tensor, weight: Tensor) -> None:
        self._layer = layer
        equilibrium, self.error_vector, self._report, self.added = solve(layer, free_state, value, cotangent, weight)
        self._certificate: Certificate | None = None
        self._open: tuple[Tensor, Tensor, Any, float] | None = (
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
        is_along = layer.penalty is not None
        speak_up_of_certificate(layer.mode, self._certificate, report, layer.memory, is_along)
