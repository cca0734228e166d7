"""Tensors in nested lists, tuples and dictionaries: the forms that parameters and inputs may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for child in children for leaf in tensors_of(child)]


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting with every tensor changed; anything else is kept."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: map_tensors(child, change) for name, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(child, change) for child in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(child, change) for child in tree)
    return tree
