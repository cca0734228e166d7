"""Diagonal metrics `M` that make `J M` symmetric: from an activation, or fitted to a Jacobian.

A layer `z = phi(W z + x)` has `J = D W` with `D = diag(phi')`, which is not symmetric for symmetric `W`; `J D` is. For
a state before the activation, `u = W phi(u) + x`, `J = W D` and `J D^-1` is. The error vector with a metric is eq. (12)
of the theory page, an example in two units eq. (14).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchdeq_ep._options import check_choice
from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.holomorphic.context import real_part
from torchdeq_ep.jacobian.linearization import Linearization, Product
from torchdeq_ep.nn.activations import ACTIVATIONS, Activation, slope
from torchdeq_ep.state import Map, Packing, State, norm, undisturbed

_PROBES = 8
_STEPS = 30
_TOLERANCE = 1e-3
_RANGE = 1e3
_SMALLEST_STEP = 0.05
_DOUBLINGS = 24
_HALVINGS = 64


@dataclass(frozen=True)
class OperatorMetric:
    """A metric that is no diagonal: a symmetric positive operator `M` with its inverse, as functions.

    A proximal gradient step, `f(z) = P (z - tau grad h(z))`, has `J = P (I - tau H)`, which is not symmetric; `J P` is.
    With `M = P`, equilibrium propagation is exact. The error vector `v = M^-1 (I - J)^-1 M g` takes one application of
    each, whatever the number of nudges.

    Args:
        apply: `v -> M v`, on tensors of the shape of the state (packed, if that is several tensors). Symmetric and
            positive, which is not checked: the [adjoint residual](certificate.md) tells.
        inverse: `v -> M^-1 v`.

    Example:
        >>> stretch = torch.tensor([1.0, 2.0])
        >>> metric = OperatorMetric(lambda v: stretch * v, lambda v: v / stretch)
        >>> metric.inverse(metric.apply(torch.ones(2)))
        tensor([1., 1.])
    """

    apply: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


Metric = Callable[[Tensor], Tensor] | OperatorMetric | Literal["auto"]


def as_operator(metric: Tensor | OperatorMetric | None) -> OperatorMetric:
    """A metric as a mode used it, as an operator.

    Args:
        metric: The diagonal of `M`, an operator, or `None` for the identity.

    Returns:
        `M` and its inverse.

    Example:
        >>> as_operator(torch.tensor([1.0, 2.0])).inverse(torch.ones(2)), as_operator(None).apply(torch.ones(2))
        (tensor([1.0000, 0.5000]), tensor([1., 1.]))
    """
    if isinstance(metric, OperatorMetric):
        return metric
    if metric is None:
        return OperatorMetric(lambda v: v, lambda v: v)
    return OperatorMetric(lambda v: metric.to(v.dtype) * v, lambda v: v / metric.to(v.dtype))


@dataclass(frozen=True)
class ActivityMetric:
    """The metric of a layer with one elementwise activation and otherwise symmetric weights.

    The error vector is then that of [eq. (12)][eq-12] of the theory page.

    Args:
        phi: The activation: `"tanh"`, `"sigmoid"`, `"shifted-sigmoid"` (the papers', `1 / (1 + exp(2 - 4 x))`), or an
            increasing function that acts on each entry. It should be picklable if models that use it are to be.
        state: `"post"` if the state is behind the activation, `z = phi(W z + x)`: `M = phi'(phi^-1(z))`. `"pre"` if it
            is in front, `u = W phi(u) + x`: `M = 1 / phi'(u)`.
        floor: The slope is taken to be no smaller than this, because a saturated unit would have a metric of zero or
            infinity.

    Raises:
        InvalidOptionError: If an option is not acceptable, or, when called, if `phi` is not increasing.

    Example:
        >>> import torch
        >>> ActivityMetric("tanh")(torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.7500])
        >>> ActivityMetric(torch.tanh, state="pre")(torch.tensor([0.0]))
        tensor([1.])
    """

    phi: str | Activation
    state: Literal["pre", "post"] = "post"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.phi, str):
            if self.phi not in ACTIVATIONS:
                raise InvalidOptionError(f"{unknown_name('activation', self.phi, ACTIVATIONS)} Or pass a function.")
        elif not callable(self.phi):
            raise InvalidOptionError(f"phi must be the name of an activation or a function, not {self.phi!r}.")
        check_choice("state", self.state, ("pre", "post"))
        if not 0 < self.floor < 1:
            raise InvalidOptionError(f"floor must lie between 0 and 1, not be {self.floor!r}.")

    def __call__(self, z: Tensor) -> Tensor:
        """The diagonal of `M` at a state, detached and of its shape; at a complex one, continued from its real part."""
        z = z.detach()
        slopes = self._slopes(real_part(z))
        flat = slopes <= self.floor
        if z.is_complex():
            slopes = self._slopes(z)
        slopes = torch.where(flat, self.floor, slopes)
        return slopes if self.state == "post" else 1 / slopes

    def _slopes(self, z: Tensor) -> Tensor:
        """`phi'` where the state is `z`, unbounded."""
        phi = self.phi
        if isinstance(phi, str):
            function, slope_of_value = ACTIVATIONS[phi]
            return slope_of_value(z) if self.state == "post" else slope(function, z)
        if self.state == "pre":
            slopes = slope(phi, z)
        elif z.is_complex():
            raise InvalidOptionError(
                f"the inverse of {phi!r} is not known at complex states, where this metric is asked for because the "
                "loss nudges the state. Give the name of the activation, or the metric itself: metric=lambda z: the "
                "slope at the state z, clamped away from zero."
            )
        else:
            slopes = slope(phi, _inverse(phi, z))
        if not z.is_complex() and bool((slopes < 0).any()):
            raise _not_increasing(phi)
        return slopes


def automatic_metric(f: Callable[..., Any], z: State, *, probes: int = _PROBES, max_iter: int = _STEPS) -> Tensor:
    """The positive diagonal `M` that makes `J M` as symmetric as it can, found without knowing how `f` is built.

    Least squares over probes: `J M e - M J^T e` is linear in `M`, so where some `M` makes `J M` symmetric exactly, a
    few probes find it without sampling noise. A metric that does not lower the asymmetry of `M^-1/2 J M^1/2`, seen with
    other probes, is dropped for the identity. `metric="auto"` of a mode stands for this function.

    It costs up to `2 * probes * max_iter` products with the Jacobian, many times a nudged phase: where the activation
    is known, use [`ActivityMetric`][torchdeq_ep.jacobian.ActivityMetric].

    Args:
        f: The map: a tensor to a tensor of the same shape, or several to several.
        z: The state: a tensor of any shape, or a tuple or list of tensors.
        probes: Number of probes, at least 2. The draw is always the same, so a metric can be reproduced.
        max_iter: Largest number of conjugate-gradient steps.

    Returns:
        The diagonal, of the shape of the state: a vector for several tensors. Its scale is arbitrary.

    Raises:
        MapContractError: If `f` changes shape or dtype.

    Example:
        >>> import torch
        >>> slope = torch.tensor([1.0, 0.5, 0.2])
        >>> weight = torch.tensor([[0.1, 0.5, 0.3], [0.5, 0.2, 0.4], [0.3, 0.4, 0.1]])
        >>> metric = automatic_metric(lambda z: slope * (weight @ z), torch.zeros(3))
        >>> (metric / metric[0]).round(decimals=2)
        tensor([1.0000, 0.5000, 0.2000])
    """
    packing = Packing.of(z)
    with undisturbed():
        return fit(packing.map(f), packing.pack(z, "z").detach(), probes, max_iter)[0]


def fit(f: Map, z: Tensor, probes: int = _PROBES, max_iter: int = _STEPS) -> tuple[Tensor, int]:
    """The metric of [`automatic_metric`][torchdeq_ep.jacobian.automatic_metric] for a packed state, and what it cost.

    Args:
        f: A map of one real tensor that keeps its shape.
        z: Where to differentiate.
        probes: Number of probes.
        max_iter: Largest number of steps.

    Returns:
        The diagonal, and the number of evaluations of `f` and of products with its Jacobian.
    """
    generator = torch.Generator(z.device).manual_seed(0)
    signs = torch.randn(2 * probes, *z.shape, generator=generator, device=z.device, dtype=z.dtype).sign()
    vectors, held_out = signs[:probes], signs[probes:]
    local = Linearization(f, z)

    # Rows and columns of J M of equal norm: a start that removes large differences of scale.
    rows, columns = (p.square().mean(0) + torch.finfo(z.dtype).tiny for p in local.both(vectors, vectors))
    start = (rows / columns).sqrt()
    start = (start / start.median()).clamp(1 / _RANGE, _RANGE)
    root = start.sqrt()

    # With K = R^-1 J R, R^2 the start: K (y e) - y (K^T e) is to vanish for the factor y, close to 1, that is missing.
    pulled = root * local.adjoint(vectors / root)

    def residual(y: Tensor) -> Tensor:
        return local.forward(root * (y * vectors)) / root - y * pulled

    def residual_adjoint(r: Tensor) -> Tensor:
        total = (vectors * (root * local.adjoint(r / root)) - pulled * r).sum(0)
        return total - total.mean()  # y has mean 1, or y = 0 would be the solution

    change, steps = _least_squares(residual, residual_adjoint, -residual(torch.ones_like(z)), z, max_iter)
    metric = start * (1 + change).clamp_min(_SMALLEST_STEP)

    def asymmetry(root: Tensor) -> float:
        return norm(local.forward(root * held_out) / root - root * local.adjoint(held_out / root))

    better = asymmetry(metric.sqrt()) < asymmetry(torch.ones_like(z))
    calls = 1 + probes * (2 * steps + 9)
    return metric if better else torch.ones_like(z), calls


def _least_squares(
    product: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    target: Tensor,
    like: Tensor,
    max_iter: int,
) -> tuple[Tensor, int]:
    """The `x` that minimises `|product(x) - target|`, by conjugate gradients from zero, and the number of steps."""
    x = torch.zeros_like(like)
    residual = target
    direction = gradient = adjoint(residual)
    first = size = norm(gradient)
    for step in range(max_iter):
        if size <= _TOLERANCE * first or not size > 0:
            return x, step
        image = product(direction)
        length = (size / norm(image)) ** 2
        x = x + length * direction
        residual = residual - length * image
        gradient = adjoint(residual)
        before, size = size, norm(gradient)
        direction = gradient + (size / before) ** 2 * direction
    return x, max_iter


def _inverse(phi: Activation, z: Tensor) -> Tensor:
    """`phi^-1(z)` by bisection, which takes kinks; the middle of a plateau, and far out for values never reached."""
    with torch.no_grad():
        low, high = -torch.ones_like(z), torch.ones_like(z)
        middle = phi(torch.zeros_like(z))
        if not bool(((phi(low) <= middle) & (middle <= phi(high))).all()):
            raise _not_increasing(phi)
        for _ in range(_DOUBLINGS):
            low = torch.where(phi(low) >= z, 2 * low, low)
            high = torch.where(phi(high) <= z, 2 * high, high)
        first = _bisect(lambda u: phi(u) >= z, low, high)
        last = _bisect(lambda u: phi(u) > z, low, high)
    return (first + last) / 2


def _bisect(beyond: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = beyond(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _not_increasing(phi: Activation) -> InvalidOptionError:
    return InvalidOptionError(
        f"ActivityMetric needs an increasing activation, and {phi!r} is not. Give the metric itself: metric=lambda z: "
        "the slope at the state z, clamped away from zero."
    )


def scaled_adjoint(adjoint: Product, metric: Tensor | None) -> Product:
    """`d -> M J^T M^-1 d`.

    Args:
        adjoint: `v -> J^T v`.
        metric: Diagonal of `M`, or `None` for the identity.

    Returns:
        The map of one displacement.

    Example:
        >>> product = scaled_adjoint(lambda v: v.flip(0), torch.tensor([1.0, 2.0]))
        >>> product(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 2.0000])
    """
    return adjoint if metric is None else lambda d: metric * adjoint(d / metric)


def diagonal_metric(metric: Metric | None, f: Map, z: Tensor) -> tuple[Tensor | None, int]:
    """The diagonal of `M` at `z*`, checked.

    Args:
        metric: A function from the state to a positive tensor of the same shape; `"auto"`, which fits one to the
            Jacobian of `f`; or `None`.
        f: The map, on packed states.
        z: The packed free state.

    Returns:
        The diagonal, or `None` for the identity; and the calls of `f` and products with its Jacobian that it took.

    Raises:
        InvalidOptionError: If the metric is not positive and finite, or has another shape.

    Example:
        >>> diagonal_metric(lambda z: 1 - z**2, torch.tanh, torch.tensor([0.0, 0.5]))
        (tensor([1.0000, 0.7500]), 0)
    """
    if metric is None:
        return None, 0
    if isinstance(metric, OperatorMetric):
        raise InvalidOptionError("a diagonal metric is needed here, and this one is an operator.")
    diagonal, calls = fit(f, z) if isinstance(metric, str) else (metric(z), 0)
    if not isinstance(diagonal, Tensor) or diagonal.shape != z.shape:
        got = tuple(diagonal.shape) if isinstance(diagonal, Tensor) else type(diagonal).__name__
        raise InvalidOptionError(f"metric(z*) must be a tensor of the state's shape {tuple(z.shape)}, not {got}.")
    if not bool(torch.isfinite(diagonal).all()) or not bool((diagonal > 0).all()):
        raise InvalidOptionError(
            "metric(z*) must be positive and finite everywhere: it is the diagonal of M in v = M^-1 (I - J)^-1 M g. "
            "Clamp it away from zero, e.g. metric=lambda z: phi_prime(z).clamp_min(1e-3)."
        )
    return diagonal.detach(), calls
