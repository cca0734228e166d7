"""Products with the Jacobian `J = df/dz` of a map at a state and with its transpose, and all of a small one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq_ep._options import check_count
from torchdeq_ep.errors import JacobianProductError
from torchdeq_ep.relaxation import Product as Product
from torchdeq_ep.state import Map, Packing, State, forward_derivative, row_dots

_NO_PRODUCT = (
    "f contains an operation that can be differentiated only once (a custom autograd.Function, probably with "
    "@once_differentiable, or torch.utils.checkpoint with use_reentrant=True: say False there), so there is no product "
    "J u with its Jacobian. Write its backward with differentiable operations, or use a mode without such products: "
    "'ift', or a stencil such as 'ep' without the asymmetric correction."
)
_REENTRANT = (
    "f runs under torch.utils.checkpoint with use_reentrant=True, which gives no product J^T v with its Jacobian. Say "
    "use_reentrant=False in that call of checkpoint, as PyTorch recommends."
)
_ADJOINT_DEFECT = 0.05
"""Largest difference between `v . J u` and `J^T v . u`, relative to `|J u|`, that low precision inside `f` explains."""


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
        try:
            (result,) = torch.autograd.grad(value, point, vector, retain_graph=True, materialize_grads=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise JacobianProductError(_REENTRANT) from error
            raise
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
    fallback: Linearization | None = None

    def product(vector: Tensor) -> Tensor:
        nonlocal fallback
        if fallback is None:
            try:
                return _forward_mode(f, z, vector)
            except (RuntimeError, NotImplementedError):
                fallback = Linearization(f, z)
                probes = gaussian_probes(z, 2, torch.Generator(z.device).manual_seed(0))
                fallback.both(probes[:1], probes[1:])
        return fallback.forward(vector.unsqueeze(0))[0]

    return product


def products(f: Map, z: Tensor) -> tuple[Product, Product]:
    """The maps `u -> J u` and `v -> J^T v` at `z`, the cheap way.

    Both from one graph of `f`, by [`Linearization`][torchdeq_ep.jacobian.Linearization], whose product with `J` costs a
    fraction of forward mode; where the backward of `f` cannot be differentiated, by forward mode.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: Where to differentiate.

    Returns:
        Two functions from a tensor of the shape of `z` to another. They build no graph.

    Raises:
        JacobianProductError: By the first function, if `f` can be differentiated in neither way.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> forward, adjoint = products(lambda z: matrix @ z, torch.zeros(2))
        >>> forward(torch.tensor([0.0, 1.0])), adjoint(torch.tensor([1.0, 0.0]))
        (tensor([1., 0.]), tensor([0., 1.]))
    """
    local = Linearization(f, z, batched=False)
    probes = gaussian_probes(z, 2, torch.Generator(z.device).manual_seed(0))
    try:
        local.both(probes[:1], probes[1:])
    except JacobianProductError:
        return jvp(f, z), vjp(f, z)
    return (lambda u: local.forward(u.unsqueeze(0))[0]), (lambda v: local.adjoint(v.unsqueeze(0))[0])


def _forward_mode(f: Map, z: Tensor, vector: Tensor) -> Tensor:
    tangent = forward_derivative(f, z, vector)
    return tangent.to(vector.dtype)  # torch widens that of a 0-dimensional tensor times a number


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
    with sdpa_kernel(SDPBackend.MATH):  # vmap is slow through the fused attention kernels, and says so
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


class Linearization:
    """`f` near one state: stacks of products with `J` and with `J^T`, all from one evaluation of `f`.

    Both come from reverse mode, the product with `J` by differentiating `w -> J^T w`, which is linear. Nothing needs a
    forward-mode formula, and `J` and `J^T` are those of the same value of `f` to the last bit. A stack is one batched
    call where `vmap` allows it and a loop where it does not.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: Where to differentiate.
        batched: Whether to try `vmap`.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> local = Linearization(lambda z: matrix @ z, torch.zeros(2))
        >>> local.forward(torch.eye(2))
        tensor([[0., 0.],
                [1., 0.]])
        >>> local.adjoint(torch.eye(2))
        tensor([[0., 1.],
                [0., 0.]])
    """

    def __init__(self, f: Map, z: Tensor, batched: bool = True) -> None:
        self.batched = batched
        """Whether stacks are evaluated by `vmap`; false from its first failure on."""
        # The fused attention kernels have no second derivative; the plain one has.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._point = z.detach().clone().requires_grad_()
            self._value = f(self._point)
        self._cotangent: Tensor | None = None
        self._pulled: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether the value of `f` depends on the state, or on anything else that is differentiated."""
        return self._value.requires_grad

    def both(self, right: Tensor, left: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """`J v` for every `v` of one stack and `J^T v` for every `v` of another, checked against one another.

        Args:
            right: The first stack, of shape `(K, *shape)`.
            left: The second, of the same shape.
            create_graph: Whether the products with `J^T` can be differentiated by the parameters of `f`.

        Returns:
            Two stacks.

        Raises:
            JacobianProductError: If an operation in `f` cannot be differentiated twice.
        """
        forward, adjoint = self.forward(right), self.adjoint(left, create_graph)
        self._require_adjoint(right, forward, left, adjoint.detach())
        return forward, adjoint

    def adjoint(self, vectors: Tensor, create_graph: bool = False, batched: bool | None = None) -> Tensor:
        """`J^T v` for every `v` of a stack of shape `(K, *shape)`.

        Args:
            vectors: The stack.
            create_graph: Whether the result can be differentiated by the parameters of `f`.
            batched: Whether it is one batched call, which may fail, or a loop; by default whichever works.

        Returns:
            A stack of the same shape.
        """
        return self._products(self._value, self._point, vectors, create_graph, batched)

    def forward(self, vectors: Tensor) -> Tensor:
        """`J v` for every `v` of a stack; it builds no graph.

        An operation that cannot be differentiated twice may be left out in silence; `both` notices it.

        Args:
            vectors: A stack of shape `(K, *shape)`.

        Returns:
            A stack of the same shape.

        Raises:
            JacobianProductError: If an operation in `f` says that it cannot be differentiated twice.
        """
        if not self._value.requires_grad:
            return torch.zeros_like(vectors)
        try:
            if self._cotangent is None:
                self._cotangent = torch.zeros_like(self._value, requires_grad=True)
                with torch.enable_grad():
                    (self._pulled,) = torch.autograd.grad(
                        self._value, self._point, self._cotangent, create_graph=True, allow_unused=True
                    )
            return self._products(self._pulled, self._cotangent, vectors, create_graph=False)
        except RuntimeError as error:
            raise JacobianProductError(_NO_PRODUCT) from error

    def _products(
        self,
        output: Tensor | None,
        source: Tensor,
        vectors: Tensor,
        create_graph: bool,
        batched: bool | None = None,
    ) -> Tensor:
        if output is None or not output.requires_grad:
            return torch.zeros_like(vectors)

        def gradient(vector: Tensor, batched: bool) -> Tensor:
            (result,) = torch.autograd.grad(
                output,
                source,
                vector,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
            return torch.zeros_like(vector) if result is None else result

        if (self.batched if batched is None else batched) and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # still right, only slower
                    return gradient(vectors, batched=True)
            except Exception:  # whatever vmap cannot do; the loop raises again what is an error of f itself
                if batched:
                    raise
                self.batched = False
        return torch.stack([gradient(vector, batched=False) for vector in vectors])

    def _require_adjoint(self, right: Tensor, forward: Tensor, left: Tensor, adjoint: Tensor) -> None:
        # An operation that was written to be differentiated once is left out of the product with J, silently.
        defect = row_dots(left, forward) - row_dots(adjoint, right)
        size = row_dots(forward, forward).sqrt()
        rounding = 100 * torch.finfo(left.dtype).eps * row_dots(left, left).sqrt()
        if bool((defect.abs() > (_ADJOINT_DEFECT + rounding) * size).any()):
            raise JacobianProductError(_NO_PRODUCT)


def gaussian_probes(z: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """A stack of standard normal tensors of the shape of `z`.

    Args:
        z: Gives shape, dtype and device.
        probes: How many.
        generator: Draws them; torch's own where it is `None`.

    Returns:
        Tensor of shape `(probes, *z.shape)`.

    Raises:
        InvalidOptionError: If `probes` is not a positive whole number.

    Example:
        >>> gaussian_probes(torch.zeros(3, 4), 5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 4])
    """
    check_count("probes", probes)
    return torch.randn(probes, *z.shape, generator=generator, dtype=z.dtype, device=z.device)


def packed_map(f: Callable[..., Any], z: State) -> tuple[Map, Tensor]:
    """`f` as a map of packed states, and the packed state."""
    packing = Packing.of(z)
    return packing.map(f), packing.pack(z, "z").detach()
