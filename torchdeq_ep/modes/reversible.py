"""The backward of reversible DEQs: the steps of their solver, run backwards and differentiated one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import MissingHistoryError, ReconstructionWarning
from torchdeq_ep.modes.steps import Path, StepwiseMode
from torchdeq_ep.relaxation.kept import Need
from torchdeq_ep.relaxation.reversing import ReversibleRun, rounding_of, undo
from torchdeq_ep.state import Autocast, FrozenStatistics, Map, Memory, norm
from torchdeq_ep.state.outside import call_watched, partial_gradients

LARGEST_ERROR = 1e-3
"""A start that is reconstructed less well is warned about: the gradient is off by about as much."""


@dataclass(frozen=True)
class Reversible(StepwiseMode):
    """The exact gradient of the steps of the solver `"reversible"`, with memory that does not grow with their number.

    The states are reconstructed from the last ones, so that only two are kept, in double precision (McCallum et al.
    2025, arXiv 2509.12917). The error of the reconstruction is measured in every pass, since the first state is known:
    it is the `residual` of the report, and a warning where it is above 0.001. It is about `eps (1 - beta)^-N` after `N`
    steps, with the `eps` of double precision as long as it stays below that of the map.

    Example:
        >>> import torchdeq, torchdeq_ep as tep
        >>> deq, weight = torchdeq.get_deq(f_solver="reversible"), torch.nn.Parameter(torch.tensor(0.5))
        >>> with tep.use_backward(deq, "reversible"):
        ...     (z,), info = deq(lambda z: weight * z + 1, torch.zeros(1, 1))
        >>> z.sum().backward()
        >>> weight.grad.round(decimals=1)
        tensor(4.)
    """

    @property
    def needs(self) -> Need | None:
        return "reversible"

    def follow(self, path: Path) -> Tensor:
        run = path.history
        if not isinstance(run, ReversibleRun):
            raise MissingHistoryError(
                "'reversible' runs the steps of the solver 'reversible' backwards, and another solver was used: choose "
                "torchdeq.get_deq(f_solver='reversible') with tep.use_backward, or tep.loop(..., solver='reversible')."
            )
        # One call tells what the map takes from outside; its graph goes at once.
        outside = call_watched(path.f, path.z.detach().requires_grad_())[1]
        autocast = Autocast.current(path.z.device.type)
        end: Tensor = _Reversed.apply(path.f, run, autocast, path.memory, run.start, *outside)  # type: ignore[no-untyped-call]
        return path.f(end)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Map, run: ReversibleRun, autocast: Autocast, memory: Memory, start: Tensor, *outside: Tensor
    ) -> Tensor:
        ctx.f, ctx.run, ctx.autocast, ctx.memory, ctx.outside = f, run, autocast, memory, outside
        return run.z.to(start.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        run: ReversibleRun = ctx.run
        with FrozenStatistics(), ctx.autocast.restored(True):
            of_start, gradients = _run_back(ctx.f, run, ctx.outside, cotangent)
        if not run.error <= LARGEST_ERROR:
            _speak_up(run, ctx.memory)
        return None, None, None, None, of_start, *gradients


def _run_back(
    f: Map, run: ReversibleRun, outside: tuple[Tensor, ...], cotangent: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the start and of what the map takes from outside."""
    y, z, beta = run.y, run.z, run.beta
    of_y, of_z = torch.zeros_like(cotangent), cotangent
    total: list[Tensor | None] = [None] * len(outside)

    def through(state: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """`f` at a state, and `beta J^T v` there."""
        point = state.detach().to(cotangent.dtype).requires_grad_()
        with torch.enable_grad():
            value = f(point)
        pulled, found = partial_gradients(value, point, outside, beta * vector)
        for k, gradient in enumerate(found):
            if gradient is not None:
                so_far = total[k]
                total[k] = gradient if so_far is None else so_far + gradient
        return value.detach().to(state.dtype), pulled

    for _step in range(run.steps):
        value, pulled = through(y, of_z)
        z = undo(z, value, beta)
        of_y, of_z = of_y + pulled, (1 - beta) * of_z
        value, pulled = through(z, of_y)
        y = undo(y, value, beta)
        of_z, of_y = of_z + pulled, (1 - beta) * of_y
    scale = max(norm(run.start.detach()), norm(run.z)) or 1.0
    run.error = norm(z - run.start.detach().to(z.dtype)) / scale
    return of_y + of_z, total


def _speak_up(run: ReversibleRun, memory: Memory) -> None:
    finding = (
        f"the first state of {run.steps} reversible steps was reconstructed with a relative error of {run.error:.1e}, "
        "and the gradient is off by about as much"
    )
    advice = (
        f"Rounding grows by 1 / (1 - beta) = {1 / (1 - run.beta):.3g} a step, to about {rounding_of(run):.0e} here: "
        "take fewer steps (f_max_iter), or a smaller beta."
    )
    memory.warn(ReconstructionWarning, "reconstruction", finding, lambda: advice, run.error)
