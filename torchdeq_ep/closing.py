"""A map with everything it uses made explicit, so that the transforms of `torch.func` see through its closure.

A transform wraps the tensors that it follows. An implicit layer calls its map again, where these wrappers mean nothing:
inside the rules of its autograd node, and after `torch.func.functional_call` has put the parameters back. So the first
evaluation notes which tensors the map uses beside its state; every later one is given other tensors in their place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from torchdeq_ep.errors import EPError, TransformError
from torchdeq_ep.state import Map
from torchdeq_ep.state.outside import Watch

_Slot = tuple[dict[str, Any], str, Tensor]


def is_transforming() -> bool:
    """Whether a transform of `torch.func` (or a vectorised pass of autograd) is running.

    Example:
        >>> is_transforming(), torch.func.vmap(lambda x: x * is_transforming())(torch.ones(2))
        (False, tensor([1., 1.]))
    """
    return bool(torch._C._are_functorch_transforms_active())


def is_in_batch(cotangent: Tensor) -> bool:
    """Whether a cotangent is one of a batch, that of `torch.func` or that of `is_grads_batched`."""
    return is_transforming() or bool(torch._C._functorch.is_legacy_batchedtensor(cotangent))


def may_have_tangents() -> bool:
    """Whether tensors may carry tangents: in a `dual_level`, or in a transform of `torch.func`."""
    return forward_ad._current_level >= 0 or is_transforming()


@contextmanager
def outside_transforms() -> Iterator[None]:
    """A context that no running transform of `torch.func` sees into; tensors in it are to be plain ones."""
    with temporarily_clear_interpreter_stack() if is_transforming() else nullcontext():
        yield


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent of `torch.autograd.forward_ad`.

    Example:
        >>> with forward_ad.dual_level():
        ...     has_tangent(forward_ad.make_dual(torch.ones(1), torch.ones(1))), has_tangent(torch.ones(1))
        (True, False)
    """
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def without_tangent(tensor: Tensor) -> Tensor:
    """A tensor without the tangent of the innermost transform."""
    primal: Tensor = forward_ad.unpack_dual(tensor).primal  # type: ignore[no-untyped-call]
    return primal


def is_followed(tensor: Tensor) -> bool:
    """Whether a forward derivative, or any of the running transforms, differentiates by what a tensor depends on."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad or has_tangent(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return has_tangent(tensor)


def plain(tensor: Tensor) -> Tensor:
    """The values of a tensor that transforms follow, without what they make of it.

    Raises:
        TransformError: If it is batched, and so has more values than one tensor.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            raise TransformError(
                "vmap batches what a black box depends on, and that is one system with one set of numbers. Call it in "
                "a loop, or let the solver take a batch: x with a first dimension, batched=True."
            )
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach()


def count_differentiating() -> int:
    """How many of the running transforms differentiate: `grad`, `vjp`, `jvp` and what is made of them.

    Example:
        >>> count_differentiating(), torch.func.grad(lambda x: x * count_differentiating())(torch.ones(()))
        (0, tensor(1.))
    """
    kinds = torch._C._functorch.TransformType
    stack = (torch._C._functorch.get_interpreter_stack() or ()) if is_transforming() else ()
    return sum(level.key() in (kinds.Grad, kinds.Jvp) for level in stack)


def is_differentiable(tensor: Tensor) -> bool:
    """Whether there are derivatives by a tensor of its dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(frozen=True, eq=False)
class ClosedMap:
    """`f(z)` as a function `f(z, *leaves)` of all that it depends on.

    Args:
        f: The map.
        originals: What it uses beside its state, as the objects that it finds.
        slots: Places in modules where such objects were, by `functional_call`, and may be no longer.

    Example:
        >>> weight = torch.full((2,), 0.5, requires_grad=True)
        >>> value, closed = close(lambda z: weight * z, torch.ones(2))
        >>> len(closed.originals), closed(torch.ones(2), torch.full((2,), 3.0))
        (1, tensor([3., 3.]))
    """

    f: Map
    originals: tuple[Tensor, ...]
    slots: tuple[_Slot, ...] = ()

    def __call__(self, z: Tensor, *leaves: Tensor) -> Tensor:
        with self._as_it_was(), _Substituted(self.originals, leaves) as substituted:
            value = self.f(z)
        if len(substituted.used) < len(self.originals):
            raise TransformError(
                f"f used {len(self.originals)} tensors in the forward pass, and {len(substituted.used)} of them when "
                "it was called again, so a derivative would miss the others. Likeliest: torch.func.functional_call has "
                "put parameters back, and f holds its module where it is not found. Give f as a function or module "
                "that refers to that module, or hand it the parameters. A custom autograd.Function in f must be given "
                "results of torch operations, not parameters themselves."
            )
        return value

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        moved = [(place, name, place[name]) for place, name, tensor in self.slots if place[name] is not tensor]
        try:
            for place, name, tensor in self.slots:
                place[name] = tensor
            yield
        finally:
            for place, name, tensor in moved:
                place[name] = tensor


def close(f: Map, z: Tensor) -> tuple[Tensor, ClosedMap]:
    """Evaluate a map, and note what it uses beside its state that a derivative or a batch may run through.

    Args:
        f: The map; it may refer to tensors and modules in any way.
        z: Its state.

    Returns:
        `f(z)`, and the closed map.

    Raises:
        TransformError: If `f` cannot be evaluated under the transforms.
    """
    refuse_tracing()
    with Watch(z) as watch, named_failures():
        value = f(z)
    originals = tuple(tensor for tensor in watch.found.values() if _is_seen(tensor))
    return value, ClosedMap(f, originals, tuple(_slots(f, watch.found)))


@contextmanager
def named_failures() -> Iterator[None]:
    """A context for calls of `f` that a transform has to do with: errors of PyTorch's in it become a TransformError."""
    try:
        yield
    except (EPError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise TransformError(f"f cannot be evaluated under the transforms of torch.func: {error}") from error


def refuse_tracing() -> None:
    """Raise TransformError where operations are traced: what is measured has no value there."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise TransformError(
            "an equilibrium cannot be traced (torch.func.linearize, make_fx): its solves decide by what they measure. "
            "Use torch.func.jvp, or jacfwd."
        )


class _Substituted(TorchFunctionMode):
    """Puts other tensors in the place of some."""

    def __init__(self, originals: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self._leaves = {id(original): leaf for original, leaf in zip(originals, leaves, strict=True)}
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            leaf = self._leaves.get(id(tree))
            if leaf is None:
                return tree
            self.used.add(id(tree))
            return leaf
        if isinstance(tree, dict):
            return {name: self._replaced(child) for name, child in tree.items()}
        if type(tree) in (list, tuple):
            return type(tree)(self._replaced(child) for child in tree)
        return tree


def _is_seen(tensor: Tensor) -> bool:
    return tensor.requires_grad or bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor)) or has_tangent(tensor)


def _slots(f: Any, known: Mapping[int, Tensor]) -> Iterator[_Slot]:
    """Where the modules that a function refers to hold tensors that it uses."""
    for module in _modules_of(f):
        for part in module.modules():
            for place in (part._parameters, part._buffers):
                for name, tensor in place.items():
                    if tensor is not None and id(tensor) in known:
                        yield place, name, tensor


def _modules_of(f: Any) -> list[nn.Module]:
    """The modules that a function refers to, as far as that can be read off it."""
    modules: list[nn.Module] = []
    waiting, seen = [f], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            modules.append(item)
        elif isinstance(item, (type, ModuleType, Tensor)) or _is_of_torch(item):
            continue
        elif isinstance(item, FunctionType):
            waiting += _referred_to(item)
        elif inspect.ismethod(item):
            waiting += [item.__self__, item.__func__]
        elif isinstance(item, functools.partial):
            waiting += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        else:
            waiting += getattr(item, "__dict__", {}).values()
    return modules


def _is_of_torch(item: Any) -> bool:
    home = getattr(item, "__module__", None) or ""
    return home == "torch" or home.startswith("torch.")


def _referred_to(function: FunctionType) -> list[Any]:
    codes: list[CodeType] = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    named = {name for code in codes for name in code.co_names}
    found = [function.__globals__[name] for name in named if name in function.__globals__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return [*found, *(function.__defaults__ or ())]
