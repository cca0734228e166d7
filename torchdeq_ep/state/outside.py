"""What a map takes from outside: the parameters and inputs of a closure that nobody names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torchdeq_ep.state.calls import Map


class Watch(TorchFunctionMode):
    """Notes every tensor that is used inside this context and was not made there.

    Args:
        state: What is handed in, and counts as made inside.
        is_wanted: Which of them to note, asked when one is first met.

    Example:
        >>> weight = torch.ones(2)
        >>> with Watch(z := torch.zeros(2)) as watch:
        ...     _ = (weight * z).sum()
        >>> [tensor is weight for tensor in watch.found.values()]
        [True]
    """

    def __init__(self, state: Tensor, is_wanted: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self._inside: dict[int, Tensor] = {id(state): state}
        self._is_wanted = is_wanted
        self.found: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and id(tensor) not in self._inside and self._is_wanted(tensor):
                self.found[id(tensor)] = tensor
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in self.found:
                self._inside[id(tensor)] = tensor  # kept, so that nothing else gets its number
        return result


def call_watched(f: Map, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A value of a map with its graph, and the tensors outside of it that the value depends on.

    An input that was computed from others is one of them, and what it was computed from is not, unless the map takes
    that as well.

    Args:
        f: The map.
        z: Its argument.

    Returns:
        The value, and the tensors.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> x = weight.exp()
        >>> _, outside = call_watched(lambda z: z + x, torch.zeros(2))
        >>> len(outside), outside[0] is x
        (1, True)
    """
    with torch.enable_grad(), Watch(z, lambda tensor: tensor.requires_grad) as watch:
        value = f(z)
    found = list(watch.found.values())
    ends = {tensor.grad_fn for tensor in found if tensor.grad_fn is not None} | {z.grad_fn}
    known = {id(tensor) for tensor in found}
    # What only functions with a backward of their own take is not seen from Python: its leaves are in the graph.
    waiting, seen = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None or node in ends:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known and leaf is not z:
            known.add(id(leaf))
            found.append(leaf)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return value, tuple(found)


def partial_gradients(
    value: Tensor, z: Tensor, outside: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """`(df/dz)^T v`, and the *partial* derivatives by what a map takes from outside.

    An outside tensor may be computed from another one. The gradient of the latter then stops at the former, which has
    its own.

    Args:
        value: `f(z)`.
        z: A leaf.
        outside: The tensors.
        cotangent: `v`.

    Returns:
        One tensor of the shape of `z`; one, or `None`, for each outside tensor.

    Example:
        >>> weight, z = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> x = 3 * weight
        >>> partial_gradients(weight * z + x, z, (weight, x), torch.ones(1))
        (tensor([1.]), [tensor([1.]), tensor([1.])])
    """
    caught: dict[int, Tensor] = {}

    def stop(number: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            caught[number] = gradient
            return torch.zeros_like(gradient)

        return hook

    with ExitStack() as hooked:
        for number, tensor in enumerate(outside):
            if tensor.grad_fn is not None:
                hooked.callback(tensor.register_hook(stop(number)).remove)  # type: ignore[no-untyped-call]
        gradients = torch.autograd.grad(value, (z, *outside), cotangent, retain_graph=True, allow_unused=True)
    first, *others = gradients
    pulled = torch.zeros_like(z) if first is None else first
    return pulled, [caught.get(number, gradient) for number, gradient in enumerate(others)]
