"""The two linear equations of an equilibrium, as functions that the transforms of `torch.func` differentiate and batch.

With `J = df/dz` at `z*`, the error vector and the tangent solve

    v = J^T v + g,      d = J d + h,      h = (df/dtheta) dtheta,

and the two are each other's transpose. A solution, as the mode of the layer finds it, is a function of its force, of
`z*` and of `theta`, so it has derivatives of its own: `dv = (I - J^T)^-1 (dg + d(J^T) v)`. A stack is solved at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdeq_ep.closing import is_differentiable, named_failures, refuse_tracing, without_tangent
from torchdeq_ep.errors import DoubleBackwardError, EPError, TransformError
from torchdeq_ep.layer import Layer, solve
from torchdeq_ep.modes import Mode, tangent_mode
from torchdeq_ep.state import FrozenStatistics, Memory, undisturbed
from torchdeq_ep.state.derivatives import NO_SECOND_DERIVATIVE

_DEEPEST = 64  # more batches within each other than PyTorch takes
_INEXACT = (
    "a second derivative was asked of an equilibrium, and the error vector of {mode!r} has none that would be exact, "
    "because it assumes a symmetric Jacobian. Use 'ift' or 'aep'."
)


@dataclass(frozen=True, eq=False)
class Linear:
    """What a force is solved for.

    Args:
        layer: The layer.
        map: `f(z, *leaves)`, of a stack of states if `samples` is not 0.
        adjoint: Whether the equation is that of the error vector, or that of the tangent.
        closed: Whether the leaves are all that `f` uses, so that there are derivatives by them.
        samples: Number of states in the stack.
        is_penalised: Whether a backward pass is to add a penalty, which no transform knows of.
    """

    layer: Layer
    map: Callable[..., Tensor]
    adjoint: bool = True
    closed: bool = True
    samples: int = 0
    is_penalised: bool = False

    @property
    def transposed(self) -> Linear:
        """The other of the two equations."""
        return replace(self, adjoint=not self.adjoint)

    def stacked(self, size: int, dims: Sequence[int | None]) -> Linear:
        """Of a stack of states, with leaves that are stacked along these dimensions.

        Args:
            size: Of the stack.
            dims: For each leaf.

        Returns:
            The problem of the stack.

        Raises:
            TransformError: If the mode uses what the solver of one forward pass kept.
        """
        metric = getattr(self.layer.mode, "metric", None)
        layer = self.layer
        if layer.history is not None:
            raise TransformError(
                f"{layer.mode!r} uses what the solver kept of one forward pass, which a batch of cotangents cannot "
                "share. Pass them one by one, without is_grads_batched and vectorize, or use 'ift' or 'aep'."
            )
        if callable(metric):
            layer = replace(layer, mode=replace(layer.mode, metric=torch.vmap(metric)))  # type: ignore[type-var]
        batched = torch.vmap(self.map, in_dims=(0, *dims))
        return replace(self, layer=layer, map=batched, samples=size * (self.samples or 1))

    def evaluate(self, z: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """`f(z, *leaves)` as the forward pass evaluated it, without recording statistics."""
        with FrozenStatistics(), self.layer.autocast.restored(True):
            return self.map(z, *leaves)

    def product(self, vector: Tensor, z: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """`J^T v` or `J d`, as a function of all three."""
        if self.adjoint:
            pulled: Tensor = torch.func.vjp(lambda point: self.evaluate(point, leaves), z)[1](vector)[0]
            return pulled
        return _push(lambda point: self.evaluate(point, leaves), (z,), (vector,))

    def solution(self, force: Tensor, z: Tensor, value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The error vector or the tangent, of plain tensors."""
        layer = self.layer
        refuse_tracing()
        if self.adjoint and layer.loss_of_state() is not None:
            raise TransformError(
                "nudge_loss gives the loss of a whole backward pass, and a transform of torch.func, or a batch of "
                "cotangents, asks for other derivatives. Leave nudge_loss out there."
            )
        if self.adjoint and self.is_penalised:
            raise TransformError(
                "homeostasis along the error vector adds its gradient in a backward pass, and a transform of "
                "torch.func would leave it out. Remove the homeostasis, or call loss.backward()."
            )
        plain = [leaf.detach() for leaf in leaves]
        size = _sizes(force, self.samples)
        known = layer.memory
        alone = replace(
            layer,
            f=lambda point: self.map(point, *plain),
            mode=layer.mode if self.adjoint else tangent_mode(layer.mode),
            loss_of_state=lambda: None,
            penalty=None,
            samples=self.samples,
            memory=known if self.adjoint else Memory(independent=known.independent, rounding=known.rounding),
        )
        with named_failures() if self.closed else nullcontext():
            _, vector, report, _ = solve(alone, z.detach(), value.detach(), force.detach() / size, force.new_zeros(()))
        if layer.writer is not None:
            layer.writer(report)
        return (vector * size).to(force.dtype)


def _sizes(force: Tensor, samples: int) -> Tensor:
    """The norm of each force of a stack, by which it is divided: each is to be solved to a tolerance of its own."""
    if not samples:
        return force.new_ones(())
    rows = force.detach().reshape(samples, -1)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(force.dtype).tiny)
    sizes = largest * torch.linalg.vector_norm(rows / largest, dim=1, keepdim=True)
    return torch.where(rows.abs().amax(1, keepdim=True) > 0, sizes, 1.0).expand_as(rows).reshape(force.shape)


def linear_solve(problem: Linear, force: Tensor, z: Tensor, value: Tensor, leaves: Sequence[Tensor] = ()) -> Tensor:
    """The solution of a problem, as a function of the force, of `z*` and of the leaves.

    Args:
        problem: Which equation, of which layer.
        force: Its inhomogeneity.
        z: Packed `z*`.
        value: `f(z*)` in the forward pass.
        leaves: What `f` uses.

    Returns:
        `(I - J^T)^-1 force`, or without the transposition, as the mode of the layer finds it.
    """
    solution: Tensor = _LinearSolve.apply(problem, force, z, value, *leaves)  # type: ignore[no-untyped-call]
    return solution


def in_batch(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """A function of one of the batch of `is_grads_batched`, whose `vmap` is another than that of `torch.func`.

    Args:
        function: It has a `vmap` rule of `torch.func`.
        tensor: Its argument, batched or not.

    Returns:
        Its value, batched likewise.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(tensor):
        return function(tensor)
    stacks = ((level, torch._remove_batch_dim(tensor, level, 1, 0)) for level in range(1, _DEEPEST))
    level, stack = next(pair for pair in stacks if not torch._C._functorch.is_legacy_batchedtensor(pair[1]))
    with _random_numbers_allowed():
        values = torch.vmap(function)(stack)
    batched: Tensor = torch._add_batch_dim(values, 0, level)
    return batched


@contextmanager
def _random_numbers_allowed() -> Iterator[None]:
    """Out of the older `vmap`, which forbids random numbers: measuring how `f` rounds takes some."""
    depth = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()  # a thread of the backward pass may not know of it
    if depth:
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        if depth:
            torch._C._vmapmode_increment_nesting()


def for_forward_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A `jvp` that an outer transform may differentiate: torch calls it with forward mode off.

    What was saved loses the tangent of this transform, which the rule is told by itself, and keeps those of outer ones.
    """

    @functools.wraps(rule)
    def with_forward_mode(ctx: Any, *tangents: Tensor | None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx.problem, [without_tangent(t) for t in ctx.saved_tensors], tangents)

    return with_forward_mode


class _LinearSolve(torch.autograd.Function):
    @staticmethod
    def forward(problem: Linear, force: Tensor, z: Tensor, value: Tensor, *leaves: Tensor) -> Tensor:
        return problem.solution(force, z, value, leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem, _, z, value, *leaves = inputs
        ctx.save_for_backward(output, z, value, *leaves)
        ctx.save_for_forward(output, z, value, *leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        _require_second_derivative(ctx.problem, solves_adjoint=True)
        problem, (vector, z, value, *leaves) = ctx.problem, ctx.saved_tensors
        u = linear_solve(problem.transposed, cotangents[0], z, value, leaves)
        arguments = [z, *leaves]
        chosen, product = of_differentiable(arguments, lambda filled: problem.product(vector, filled[0], filled[1:]))
        found = torch.func.vjp(product, *(arguments[k] for k in chosen))[1](u)
        gradients: list[Tensor | None] = [None] * len(arguments)
        for k, gradient in zip(chosen, found, strict=True):
            gradients[k] = gradient
        return None, u, gradients[0], None, *gradients[1:]

    @staticmethod
    @for_forward_mode
    def jvp(problem: Linear, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
        _require_second_derivative(problem, solves_adjoint=problem.adjoint)
        vector, z, value, *leaves = saved
        start = torch.zeros_like(vector) if tangents[1] is None else tangents[1]
        through = change(
            [z, *leaves],
            (tangents[2], *tangents[4:]),
            lambda filled: problem.product(vector, filled[0], filled[1:]),
            torch.zeros_like(vector),
        )
        return linear_solve(problem, start + through, z, value, leaves)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], problem: Linear, *tensors: Tensor) -> Any:
        states = [in_front(info, t, dim) for t, dim in zip(tensors[:3], in_dims[1:4], strict=True)]
        leaves, dims = tensors[3:], in_dims[4:]
        stacked = problem.stacked(info.batch_size, dims)
        if _evaluates(stacked, states[1], leaves):
            return linear_solve(stacked, states[0], states[1], states[2], leaves), 0
        solutions = [
            linear_solve(problem, force, z, value, [_slice(t, dim, k) for t, dim in zip(leaves, dims, strict=True)])
            for k, (force, z, value) in enumerate(zip(*states, strict=True))
        ]
        return torch.stack(solutions), 0


def _require_second_derivative(problem: Linear, solves_adjoint: bool) -> None:
    if not problem.closed:
        raise DoubleBackwardError(NO_SECOND_DERIVATIVE)
    mode = problem.layer.mode
    if solves_adjoint and not (isinstance(mode, Mode) and not mode.assumes_symmetry):
        raise DoubleBackwardError(_INEXACT.format(mode=mode))


def _evaluates(problem: Linear, z: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the map takes a stack: one that looks at data, or has operations without a batching rule, does not."""
    try:
        with undisturbed():
            problem.map(z, *leaves)
    except Exception:  # whatever it raises, it will raise again for a single state if that is what is wrong
        return False
    return True


def in_front(info: Any, tensor: Tensor, dim: int | None) -> Tensor:
    """A tensor with what `vmap` runs over in front.

    Args:
        info: What a `vmap` rule is told.
        tensor: As the rule is given it.
        dim: The dimension, or `None` if it is the same for all.

    Returns:
        A view.
    """
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _slice(tensor: Tensor, dim: int | None, index: int) -> Tensor:
    return tensor if dim is None else tensor.select(dim, index)


def of_differentiable(
    tensors: Sequence[Tensor], function: Callable[[Sequence[Tensor]], Tensor]
) -> tuple[list[int], Callable[..., Tensor]]:
    """Which tensors there are derivatives by, and a function of those alone."""
    chosen = [k for k, tensor in enumerate(tensors) if is_differentiable(tensor)]

    def of_chosen(*given: Tensor) -> Tensor:
        filled = list(tensors)
        for k, tensor in zip(chosen, given, strict=True):
            filled[k] = tensor
        return function(filled)

    return chosen, of_chosen


def change(
    tensors: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    function: Callable[[Sequence[Tensor]], Tensor],
    nothing: Tensor,
) -> Tensor:
    """The derivative of a function along tangents."""
    chosen, of_chosen = of_differentiable(tensors, function)
    if all(tangents[k] is None for k in chosen):
        return nothing
    primals = tuple(tensors[k] for k in chosen)
    along = tuple(
        torch.zeros_like(t) if tangents[k] is None else tangents[k] for k, t in zip(chosen, primals, strict=True)
    )
    return _push(of_chosen, primals, along)


def _push(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Any, ...]) -> Tensor:
    """A JVP, by forward mode; by double backward where an operation has no forward formula."""
    try:
        pushed: Tensor = torch.func.jvp(function, primals, tangents)[1]
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, EPError):
            raise
        value, *rest = torch.func.vjp(function, *primals)
        pushed = torch.func.vjp(rest[0], torch.zeros_like(value))[1](tangents)[0]
    return pushed
