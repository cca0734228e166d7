"""Hooks that run at the fixed point of a torchdeq DEQ, once its solver has stopped.

They are forward hooks of the DEQ module, torch's own: order, removal and copies are torch's, and nothing in the DEQ is
replaced, so they do not interfere with the switching of its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from torchdeq.core import DEQBase

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.host.deqs import deqs_of, fixed_point

FixedPointHook = Callable[[Callable[[Any], Any], Any, DEQBase], object]


class FixedPointHandle:
    """What [`register_fixed_point_hook`][torchdeq_ep.host.register_fixed_point_hook] returns.

    `remove()` takes the hook off every DEQ, and so does the end of a `with` block.

    Args:
        deqs: The DEQs.
        hooks: A forward hook of torch for each of them; `register_fixed_point_hook` makes them.

    Example:
        >>> import torchdeq, torchdeq_ep
        >>> from torchdeq_ep.host.hooks import register_fixed_point_hook
        >>> with register_fixed_point_hook(torchdeq.get_deq(), lambda f, z_star, deq: None) as handle:
        ...     len(handle.deqs)
        1
    """

    def __init__(self, deqs: Sequence[DEQBase], hooks: Sequence[Callable[..., Any]]) -> None:
        self.deqs = tuple(deqs)
        """The DEQs that have the hook, in the order of `module.modules()`."""
        self._handles: list[RemovableHandle] = [
            deq.register_forward_hook(hook, with_kwargs=True) for deq, hook in zip(deqs, hooks, strict=True)
        ]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {len(self.deqs)} DEQ{'' if len(self.deqs) == 1 else 's'}>"

    def remove(self) -> None:
        """Take the hook off every DEQ; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> FixedPointHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def register_fixed_point_hook(module: nn.Module, hook: FixedPointHook, *, in_eval: bool = False) -> FixedPointHandle:
    """Call a function wherever the solver of a DEQ has stopped: at the equilibrium of every forward pass.

    The hook runs once a forward pass, also with `n_states` or `indexing`, after the states have been computed. It does
    not depend on the core of the DEQ, nor on its backward pass. The package itself calls `f` no further time. Several
    hooks run in the order they were registered. What a hook raises reaches the caller of the DEQ unchanged; what it
    returns is ignored.

    A copy or a pickle of the module keeps its hooks, as with every forward hook of torch: a module-level function
    pickles, a lambda does not.

    Args:
        module: A model that contains torchdeq DEQs, or such a DEQ.
        hook: Called as `hook(f, z_star, deq)`. `f` is the map the DEQ was given, with its parameters and inputs open to
            autograd. `z_star` is the last state the DEQ returned, detached: a tensor, or a list or tuple of tensors.
            `f` takes and returns that form. In training the state is one call of `f` past the one where the solver
            stopped (that is what torchdeq returns), in evaluation it is that one.
        in_eval: Whether the hook also runs in evaluation mode.

    Returns:
        A handle with `remove()`, which is also a context manager.

    Raises:
        NoDEQError: If there is no DEQ in the module.
        InvalidOptionError: If the hook cannot be called.

    Example:
        >>> import torch, torchdeq, torchdeq_ep
        >>> from torchdeq_ep.host.hooks import register_fixed_point_hook
        >>> deq = torchdeq.get_deq(f_tol=1e-6)
        >>> def show(f, z_star, deq):
        ...     print("residual below 1e-5:", bool((f(z_star) - z_star).norm() < 1e-5))
        >>> with register_fixed_point_hook(deq, show):
        ...     states, info = deq(lambda z: torch.cos(z), torch.zeros(1, 3))
        residual below 1e-5: True
    """
    if not callable(hook):
        raise InvalidOptionError(f"a fixed-point hook is called as hook(f, z_star, deq), but {hook!r} is not callable.")
    deqs = deqs_of(module)
    return FixedPointHandle(deqs, [_ForwardHook(hook, in_eval)] * len(deqs))


@dataclass(frozen=True, eq=False)
class _ForwardHook:
    hook: FixedPointHook
    in_eval: bool

    def __call__(self, deq: DEQBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if deq.training or self.in_eval:
            self.hook(*fixed_point(args, kwargs, output), deq)
