"""Tensors in the containers that parameters and inputs come in: what they are, and the same containers of others."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping, ValuesView
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError

_CONSTANTS = (numbers.Number, str, bytes, Enum, np.ndarray, np.generic, type(None))
"""What holds no tensors, and is handed on as it is."""


def kept(tree: Any, name: str) -> Any:
    """Parameters or inputs in a form that can be gone through more than once.

    Args:
        tree: As the user gave them.
        name: What they are called in messages.

    Returns:
        The same; a generator, or a view of a dictionary, as a list.

    Raises:
        InvalidOptionError: If there is anything in it that may hold tensors and is none of the known containers.

    Example:
        >>> import torch
        >>> kept(torch.nn.Linear(2, 1).parameters(), "theta")[1].shape
        torch.Size([1])
        >>> kept({"k": object()}, "theta")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torchdeq_ep.errors.InvalidOptionError: theta has an object in it, and tensors in there would not be seen. ...
    """
    if isinstance(tree, (Iterator, ValuesView)):
        tree = list(tree)
    for child in _children(tree, name):
        if isinstance(child, (Iterator, ValuesView)):
            raise InvalidOptionError(
                f"{name} has a {type(child).__name__} inside another container, which can be gone through only once. "
                "Make a list of it."
            )
        kept(child, name)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in such a container, in order: of a module its parameters, then its buffers.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in tensors_of({"layer": torch.nn.Linear(2, 1), "rate": 0.1})]
        [(1, 2), (1,)]
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, nn.Module) and not isinstance(tree, (nn.ParameterList, nn.ParameterDict)):
        return [*tree.parameters(), *tree.buffers()]
    return [leaf for child in _children(tree, "it") for leaf in tensors_of(child)]


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same container of results: lists and dictionaries for those of torch, a dictionary of names for a module.

    Example:
        >>> import torch
        >>> map_tensors(torch.nn.Linear(2, 1), lambda t: t.numel())
        {'weight': 2, 'bias': 1}
    """
    if isinstance(tree, nn.Module) and not isinstance(tree, (nn.ParameterList, nn.ParameterDict)):
        return {name: change(tensor) for name, tensor in (*tree.named_parameters(), *tree.named_buffers())}
    return _rebuilt(tree, lambda child: map_tensors(child, change), change)


def of_other_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A container to be used in the place of one: a module is copied, with every tensor changed in place.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(2, 1)
        >>> other = of_other_tensors(linear, lambda t: t.detach().requires_grad_())
        >>> type(other).__name__, other.weight is linear.weight
        ('Linear', False)
    """
    if isinstance(tree, nn.Module):
        other = copy.deepcopy(tree)
        for module, twin in zip(tree.modules(), other.modules(), strict=True):
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    twin._parameters[name] = change(tensor)  # type: ignore[assignment]
        return other
    return _rebuilt(tree, lambda child: of_other_tensors(child, change), change)


def _rebuilt(tree: Any, again: Callable[[Any], Any], change: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (Mapping, nn.ParameterDict)):
        return {name: again(child) for name, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(again(child) for child in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(again(child) for child in tree)
    if isinstance(tree, nn.ParameterList):
        return [again(child) for child in tree]
    if is_dataclass(tree) and not isinstance(tree, type):
        other = copy.copy(tree)
        for each in fields(tree):
            object.__setattr__(other, each.name, again(getattr(tree, each.name)))
        return other
    return tree


def _children(tree: Any, name: str) -> list[Any]:
    if isinstance(tree, (Mapping, nn.ParameterDict)):
        return list(tree.values())
    if isinstance(tree, (list, tuple, nn.ParameterList)):
        return list(tree)
    if isinstance(tree, (Tensor, nn.Module)) or (isinstance(tree, _CONSTANTS) and not _holds_objects(tree)):
        return []
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, each.name) for each in fields(tree)]
    article = "an" if type(tree).__name__[0].lower() in "aeiou" else "a"
    raise InvalidOptionError(
        f"{name} has {article} {type(tree).__name__} in it, and tensors in there would not be seen. Give tensors, or "
        "lists, tuples, dictionaries, dataclasses or modules of them, and let solve and force refer to the rest."
    )


def _holds_objects(tree: Any) -> bool:
    return isinstance(tree, np.ndarray) and tree.dtype.hasobject
