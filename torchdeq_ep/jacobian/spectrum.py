"""Extreme eigenvalues of a Jacobian and the extent of its field of values, by Arnoldi's method on products with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import ConvergenceWarning
from torchdeq_ep.jacobian.linearization import Linearization, Product, gaussian_probes, jvp, packed_map
from torchdeq_ep.state import Map, State, norm, undisturbed


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
    packed, point = packed_map(f, z)
    with undisturbed():
        values = _ritz_values(jvp(packed, point), point, _largest_modulus, max_iter, tol, generator)
    return max(abs(value) for value in values)


def rough_spectral_radius(f: Map, z: Tensor, max_iter: int = 30) -> float:
    """The spectral radius to a few per cent, for a message: no warning, and NaN where there are no products with `J`.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: The state.
        max_iter: Largest number of products.

    Returns:
        The estimate.

    Example:
        >>> import torch
        >>> round(rough_spectral_radius(lambda z: 0.5 * z, torch.ones(3)), 3)
        0.5
    """
    generator = torch.Generator(z.device).manual_seed(0)
    try:
        with undisturbed():
            values = _ritz_values(jvp(f, z), z, _largest_modulus, max_iter, 0.02, generator, quiet=True)
    except (RuntimeError, NotImplementedError):  # f cannot be differentiated forwards, in whatever way
        return math.nan
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
    packed, point = packed_map(f, z)
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
    quiet: bool = False,
) -> list[complex]:
    """The eigenvalues that `wanted` picks, from a Krylov space grown until their residuals are below `tol`."""
    n = z.numel()
    if n == 0:  # the Jacobian of nothing, as in a batch without samples
        return [0j]
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
            hessenberg[: j + 1, j] += overlaps.cpu().double()
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
    if not converged and steps < n and not quiet:
        warnings.warn(
            f"the eigenvalues of the Jacobian have a residual of {residual:.1e} after {steps} products (tolerance "
            f"{tol:.1e} relative to the largest): raise max_iter, or loosen tol.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return [values[i] for i in picked]
