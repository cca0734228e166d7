"""What a measurement touches in a model, as it was: buffers, attributes, counters, generators of random numbers."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchdeq_ep.host import without_homeostasis

Restore = Callable[[], object]
Look = tuple[Restore | None, Iterable[Any]]
"""How to give an object its content back, if it can change; and what it holds."""

# Attributes of an object are followed where one of the model's own classes is of the same package: the user's. A
# writer, a trainer or a queue of a library changes by itself.
_LIBRARIES = {"builtins", "functools", "torch", "torchdeq", "torchdeq_ep"}
_LIBRARIES |= {"pytorch_lightning", "lightning", "lightning_fabric"}
_ATOMS = {type(None), bool, int, float, complex, str, bytes}
_PLAIN = (UserDict, UserList, SimpleNamespace)
# These set themselves up in their first call.
_DISTRIBUTED = ("torch.distributed", "torch.nn.parallel")
# Containers whose content is in memory. Others with the same methods may be files: emptying one would lose it.
_MAPPINGS: tuple[Any, ...] = (OrderedDict, dict)
_COLLECTIONS: tuple[Any, ...] = (list, set, deque)


@dataclass(frozen=True)
class Found:
    """What models, metrics and losses hold beside their parameters, and the random states, as they were found.

    Example:
        >>> counted = nn.Linear(2, 2)
        >>> counted.seen = [1]
        >>> found = Found.on(counted)
        >>> counted.seen.append(2)
        >>> found.restore()
        >>> counted.seen
        [1]
    """

    restores: tuple[Restore, ...]
    held: tuple[Any, ...]
    """All that was looked at: none of it may go, or another object would get its place in memory."""

    @classmethod
    def on(cls, *things: Any) -> Found:
        """Look at things and at what they hold.

        Args:
            *things: Modules, and objects of the user's own. Parameters are not copied, nor what shares their memory.
        """
        modules = [part for thing in things if isinstance(thing, nn.Module) for part in thing.modules()]
        own = frozenset(map(_package, (*things, *modules))) - _LIBRARIES
        parameters = frozenset(map(_address, (one for module in modules for one in module.parameters(False)))) - {0}
        known: dict[int, Any] = {}
        restores = [*_random_states()]
        todo = [*things]
        while todo:
            thing = todo.pop()
            if id(thing) in known:
                continue
            known[id(thing)] = thing
            restore, parts = _look_at(thing, own, parameters)
            todo.extend(parts)
            if restore is not None:
                restores.append(restore)
        return cls(tuple(restores), tuple(known.values()))

    def restore(self) -> None:
        """Give everything back what it held. This can be done over and over."""
        for restore in self.restores:
            restore()


@contextmanager
def left_as_found(*things: Any) -> Iterator[Found]:
    """A context at whose end a model and the random generators are what they were at its start.

    That is buffers, training mode and every other attribute of every submodule: tensors, arrays, numbers, containers,
    generators of random numbers, hooks, and objects of the user's own, such as the states of a metric of torchmetrics
    or a list of losses. What a function encloses is its author's, and stays; so do files. Homeostasis rests.

    Args:
        *things: The model, and what else may change with it, such as a loss that is a module. Parameters are taken not
            to change, and are not copied; everything else in memory is.

    Example:
        >>> counted = nn.Linear(2, 2)
        >>> counted.seen = [1]
        >>> with left_as_found(counted):
        ...     counted.seen.append(2)
        >>> counted.seen
        [1]
    """
    found = Found.on(*things)
    try:
        with without_homeostasis():
            yield found
    finally:
        found.restore()


def _random_states() -> Iterator[Restore]:
    yield partial(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    yield partial(random.setstate, random.getstate())
    yield partial(np.random.set_state, np.random.get_state())


def _package(thing: Any) -> str:
    return type(thing).__module__.partition(".")[0]


def _address(tensor: Tensor) -> int:
    """Where the memory of a tensor is; 0 where it has none that another tensor could share."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and not is_lazy(tensor)
    return tensor.untyped_storage().data_ptr() if plain else 0


def _look_at(thing: Any, own: frozenset[str], parameters: frozenset[int]) -> Look:
    """How to give an object its content back, and what else is to be looked at."""
    if type(thing) in _ATOMS or isinstance(thing, type):
        return None, ()
    if isinstance(thing, nn.Module):
        return _module(thing)
    if isinstance(thing, Tensor):
        return (None if _address(thing) in parameters else _tensor(thing)), ()
    if isinstance(thing, (tuple, frozenset)):
        return None, thing
    if isinstance(thing, partial):
        return None, (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, MethodType):
        return None, (thing.__self__,)
    restores = [_content(thing)]
    parts: list[Any] = []
    if isinstance(thing, (*_MAPPINGS, *_COLLECTIONS)):
        restore, parts = _container(thing)
        restores.append(restore)
    if isinstance(thing, _PLAIN) or _package(thing) in own:
        restore, inner = _attributes(thing)
        restores.append(restore)
        parts += inner
    return partial(_all, [restore for restore in restores if restore is not None]), parts


def _all(restores: Iterable[Restore]) -> None:
    for restore in restores:
        restore()


def _module(module: nn.Module) -> Look:
    held = [*module.children(), *module.buffers(recurse=False)]  # those of a scripted module are no attributes
    lazy = any(is_lazy(tensor) for tensor in (*module.parameters(False), *module.buffers(False)))
    if lazy or type(module).__module__.startswith(_DISTRIBUTED):  # the first call makes another module of it
        return None, held
    restore, inner = _attributes(module)
    return restore, [*inner, *held]


def _attributes(thing: Any) -> tuple[Restore, list[Any]]:
    """Those in the dictionary of an object and those in slots."""
    slots = [name for kind in type(thing).__mro__ for name in _slots(kind) if hasattr(thing, name)]
    in_slots = {name: getattr(thing, name) for name in slots}
    namespace: dict[str, Any] = getattr(thing, "__dict__", {})
    before = dict(namespace)

    def restore() -> None:
        if not _alike(namespace, before):
            for name in namespace.keys() - before.keys():
                del namespace[name]
            namespace.update(before)
        for name, value in in_slots.items():
            if getattr(thing, name, None) is not value:
                object.__setattr__(thing, name, value)

    return restore, [*before.values(), *in_slots.values()]


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else [*names]
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def _alike(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Whether these are the same objects, in the same order."""
    if not before:
        return not now
    return len(now) == len(before) and all(map(is_, now, before)) and all(map(is_, now.values(), before.values()))


def _container(thing: Any) -> tuple[Restore, list[Any]]:
    # By the methods of the plain type: those of a type derived from it may do more than hold.
    plain = next(kind for kind in (*_MAPPINGS, *_COLLECTIONS) if isinstance(thing, kind))
    if plain in _MAPPINGS:
        before = dict(plain.items(thing))

        def restore_mapping() -> None:
            if not _alike(thing, before):
                plain.clear(thing)
                plain.update(thing, before)

        return restore_mapping, [*before.keys(), *before.values()]
    entries = [*plain.__iter__(thing)]
    add = plain.update if plain is set else plain.extend

    def restore() -> None:
        if len(thing) != len(entries) or not all(map(is_, plain.__iter__(thing), entries)):
            plain.clear(thing)
            add(thing, entries)

    return restore, entries


def _content(thing: Any) -> Restore | None:
    """How to give its content back to what holds numbers: an array or a generator of random ones."""
    if isinstance(thing, np.ndarray):
        in_a_file = isinstance(thing, np.memmap) or not thing.flags.writeable
        return None if in_a_file else partial(np.copyto, thing, thing.copy())
    if isinstance(thing, (array, bytearray)):
        return partial(thing.__setitem__, slice(None), thing[:])
    if isinstance(thing, torch.Generator):
        return partial(thing.set_state, thing.get_state())
    if isinstance(thing, random.Random):
        return None if isinstance(thing, random.SystemRandom) else partial(thing.setstate, thing.getstate())
    if isinstance(thing, np.random.Generator):
        return partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
    if isinstance(thing, np.random.RandomState):
        return partial(thing.set_state, thing.get_state())
    return None


def _tensor(tensor: Tensor) -> Restore | None:
    if isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.is_meta or is_lazy(tensor):
        return None
    copy = tensor.detach().clone()
    if tensor.layout != torch.strided:
        return _sparse(tensor, copy)

    def restore() -> None:
        if tensor.shape != copy.shape:
            tensor.data = copy.clone()
        elif not torch.equal(tensor, copy):  # writing needlessly would invalidate graphs that saved it
            with torch.no_grad():
                tensor.copy_(copy)

    return restore


def _sparse(tensor: Tensor, copy: Tensor) -> Restore:
    version = tensor._version

    def restore() -> None:
        nonlocal version
        if tensor._version != version:  # nothing else tells: sparse tensors cannot be compared
            with torch.no_grad():
                tensor.copy_(copy)
            version = tensor._version

    return restore
