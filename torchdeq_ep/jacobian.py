"""Products with the Jacobian `J = df/dz` of a map at a state, and the dense Jacobian of a small one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq_ep.errors import JacobianProductError
from torchdeq_ep.evaluation import Map

Product = Callable[[Tensor], Tensor]

_NO_PRODUCT = (
    "f has an operation without a forward-mode formula, and its backward cannot be differentiated either (a custom "
    "autograd.Function, or activation checkpointing), so there is no product J u. Use a mode without one: 'ift', or a "
    "stencil such as 'ep' without the asymmetric correction."
)


def vjp(f: Map, z: Tensor) -> Product:
    """The map `v -> J^T v` at `z`; `f` is evaluated once, now, and its graph is kept.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: Where to differentiate.

    Returns:
        A function from a tensor of the shape of `z` to another. It builds no graph.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> vjp(lambda z: matrix @ z, torch.zeros(2))(torch.tensor([1.0, 0.0]))
        tensor([0., 1.])
    """
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        value = f(point)

    def product(vector: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(vector)
        (result,) = torch.autograd.grad(value, point, vector, retain_graph=True, materialize_grads=True)
        return result

    return product


def jvp(f: Map, z: Tensor) -> Product:
    """The map `u -> J u` at `z`, by forward mode; by double backward where an operation has no forward formula.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: Where to differentiate.

    Returns:
        A function from a tensor of the shape of `z` to another. It builds no graph, and raises JacobianProductError if
        `f` can be differentiated in neither way.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> jvp(lambda z: matrix @ z, torch.zeros(2))(torch.tensor([0.0, 1.0]))
        tensor([1., 0.])
    """
    fallback: Product | None = None

    def product(vector: Tensor) -> Tensor:
        nonlocal fallback
        if fallback is None:
            try:
                return _forward_mode(f, z, vector)
            except (RuntimeError, NotImplementedError):
                fallback = _double_backward(f, z)
        return fallback(vector)

    return product


def _forward_mode(f: Map, z: Tensor, vector: Tensor) -> Tensor:
    with torch.no_grad():
        tangent: Tensor = torch.func.jvp(f, (z.detach(),), (vector,))[1]
    return tangent


def _double_backward(f: Map, z: Tensor) -> Product:
    # w -> J^T w is linear, so its own VJP with u is J u, whatever w. Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        point = z.detach().requires_grad_()
        value = f(point)
        dummy = torch.zeros_like(value, requires_grad=True)
        pulled = None
        if value.requires_grad:
            (pulled,) = torch.autograd.grad(value, point, dummy, create_graph=True, allow_unused=True)

    def product(vector: Tensor) -> Tensor:
        if pulled is None:  # f does not depend on z
            return torch.zeros_like(vector)
        (result,) = torch.autograd.grad(pulled, dummy, vector, retain_graph=True, materialize_grads=True)
        return result

    # A backward that cannot be differentiated may be left out in silence: only <w, J u> = <J^T w, u> shows it.
    generator = torch.Generator(z.device).manual_seed(0)
    u, w = (torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator) for _ in range(2))
    try:
        forward = float((w * product(u)).sum())
        adjoint = float((vjp(f, z)(w) * u).sum())
    except RuntimeError as error:
        raise JacobianProductError(_NO_PRODUCT) from error
    scale = float(w.norm() * product(u).norm()) + abs(adjoint)
    if abs(forward - adjoint) > torch.finfo(z.dtype).eps ** 0.5 * scale:
        raise JacobianProductError(_NO_PRODUCT)
    return product


def dense_jacobian(f: Map, z: Tensor, chunk_size: int = 64) -> Tensor:
    """All of `J` at `z`, row by row through VJPs.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: Where to differentiate; `n` entries in all.
        chunk_size: How many rows are computed at a time.

    Returns:
        Tensor of shape `(n, n)`: entry `(i, j)` is the derivative of entry `i` of `f` by entry `j` of `z`.

    Example:
        >>> import torch
        >>> dense_jacobian(lambda z: z**2, torch.tensor([1.0, 3.0]))
        tensor([[2., 0.],
                [0., 6.]])
    """
    product = vjp(f, z)
    basis = torch.eye(z.numel(), dtype=z.dtype, device=z.device)
    rows = []
    for chunk in torch.split(basis, chunk_size):
        vectors = chunk.reshape(-1, *z.shape)
        try:
            products = torch.vmap(product)(vectors)
        except (RuntimeError, NotImplementedError):
            products = torch.stack([product(vector) for vector in vectors])
        rows.append(products.reshape(len(chunk), -1))
    return torch.cat(rows)
