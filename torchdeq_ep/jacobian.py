"""Products with the Jacobian `J = df/dz` of a map at a state, measures of it, and the dense Jacobian of a small one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq_ep.equilibrium import Packing, State, norm
from torchdeq_ep.errors import ConvergenceWarning, InvalidOptionError, JacobianProductError
from torchdeq_ep.evaluation import Map, undisturbed

Product = Callable[[Tensor], Tensor]

_NO_PRODUCT = (
    "f contains an operation that can be differentiated only once (a custom autograd.Function, probably with "
    "@once_differentiable, or activation checkpointing), so there is no product J u with its Jacobian. Write its "
    "backward with differentiable operations, or use a mode without such products: 'ift', or a stencil such as 'ep' "
    "without the asymmetric correction."
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
    with torch.no_grad():
        tangent: Tensor = torch.func.jvp(f, (z.detach(),), (vector,))[1]
    return tangent


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

    def adjoint(self, vectors: Tensor, create_graph: bool = False) -> Tensor:
        """`J^T v` for every `v` of a stack of shape `(K, *shape)`.

        Args:
            vectors: The stack.
            create_graph: Whether the result can be differentiated by the parameters of `f`.

        Returns:
            A stack of the same shape.
        """
        return self._products(self._value, self._point, vectors, create_graph)

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

    def _products(self, output: Tensor | None, source: Tensor, vectors: Tensor, create_graph: bool) -> Tensor:
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

        if self.batched and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # still right, only slower
                    return gradient(vectors, batched=True)
            except Exception:  # whatever vmap cannot do; the loop raises again what is an error of f itself
                self.batched = False
        return torch.stack([gradient(vector, batched=False) for vector in vectors])

    def _require_adjoint(self, right: Tensor, forward: Tensor, left: Tensor, adjoint: Tensor) -> None:
        # An operation that was written to be differentiated once is left out of the product with J, silently.
        defect = _dots(left, forward) - _dots(adjoint, right)
        size = _dots(forward, forward).sqrt()
        rounding = 100 * torch.finfo(left.dtype).eps * _dots(left, left).sqrt()
        if bool((defect.abs() > (_ADJOINT_DEFECT + rounding) * size).any()):
            raise JacobianProductError(_NO_PRODUCT)


def spectral_radius(
    f: Callable[..., Any],
    z: State,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> float:
    """The largest modulus of an eigenvalue of `J`: below 1 where plain iteration of `f` converges.

    By Arnoldi's method, which finds complex pairs as well as real eigenvalues, and takes fewer products than power
    iteration.

    Args:
        f: The map: a tensor to a tensor of the same shape, or several to several.
        z: The state: a tensor of any shape, or a tuple or list of tensors.
        max_iter: Largest number of products with `J`, and of vectors of the size of the state kept.
        tol: Residual of the eigenpair, relative to the eigenvalue, at which to stop.
        generator: Draws the first vector.

    Returns:
        The spectral radius.

    Raises:
        MapContractError: If `f` changes shape or dtype.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -0.9], [0.9, 0.0]])  # eigenvalues 0.9i and -0.9i
        >>> round(spectral_radius(lambda z: turn @ z, torch.zeros(2)), 4)
        0.9
    """
    packed, point = _packed(f, z)
    with undisturbed():
        values = _ritz_values(jvp(packed, point), point, _largest_modulus, max_iter, tol, generator)
    return max(abs(value) for value in values)


@dataclass(frozen=True)
class FieldOfValues:
    """A box around the field of values `x^H J x / x^H x` of a Jacobian, each side of which it touches.

    Args:
        real_min: Smallest real part: the smallest eigenvalue of `(J + J^T) / 2`.
        real_max: Largest real part. Below 1, the continuous-time dynamics `dz/dt = f(z) - z` contracts.
        imag_max: Largest imaginary part: the largest modulus of an eigenvalue of `(J - J^T) / 2`. Zero for symmetric
            `J`.

    Example:
        >>> turn = torch.tensor([[0.3, -0.4], [0.4, 0.3]])
        >>> box = field_of_values(lambda z: turn @ z, torch.zeros(2))
        >>> round(box.real_max, 3), round(box.imag_max, 3)
        (0.3, 0.4)
    """

    real_min: float
    real_max: float
    imag_max: float


def field_of_values(
    f: Callable[..., Any],
    z: State,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> FieldOfValues:
    """The extent of the field of values of `J`, which bounds what its eigenvalues do not when `J` is not normal.

    Args:
        f: The map: a tensor to a tensor of the same shape, or several to several.
        z: The state: a tensor of any shape, or a tuple or list of tensors.
        max_iter: Largest number of products with the symmetric and with the antisymmetric part.
        tol: Residual of the eigenpairs, relative to the largest, at which to stop.
        generator: Draws the first vectors.

    Returns:
        The box around it.

    Raises:
        MapContractError: If `f` changes shape or dtype.

    Example:
        >>> import torch
        >>> shear = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # both eigenvalues are 0
        >>> box = field_of_values(lambda z: shear @ z, torch.zeros(2))
        >>> round(box.real_min, 4), round(box.real_max, 4), round(box.imag_max, 4)
        (-0.5, 0.5, 0.5)
    """
    packed, point = _packed(f, z)
    with undisturbed():
        local = Linearization(packed, point)

        def part(sign: float) -> Product:
            def product(vector: Tensor) -> Tensor:
                stack = vector.unsqueeze(0)
                forward, adjoint = local.both(stack, stack)
                return (forward + sign * adjoint)[0] / 2

            return product

        real = [value.real for value in _ritz_values(part(1.0), point, _both_ends, max_iter, tol, generator)]
        imag = _ritz_values(part(-1.0), point, _largest_modulus, max_iter, tol, generator)
    return FieldOfValues(min(real), max(real), max(abs(value) for value in imag))


def symmetry_score(
    f: Callable[..., Any], z: State, probes: int = 20, *, generator: torch.Generator | None = None
) -> float:
    """How symmetric `J` is: `|S| / (|S| + |A|)`, with its symmetric and antisymmetric parts in Frobenius norm.

    1 is symmetric, 0 antisymmetric; independent entries of mean zero give about 1/2.

    Args:
        f: The map: a tensor to a tensor of the same shape, or several to several.
        z: The state: a tensor of any shape, or a tuple or list of tensors.
        probes: Number of Gaussian probes; each costs a product with `J` and one with `J^T`.
        generator: Draws the probes.

    Returns:
        The estimated score. [`measure_symmetry`][torchdeq_ep.homeostasis.measure_symmetry] gives it with a standard
        error, and so does [`register_homeostasis`][torchdeq_ep.homeostasis.register_homeostasis] with `weight=0.0`, at
        every training step.

    Raises:
        MapContractError: If `f` changes shape or dtype.
        InvalidOptionError: If `probes` is not a positive whole number.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.5, 0.2]])
        >>> symmetry_score(lambda z: matrix @ z, torch.zeros(2))
        1.0
    """
    packed, point = _packed(f, z)
    with undisturbed():
        vectors = gaussian_probes(point, probes, generator)
        local = Linearization(packed, point)
        forward, adjoint = local.both(vectors, vectors)
    symmetric, antisymmetric = norm(forward + adjoint), norm(forward - adjoint)
    return symmetric / (symmetric + antisymmetric) if symmetric else float(antisymmetric == 0.0)


def weight_angle(forward_weight: Tensor, backward_weight: Tensor) -> float:
    """The angle between forward and backward weights, in degrees: 0 aligned, 90 unrelated, 180 opposed.

    Args:
        forward_weight: A weight of any shape.
        backward_weight: The weight that should equal it, in the same layout: `.weight` of a `ConvTranspose2d` beside
            that of a `Conv2d`, but `.weight.T` of a `Linear` that goes back beside the `.weight` of one that goes
            forth.

    Returns:
        An angle between 0 and 180.

    Raises:
        InvalidOptionError: If the shapes differ, or a weight is zero.

    Example:
        >>> import torch
        >>> weight_angle(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        45.0
    """
    if forward_weight.shape != backward_weight.shape:
        raise InvalidOptionError(
            f"weights of shapes {tuple(forward_weight.shape)} and {tuple(backward_weight.shape)} have no angle: bring "
            "both into one layout, e.g. weight_angle(forward.weight, backward.weight.T) for two linear layers."
        )
    pair = [weight.detach().flatten().double() for weight in (forward_weight, backward_weight)]
    sizes = [norm(weight) for weight in pair]
    if not all(sizes):
        raise InvalidOptionError("a weight that is zero everywhere has no direction, so there is no angle to it.")
    one, other = (weight / size for weight, size in zip(pair, sizes, strict=True))
    # Exact at small angles, where the arc cosine of the product is not.
    return math.degrees(2 * math.atan2(norm(one - other), norm(one + other)))


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
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise InvalidOptionError(f"probes must be a whole number of at least 1, not {probes!r}.")
    return torch.randn(probes, *z.shape, generator=generator, dtype=z.dtype, device=z.device)


def _dots(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).flatten(1).sum(1)


def _packed(f: Callable[..., Any], z: State) -> tuple[Map, Tensor]:
    packing = Packing.of(z)
    return packing.map(f), packing.pack(z, "z").detach()


def _largest_modulus(values: list[complex]) -> list[int]:
    return [max(range(len(values)), key=lambda i: abs(values[i]))]


def _both_ends(values: list[complex]) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: values[i].real)
    return [order[0], order[-1]]


def _ritz_values(
    product: Product,
    z: Tensor,
    wanted: Callable[[list[complex]], list[int]],
    max_iter: int,
    tol: float,
    generator: torch.Generator | None,
) -> list[complex]:
    """The eigenvalues that `wanted` picks, from a Krylov space grown until their residuals are below `tol`."""
    n = z.numel()
    steps = min(max_iter, n)
    start = gaussian_probes(z, 1, generator).reshape(1, n)
    basis = start / norm(start)
    hessenberg = torch.zeros(steps + 1, steps, dtype=torch.float64)
    eps = torch.finfo(z.dtype).eps
    for j in range(steps):
        vector = product(basis[j].reshape(z.shape)).reshape(n)
        for _ in range(2):  # once more, because rounding spoils the first orthogonalisation
            overlaps = basis @ vector
            vector = vector - overlaps @ basis
            hessenberg[: j + 1, j] += overlaps.double().cpu()
        size = norm(vector)
        hessenberg[j + 1, j] = size
        last = j + 1 == steps
        exhausted = size <= 10 * eps * norm(hessenberg)
        if exhausted or last or j % 5 == 4:
            spectrum, vectors = torch.linalg.eig(hessenberg[: j + 1, : j + 1])
            values: list[complex] = spectrum.tolist()
            picked = wanted(values)
            residual = size * max(float(vectors[-1, i].abs()) for i in picked)
            converged = exhausted or residual <= tol * max(abs(value) for value in values)
            if converged or last:
                break
        basis = torch.cat([basis, (vector / size).unsqueeze(0)])
    if not converged and steps < n:
        warnings.warn(
            f"the eigenvalues of the Jacobian have a residual of {residual:.1e} after {steps} products (tolerance "
            f"{tol:.1e} relative to the largest): raise max_iter, or loosen tol.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return [values[i] for i in picked]
