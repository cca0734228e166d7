"""A system whose solver is a black box, as a differentiable function: free and nudged equilibria give its gradient.

An equilibrium `z*` satisfies `F(z*, theta, x) = 0`. A simulator, or an instrument, finds it, and finds it again under
an added force, `F(z_b, theta, x) + b g = 0`. With `K = -dF/dz` at `z*` the displacement `(z_b - z*) / b` tends to
`K^-1 g`. The gradient wants `v = K^-T g`, the same vector where `K` is symmetric: in every system whose force has an
energy. Then

    dL/dtheta = (dF/dtheta)^T v,    dL/dx = (dF/dx)^T v,

one VJP of the force law at one state; nothing goes through the solver (Scellier & Bengio 2017, arXiv 1602.05179;
Kendall et al. 2020, arXiv 2006.01981, for circuits). With a positive diagonal `M` that makes `(dF/dz) M` symmetric, the
force is `b M g` and `v = M^-1 K^-1 M g`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Literal

import torch
from torch import Tensor

from torchdeq_ep.black_box.containers import kept, of_other_tensors
from torchdeq_ep.black_box.instrument import Instrument, Measurement, Solve
from torchdeq_ep.black_box.report import EquilibriumReport
from torchdeq_ep.black_box.system import ForceLaw, System, require_shape
from torchdeq_ep.closing import (
    count_differentiating,
    is_transforming,
    may_have_tangents,
    outside_transforms,
    plain,
    refuse_tracing,
    without_tangent,
)
from torchdeq_ep.compiling import not_compiled
from torchdeq_ep.errors import (
    DoubleBackwardError,
    TransformError,
)
from torchdeq_ep.linear_solve import in_batch
from torchdeq_ep.modes import ForceScale, Stencil
from torchdeq_ep.state.derivatives import NO_SECOND_DERIVATIVE


@not_compiled
def attach_equilibrium(
    solve: Solve,
    force: ForceLaw,
    theta: Any,
    x: Any = None,
    *,
    stencil: Stencil | str = "symmetric",
    scale: ForceScale | Literal["response"] = "relative",
    metric: Tensor | Callable[[Tensor], Tensor] | None = None,
    shape: Sequence[int] | None = None,
    repeats: int = 1,
    noise: float | None = None,
    batched: bool = True,
    timeout: float | None = None,
    retries: int = 0,
    executor: Literal["thread", "process"] | Executor | None = None,
    workers: int | None = None,
    check: bool | Literal["reciprocity"] = True,
    writer: Callable[[EquilibriumReport], None] | None = None,
) -> Tensor:
    """Solve for an equilibrium with a black box, and give it the gradient that nudged equilibria measure.

    The free phase is solved now, the nudged phases in the backward pass. The gradient is exact, up to the order of the
    stencil, if the system is reciprocal: `dF/dz` is symmetric, or becomes so with the metric.

    The backward pass also tests whether `force` is the law of the system that `solve` solves, at the states it has.

    Args:
        solve: `solve(current) -> state`, the equilibrium `F(z, theta, x) + current = 0`. It knows `theta` and `x` by
            itself. The current is a detached tensor of the shape of the state, and zero in the free phase. The state
            is a tensor or an array. With `batched=False` it is `solve(current, row)`, for one row of the batch.
        force: The local force law `F(z, theta, x)`, differentiable in `theta` and `x`, in the units of the current. It
            is differentiated at the free state only. `f(z) - z` for a map `f`. With `check=False` it may be the part
            of the law that depends on what is trained.
        theta: The parameters: a tensor, or tensors in lists, tuples, dictionaries, dataclasses and modules, also those
            of torch (`ParameterList`, `ParameterDict`). They are handed to `force` as they are; a generator or a view
            of a dictionary as a list.
        x: The input, of any such form, or `None`.
        stencil: A [`Stencil`][torchdeq_ep.Stencil] with real nodes, or the name of one with `beta="auto"`:
            `"one-sided"`, `"symmetric"` or `"richardson"`. The automatic amplitude balances truncation and noise.
        scale: `"relative"` multiplies the amplitude by `|z*| / |M g|`, as elsewhere: right where force and state have
            the same units. `"response"` finds the amplitude at which the state moves by `beta |z*|`, in one to three
            more solves: for systems in physical units. `"absolute"` takes it as it is.
        metric: Positive diagonal `M` for which `(dF/dz) M` is symmetric, or a function of the free state to it.
        shape: Shape of the state. Without it, the free phase is solved with a zero that has no dimensions and
            broadcasts.
        repeats: How often each phase is solved. Answers are averaged; from two on there is a standard error.
        noise: Error of one solve relative to the state, in the norm, for `beta="auto"` and for the check: the
            resolution of a converter, the tolerance of a solver. By default it is measured from the repeats. If there
            are none it is the rounding error of the dtype of the current or of the answer, whichever is coarser: an
            answer in float64 may have been computed in float32. If it was not, say `noise=1e-15`.
        batched: Whether one call solves the whole batch.
        timeout: Seconds that a call may take. One that takes longer is abandoned in its thread, or killed with its
            process.
        retries: How often a call is repeated that raises, takes too long, or returns NaN or a wrong shape.
        executor: `"thread"` or `"process"` solves nudged phases concurrently; also an executor of your own.
        workers: Largest number of concurrent calls, by default the number of processors.
        check: Whether `F(z, theta, x) + current = 0` is tested in the backward pass at the free and the nudged states.
            It takes no more solves. `"reciprocity"` also tests, with two, whether the gradient of this system is that
            of equilibrium propagation.
        writer: Called with the [`EquilibriumReport`][torchdeq_ep.black_box.EquilibriumReport] of each backward pass.

    Returns:
        The free state, in the dtype and on the device of the first tensor in `theta`, with a gradient for whatever
        `force` depends on.

    Raises:
        InvalidOptionError: If an option is not acceptable.
        NotHolomorphicError: If the stencil has complex nodes.
        TransformError: If a transform of `torch.func` batches the system, traces it, or asks for its second derivative.
        SolverError: If the solver fails, here or in the backward pass, more often than `retries` allows:
            `SolverTimeoutError`, `SolverNonFiniteError` and `SolverShapeError` say how.
        MapContractError: If `force` does not return the shape of the state.
        LawMismatchError: In the backward pass, if `force` and `solve` differ by more than a tenth of the current beyond
            what noise explains: a wrong sign, other units, a current that is ignored, a solver that did not converge.
        MapChangedError: In the backward pass, if `theta` or `x` was written into after the free phase.
        NonFiniteError: In the backward pass, if the cotangent is not finite.

    Example:
        >>> stiffness = torch.tensor([2.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> load = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> def solve(current):  # knows no derivatives
        ...     return (load + current).numpy() / stiffness.detach().numpy()
        >>> z = attach_equilibrium(solve, lambda z, k, x: x - k * z, stiffness, load)
        >>> z.sum().backward()
        >>> stiffness.grad  # -load / stiffness^2
        tensor([-0.2500, -0.0625], dtype=torch.float64)

        A law of the wrong sign is refused:

        >>> z = attach_equilibrium(solve, lambda z, k, x: k * z - x, stiffness, load)
        >>> z.sum().backward()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torchdeq_ep.errors.LawMismatchError: ... Likeliest: force has the wrong sign. ...
    """
    refuse_tracing()
    if count_differentiating() > 1:
        raise TransformError(
            "a second derivative was asked of an equilibrium that a black box finds, and its nudges give the first. "
            "Leave out one of the transforms."
        )
    theta, x = kept(theta, "theta"), kept(x, "x")
    # Under a transform the solver and the checks have the numbers alone.
    numbers = [of_other_tensors(tree, plain) if is_transforming() else tree for tree in (theta, x)]
    system = System(
        Instrument(solve, batched, timeout, retries, executor, workers),
        force,
        numbers[0],
        numbers[1],
        stencil,
        scale,
        metric,
        repeats,
        noise,
        check,
        writer,
    )
    with outside_transforms():
        free = system.free_phase(None if shape is None else torch.Size(shape))
        like = system.like
        state = torch.stack(free.states).mean(0).to(like.device, like.dtype)
    if not (torch.is_grad_enabled() or may_have_tangents()):
        return state
    value = force(state, theta, x)
    require_shape(value, state)
    if not (value.requires_grad or may_have_tangents()):
        return state
    attached: Tensor = _Measured.apply(system, free, value, state)  # type: ignore[no-untyped-call]
    return attached


class _Measured(torch.autograd.Function):
    """The state as a function of the force at it: `dz = K^-1 dF`."""

    @staticmethod
    def forward(system: System, free: Measurement, value: Tensor, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.system, ctx.free, value, _ = inputs
        ctx.save_for_backward(value)
        ctx.save_for_forward(value)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, Tensor, None]:
        (value,) = ctx.saved_tensors
        return None, None, in_batch(lambda g: _answer(ctx.system, ctx.free, True, g, value), cotangents[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        (value,) = ctx.saved_tensors
        change = tangents[2]
        if change is None:
            return None
        # The derivative of the result is refused, so it need not be made of tangents.
        return in_batch(lambda h: _answer(ctx.system, ctx.free, False, h, without_tangent(value)), change)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, free: Measurement, value: Tensor, state: Tensor) -> Any:
        return plain(value), None  # where the force law brings in a batch that theta and x have not


def _answer(system: System, free: Measurement, adjoint: bool, force: Tensor, value: Tensor) -> Tensor:
    answer: Tensor = _Answer.apply(system, free, adjoint, force, value)  # type: ignore[no-untyped-call]
    return answer


class _Answer(torch.autograd.Function):
    """`K^-T g` or `K^-1 h`, of one force or a stack of them. `value` stands for what it depends on beside the force."""

    @staticmethod
    def forward(system: System, free: Measurement, adjoint: bool, force: Tensor, value: Tensor) -> Tensor:
        force = force.detach()
        is_stack = force.dim() > value.dim()
        forces = list(force) if is_stack else [force]
        if adjoint:
            answers = [system.error_vector(free, each) for each in forces]
        else:
            responses, _ = system.tangents(free, forces)
            answers = [torch.zeros_like(force[0] if is_stack else force)] * len(forces)
            answers = [a if r is None else r.displacement.to(a) for a, r in zip(answers, responses, strict=True)]
        return torch.stack(answers) if is_stack else answers[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        raise DoubleBackwardError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise DoubleBackwardError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, free: Measurement, adjoint: bool, *tensors: Tensor) -> Any:
        if in_dims[3] is None:
            raise TransformError("vmap batches a black box, which is one system. Call it in a loop.")
        force = tensors[0].movedim(in_dims[3], 0)
        if force.dim() - 1 > tensors[1].dim():  # a stack of stacks
            answers = [_answer(system, free, adjoint, each, tensors[1]) for each in force]
            return torch.stack(answers), 0
        return _answer(system, free, adjoint, force, tensors[1]), 0
