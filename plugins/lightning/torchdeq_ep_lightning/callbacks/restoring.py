"""What a measurement touches in a module, as it was before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchdeq_ep.extend import left_as_found

Restore = Callable[[], object]

# Parameters do not change, buffers are restored with the random state, submodules have their own turn; the trainer is
# no state of the module.
_ELSEWHERE = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric", "_jit_module")
# Attributes of objects are followed where the object is of a package that one of the module's own classes is of: the
# user's. A writer or a queue of a library changes by itself.
_LIBRARIES = ("torch", "pytorch_lightning", "lightning", "lightning_fabric", "torchdeq", "torchdeq_ep")


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """A context at whose end a module and the random generators are what they were at its start.

    Besides buffers that is every attribute of every submodule: tensors, numbers, containers, generators and objects of
    the user's own, such as the states of a metric of torchmetrics, or a list of losses.

    Args:
        module: The module.

    Example:
        >>> counted = nn.Linear(2, 2)
        >>> counted.seen = [1]
        >>> with as_it_was(counted):
        ...     counted.seen.append(2)
        >>> counted.seen
        [1]
    """
    own = {type(part).__module__.partition(".")[0] for part in module.modules()} - set(_LIBRARIES)
    memory = _Memory(frozenset(own))
    restores = [memory.attributes(part) for part in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with left_as_found(module):
            yield
    finally:
        for restore in restores:
            restore()
        random.setstate(python)
        np.random.set_state(numpy)


class _Memory:
    """What objects hold, each once.

    Args:
        packages: Whose objects are followed into their attributes.
    """

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages
        self._known: dict[int, Any] = {}

    def attributes(self, thing: Any) -> Restore:
        """How to give an object its attributes back."""
        namespace = vars(thing)
        before = {name: value for name, value in namespace.items() if name not in _ELSEWHERE}
        inner = self._all(before.values())

        def restore() -> None:
            for name in [name for name in namespace if name not in before and name not in _ELSEWHERE]:
                del namespace[name]
            namespace.update(before)
            inner()

        return restore

    def _all(self, values: Iterable[Any]) -> Restore:
        restores = [restore for value in values if (restore := self._content(value)) is not None]

        def restore_all() -> None:
            for restore in restores:
                restore()

        return restore_all

    def _content(self, value: Any) -> Restore | None:
        """How to give an object its content back; `None` for what cannot change, or is known."""
        if id(value) in self._known or isinstance(value, (nn.Module, nn.Parameter, type)):
            return None
        self._known[id(value)] = value  # held, so that no other gets its place
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray):
            return partial(np.copyto, value, value.copy())
        if isinstance(value, torch.Generator):
            return partial(value.set_state, value.get_state())
        if isinstance(value, random.Random):
            return partial(value.setstate, value.getstate())
        if isinstance(value, np.random.Generator):
            return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        if isinstance(value, (tuple, frozenset)):
            return self._all(value)
        if isinstance(value, (MutableMapping, MutableSequence, MutableSet)):
            return self._container(value)
        own = hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] in self._packages
        return self.attributes(value) if own else None

    def _container(self, value: Any) -> Restore:
        entries = _entries(value)
        inner = self._all(value.values() if isinstance(value, MutableMapping) else entries)

        def restore() -> None:
            now = _entries(value)
            if len(now) != len(entries) or not all(map(_alike, now, entries)):
                value.clear()
                if isinstance(value, MutableMapping):
                    for key, entry in entries:
                        value[key] = entry
                else:
                    add = value.append if isinstance(value, MutableSequence) else value.add
                    for entry in entries:
                        add(entry)
            inner()

        return restore


def _entries(value: Any) -> list[Any]:
    return list(value.items() if isinstance(value, MutableMapping) else value)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(_alike, one, other))
    return one is other


def _tensor(tensor: Tensor) -> Restore | None:
    if tensor.requires_grad or tensor.layout != torch.strided or tensor.is_meta:
        return None
    copy = tensor.detach().clone()

    def restore() -> None:
        # Writing needlessly would invalidate graphs that saved it.
        if tensor.shape != copy.shape:
            tensor.data = copy
        elif not torch.equal(tensor, copy):
            with torch.no_grad():
                tensor.copy_(copy)

    return restore
