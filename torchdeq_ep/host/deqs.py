"""The DEQs of a model, and the equilibrium of a call of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchdeq.core import DEQBase

from torchdeq_ep.errors import NoDEQError
from torchdeq_ep.state import State


def deqs_of(module: nn.Module) -> list[DEQBase]:
    """The DEQs of a module whose backward can be switched.

    Args:
        module: A model, or a DEQ.

    Returns:
        At least one DEQ, in the order of `module.modules()`.

    Raises:
        NoDEQError: If there is none.

    Example:
        >>> import torch, torchdeq
        >>> len(deqs_of(torch.nn.ModuleList([torchdeq.get_deq(), torchdeq.get_deq()])))
        2
    """
    if not isinstance(module, nn.Module):
        raise NoDEQError(f"expected a torch.nn.Module that contains torchdeq DEQs, got {type(module).__name__}.")
    deqs = [part for part in module.modules() if isinstance(part, DEQBase)]
    for deq in deqs:
        if not isinstance(getattr(deq, "produce_grad", None), list):
            raise NoDEQError(
                f"{type(deq).__name__} has no list 'produce_grad' of gradient rules, so its backward cannot be "
                "switched. Derive it from DEQSliced or DEQIndexing, or call tep.attach(f, z_star) in its forward."
            )
    if not deqs:
        raise NoDEQError(
            f"there is no torchdeq DEQ inside {type(module).__name__}. Make one with torchdeq.get_deq(...) and store "
            "it as an attribute of the module. A layer written by hand names its backward itself, by tep.loop(f, z0, "
            "steps, backward), which compare and diagnose measure too, or by tep.attach(f, z_star, backward)."
        )
    return deqs


def fixed_point(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> tuple[Callable[[Any], Any], State]:
    """The map of a call of a DEQ, and its equilibrium, detached; both in the form that the DEQ returns.

    Args:
        args: Positional arguments of the call.
        kwargs: Its keyword arguments.
        output: What it returned: states and solver statistics.

    Returns:
        `f`, from a state to a state, and `z*`.
    """
    func = args[0] if args else kwargs["func"]
    state = output[0][-1]
    if isinstance(state, Tensor):
        return func, state.detach()
    detached = [tensor.detach() for tensor in state]
    if isinstance(state, tuple):
        return _SequenceMap(func, tuple), tuple(detached)
    return _SequenceMap(func, list), detached


@dataclass(frozen=True, eq=False)
class _SequenceMap:
    """A map of several tensors, `f(*state)`, as a map of one list or tuple of them."""

    func: Callable[..., Any]
    container: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    def __call__(self, state: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.container(self.func(*state))
