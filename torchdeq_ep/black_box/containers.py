"""Training a system whose solver is a black box: gradients from free and nudged equilibria and the local force law.

An equilibrium `z*` satisfies `F(z*, theta, x) = 0`. A simulator, or an instrument, finds it, and finds it again under
an added force, `F(z_b, theta, x) + b g = 0`. With `K = -dF/dz` at `z*` the displacement `(z_b - z*) / b` tends to
`K^-1 g`. The gradient wants `v = K^-T g`, the same vector where `K` is symmetric: in every system whose force has an
energy. Then

    dL/dtheta = (dF/dtheta)^T v,    dL/dx = (dF/dx)^T v,

one VJP of the force law at one state; nothing goes through the solver (Scellier & Bengio 2017, arXiv 1602.05179;
Kendall et al. 2020, arXiv 2006.01981, for circuits). With a positive diagonal `M` that makes `(dF/dz) M` symmetric, the
force is `b M g` and `v = M^-1 K^-1 M g`.
"""

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
