"""The free phase of a switched DEQ: with a state for every index asked for, and seen through by transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.closing import ClosedMap, close, is_transforming, refuse_tracing
from torchdeq_ep.compiling import not_compiled
from torchdeq_ep.linear_solve import in_front
from torchdeq_ep.state import Packing, State, undisturbed


@dataclass(frozen=True)
class FreePhase:
    """A solver of torchdeq as a switched DEQ calls it.

    torchdeq's solvers stop with the indices they have reached, and `DEQIndexing` then drops the gradient rules of the
    rest, the one of the equilibrium first. So as many trajectory states are returned as were asked for; those after
    convergence are the converged one.

    Under the transforms of `torch.func` the solver is given plain tensors. It decides by their values, which a batch of
    `vmap` does not have, and derivatives through its steps are not wanted.
    """

    solver: Callable[..., Any]
    completes: bool = False
    """Whether the DEQ has a rule for each state of the trajectory."""

    @not_compiled
    def __call__(self, func: Any, x0: Any, *args: Any, indexing: Sequence[int] | None = None, **kwargs: Any) -> Any:
        refuse_tracing()
        if is_transforming():
            return self._transformed(func, x0, args, {"indexing": indexing, **kwargs})
        if not self.completes:
            return self.solver(func, x0, *args, **({"indexing": indexing} if indexing else {}), **kwargs)
        state, trajectory, info = self.solver(func, x0, *args, indexing=indexing, **kwargs)
        missing = len(indexing or ()) - len(trajectory)
        return state, [*trajectory, *([state] * missing)], info

    def _transformed(self, func: Any, x0: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        packing = Packing.of(x0)
        start = packing.pack(x0, "z_init").detach()
        with undisturbed():
            _, closed = close(lambda z: packing.pack(func(packing.unpack(z))), start)
        call = _Call(partial(self, *args, **kwargs), func, packing, closed)
        state, *trajectory = _Solved.apply(call, start, *closed.originals)  # type: ignore[no-untyped-call]
        return packing.unpack(state), [packing.unpack(each) for each in trajectory], call.info[-1]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a solver: `phase(func, x0)` of plain tensors."""

    phase: Callable[..., Any]
    func: Callable[..., Any]
    packing: Packing
    closed: ClosedMap
    batched: Callable[..., Tensor] | None = None
    """The map of a stack of packed states, under `vmap`."""
    info: list[Any] = field(default_factory=list)

    def solve(self, start: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The packed equilibrium and trajectory."""
        plain, packing = [leaf.detach() for leaf in leaves], self.packing
        if self.batched is None:
            state, trajectory, info = self.phase(
                lambda z, **tau: replace(self.closed, f=partial(self.func, **tau))(z, *plain), packing.unpack(start)
            )
            found = [packing.pack(each) for each in (state, *trajectory)]
        else:  # each state of the stack is a row
            batched = self.batched
            state, trajectory, info = self.phase(lambda z, tau=1.0: torch.lerp(z, batched(z, *plain), tau), start)
            found = [state, *trajectory]
        self.info.append(info)
        return tuple(each.clone() for each in found)


class _Solved(torch.autograd.Function):
    """Solved where no transform sees it. It has no derivative: that is the node's."""

    @staticmethod
    def forward(call: _Call, start: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return call.solve(start, leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.outputs = len(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        nothing: tuple[None, ...] = (None,) * len(ctx.needs_input_grad)
        return nothing

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, ...]:
        nothing: tuple[None, ...] = (None,) * ctx.outputs
        return nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, start: Tensor, *leaves: Tensor) -> Any:
        batched = torch.vmap(call.batched or call.closed, in_dims=(0, *in_dims[2:]))
        stacked = replace(call, batched=batched)
        found = _Solved.apply(stacked, in_front(info, start, in_dims[1]), *leaves)  # type: ignore[no-untyped-call]
        return found, (0,) * len(found)
