"""How symmetric `J M` is, from Gaussian probes: a penalty that can be differentiated, and scores with standard errors.

What nudging computes differs from the gradient by the asymmetry of `J` (Laborieux & Zenke, arXiv 2309.02214, eq. 14).
With a Gaussian probe `e`, `u = J M e` and `w = (J M)^T e`, there are two estimators of `|J M - (J M)^T|_F^2 / 2`:

    paper:          |u|^2 - e^T (J M)^2 e  =  |u|^2 - w . u
    antisymmetric:  |u - w|^2 / 2

Both are unbiased. The second is never negative, and its standard deviation is second order in the asymmetry where that
of the first is first order. These are eqs. (20) to (22) of the theory page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchdeq_ep._display import html_fields, told_fields
from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.jacobian.linearization import Linearization, gaussian_probes
from torchdeq_ep.jacobian.metric import Metric, diagonal_metric
from torchdeq_ep.state import Autocast, FrozenStatistics, Packing, State, first_derivative_only, row_dots, tensors_of

Estimator = Literal["antisymmetric", "paper"]

ESTIMATORS = ("antisymmetric", "paper")
_NO_SECOND_DERIVATIVE = (
    "a second derivative was asked of the homeostatic penalty, whose probes define the first one only. Leave the "
    "penalty out of the loss that is differentiated twice, and add its gradient in a backward pass of its own."
)


def symmetry_penalty(
    f: Callable[..., Any],
    z: State,
    probes: int = 5,
    estimator: Estimator = "antisymmetric",
    metric: Metric | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Tensor:
    """An unbiased estimate of `|J M - (J M)^T|_F^2 / 2 n`, with `n` entries in the state, to be minimised.

    The estimators are those of [eq. (21)][eq-21] of the theory page, their variances [eq. (22)][eq-22].

    It can be differentiated, once, by whatever `f` depends on; `z` and `M` are held fixed. `f` is evaluated once, and
    running statistics do not move.

    Args:
        f: The map: a tensor to a tensor of the same shape, or several to several.
        z: The state, usually a fixed point: a tensor of any shape, or a tuple or list of tensors.
        probes: Number of Gaussian probes; each costs one product with `J` and two with `J^T`.
        estimator: `"antisymmetric"`, or `"paper"`, which may be negative and has the larger variance.
        metric: Positive diagonal `M` as a function of the state, `"auto"` to fit one, or `None` for the identity.
        generator: Draws the probes; torch's own where it is `None`.
        chunk: How many probes have a graph in memory at a time; by default all. The products of a chunk that can be
            differentiated are made twice, for the value and for the gradient: six of a probe instead of three.

    Returns:
        A scalar, with a graph where autograd is on and `f` depends on something that requires a gradient.

    Raises:
        InvalidOptionError: If an option is not acceptable.
        MapContractError: If `f` changes shape or dtype.
        JacobianProductError: If an operation in `f` cannot be differentiated twice.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[0.0, 0.4], [0.2, 0.0]], requires_grad=True)
        >>> penalty = symmetry_penalty(lambda z: torch.tanh(weight @ z), torch.zeros(2), probes=100)
        >>> penalty.backward()  # |W - W^T|^2 / 4 = 0.02 in expectation
        >>> bool(weight.grad[0, 1] > 0), bool(weight.grad[1, 0] < 0)
        (True, True)
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_chunk(chunk)
    autocast, create_graph = autocast_of(z), torch.is_grad_enabled()
    vectors = gaussian_probes(pack_leniently(z, autocast)[1], probes, generator)
    return probe_symmetry(
        f, z, vectors, estimator, metric, autocast, True, create_graph=create_graph, chunk=chunk
    ).penalty


@dataclass(frozen=True)
class SymmetryMeasurement:
    """How symmetric a Jacobian `J M` is, from probes. `*_se` are standard errors over them, NaN for a single probe.

    Args:
        penalty: `|J M - (J M)^T|_F^2 / 2 n`, before any weight.
        penalty_se: Its standard error.
        symmetry: `|S| / (|S| + |A|)`, with the symmetric and antisymmetric parts in Frobenius norm: 1 is symmetric.
        symmetry_se: Its standard error.
        asymmetry: `|A| / |J M|`: 0 is symmetric.
        asymmetry_se: Its standard error.

    Example:
        >>> found = SymmetryMeasurement(0.02, 0.001, 0.75, 0.01, 0.3, 0.01)
        >>> f"{found.symmetry} +- {found.symmetry_se}"
        '0.75 +- 0.01'
    """

    penalty: float
    penalty_se: float
    symmetry: float
    symmetry_se: float
    asymmetry: float
    asymmetry_se: float

    def __repr__(self) -> str:
        return told_fields(self)

    def _repr_html_(self) -> str:
        return html_fields(self)


def measure_symmetry(
    f: Callable[..., Any],
    z: State,
    probes: int = 20,
    *,
    metric: Metric | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> SymmetryMeasurement:
    """How symmetric the Jacobian `J M` of a map is, with standard errors.

    Args:
        f: The map: a tensor to a tensor of the same shape, or several to several.
        z: The state: a tensor of any shape, or a tuple or list of tensors.
        probes: Number of Gaussian probes; each costs a product with `J` and one with `J^T`.
        metric: As for [`symmetry_penalty`][torchdeq_ep.jacobian.symmetry_penalty].
        generator: Draws the probes; torch's own where it is `None`.
        chunk: How many probes are multiplied at a time; by default all.

    Returns:
        The measurement.

    Raises:
        InvalidOptionError: If an option is not acceptable.
        MapContractError: If `f` changes shape or dtype.
        JacobianProductError: If an operation in `f` cannot be differentiated twice.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.3, -0.4], [0.4, 0.3]])  # |S| = 0.3 sqrt(2), |A| = 0.4 sqrt(2)
        >>> round(measure_symmetry(lambda z: turn @ z, torch.zeros(2)).asymmetry, 4)
        0.8
    """
    check_chunk(chunk)
    autocast = autocast_of(z)
    vectors = gaussian_probes(pack_leniently(z, autocast)[1], probes, generator)
    seen = probe_symmetry(f, z, vectors, "antisymmetric", metric, autocast, True, create_graph=False, chunk=chunk)
    return Moments.of(seen).measurement()


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
        The estimated score. [`measure_symmetry`][torchdeq_ep.jacobian.measure_symmetry] gives it with a standard
        error, and so does [`register_homeostasis`][torchdeq_ep.host.register_homeostasis] with `weight=0.0`, at
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
    return measure_symmetry(f, z, probes, generator=generator).symmetry


@dataclass(frozen=True, eq=False)
class Sample:
    """What the probes saw: a penalty with its graph, and for each probe the penalty, `|S e|^2` and `|A e|^2`."""

    penalty: Tensor
    rows: Tensor
    batched: bool

    def detached(self) -> Sample:
        return Sample(self.penalty.detach(), self.rows, self.batched)


def check_chunk(chunk: int | None) -> None:
    """Raises InvalidOptionError unless it is a positive whole number or `None`."""
    if chunk is not None:
        check_count("chunk", chunk)


def autocast_of(state: State) -> Autocast:
    """The autocast state in force for the device of a state."""
    first, *_ = tensors_of(state)
    return Autocast.current(first.device.type)


def pack_leniently(state: State, autocast: Autocast) -> tuple[Packing, Tensor]:
    """The packing of a state, and the state in it; of single precision at least under autocast."""
    packing = Packing.of(state, lenient=autocast.enabled)
    return packing, packing.pack(state, "z").detach()


def linearize(f: Callable[[Tensor], Tensor], z: Tensor, autocast: Autocast, batched: bool) -> Linearization:
    """A map near a state, in full precision wherever it allows that.

    Args:
        f: The map, on packed states.
        z: The state.
        autocast: The autocast state in which `f` was evaluated.
        batched: Whether to try `vmap`.

    Returns:
        Products with its Jacobian.
    """
    # Autocast rounds J by as much as a small asymmetry: measure in full precision wherever f allows it.
    if autocast.enabled:
        try:
            with autocast.restored(False):
                return Linearization(f, z, batched)
        except RuntimeError:  # mixed dtypes: inputs were cast in the forward pass, and f relies on it
            pass
    with autocast.restored(True):
        return Linearization(f, z, batched)


def probe_symmetry(
    f: Callable[..., Any],
    state: State,
    vectors: Tensor,
    estimator: Estimator,
    metric: Metric | None,
    autocast: Autocast,
    batched: bool,
    *,
    create_graph: bool,
    chunk: int | None = None,
) -> Sample:
    """The penalty and the squares of both parts of `J M`, seen with each of a stack of probes.

    Args:
        f: The map.
        state: Where to differentiate.
        vectors: The probes, packed, of shape `(probes, *shape)`.
        estimator: Of the penalty.
        metric: Of [`symmetry_penalty`][torchdeq_ep.jacobian.symmetry_penalty].
        autocast: The autocast state in which `f` was evaluated.
        batched: Whether to try `vmap`.
        create_graph: Whether the penalty can be differentiated by the parameters of `f`.
        chunk: Of [`symmetry_penalty`][torchdeq_ep.jacobian.symmetry_penalty].

    Returns:
        What the probes saw.
    """
    packing, z = pack_leniently(state, autocast)
    packed = packing.map(f)
    with FrozenStatistics():
        local = linearize(packed, z, autocast, batched)
        diagonal, _ = diagonal_metric(metric, packed, z)
    m = torch.ones((), dtype=z.dtype, device=z.device) if diagonal is None else diagonal.to(z.dtype)
    stacks, paper = torch.split(vectors, chunk or len(vectors)), estimator == "paper"
    with autocast.restored(False):
        seen = [_see(local, m, stack, paper, create_graph, len(stacks) > 1) for stack in stacks]
        rows = torch.cat([found for found, _ in seen], dim=1)
        penalties = rows[0] / z.numel()
        penalty = penalties.mean().to(z.dtype)
        sources = [source for _, source in seen if source is not None]
        if sources:
            source = (torch.cat(sources).mean() / z.numel()).to(z.dtype)
            with torch.enable_grad():
                penalty = cast(Tensor, _Penalty.apply(penalty, source))  # type: ignore[no-untyped-call]
    return Sample(penalty, torch.stack([penalties, *rows[1:]]), local.batched)


def _see(
    local: Linearization, m: Tensor, vectors: Tensor, paper: bool, create_graph: bool, anew: bool
) -> tuple[Tensor, Tensor | None]:
    """For each probe the penalty, `|S e|^2` and `|A e|^2`, and what has the penalty's gradient.

    With `anew` the graph of the latter holds nothing: it is computed once more when it is differentiated.
    """
    u, pulled = local.both(m * vectors, vectors, create_graph and not anew)
    w = m * pulled.detach()
    difference = u - w
    symmetric, antisymmetric = _squares((u + w) / 2), _squares(difference / 2)
    rows = torch.stack([_squares(u) - row_dots(u, w) if paper else 2 * antisymmetric, symmetric, antisymmetric])
    if not (create_graph and local.requires_grad):
        return rows, None
    # With A = J M, the differential of |A e - A^T e|^2 / 2 is r . dA e - e . dA r, where r = A e - A^T e, and that of
    # |A e|^2 - e . A A e is (2 u - w) . dA e - e . dA u. So products of J^T with vectors that are held fixed have the
    # penalty's gradient. Differentiating J e itself takes derivatives that torch (2.13) gets wrong for batch, instance
    # and layer norm, in forward mode as well as by double backward.
    left, right = (2 * u - w, u) if paper else (difference, difference)
    if anew:
        return rows, _computed_anew(local, m, vectors, left, right)
    return rows, row_dots(local.adjoint(left, True), m * vectors) - row_dots(pulled, m * right)


def _computed_anew(local: Linearization, m: Tensor, vectors: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same, with a graph that keeps the vectors only, and makes the products again when it is differentiated."""

    def source(batched: bool) -> Tensor:
        pulled_left, pulled = (local.adjoint(stack, True, batched) for stack in (left, vectors))
        return row_dots(pulled_left, m * vectors) - row_dots(pulled, m * right)

    remembered = partial(checkpoint, source, use_reentrant=False, preserve_rng_state=False)
    # Both times in one way: a checkpoint refuses a graph that is not the one it has seen.
    if local.batched:
        try:
            return cast(Tensor, remembered(True))
        except Exception:  # whatever vmap cannot do
            local.batched = False
    return cast(Tensor, remembered(False))


class _Penalty(torch.autograd.Function):
    """The value of one scalar with the first derivative of another, and no second derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        (cotangent,) = cotangents
        if torch.is_grad_enabled():
            (source,) = ctx.saved_tensors
            cotangent = first_derivative_only(cotangent, source, _NO_SECOND_DERIVATIVE)
        return None, cotangent


def _squares(stack: Tensor) -> Tensor:
    return row_dots(stack, stack)


@dataclass(frozen=True)
class Moments:
    """Means over the probes of the penalty, `|S e|^2` and `|A e|^2`, and the covariances of these means."""

    penalty: float
    symmetric: float
    antisymmetric: float
    penalty_variance: float
    symmetric_variance: float
    antisymmetric_variance: float
    covariance: float

    @classmethod
    def of(cls, sample: Sample) -> Moments:
        rows = sample.rows.cpu().double()
        count = rows.shape[1]
        covariances = torch.cov(rows) / count if count > 1 else torch.full((3, 3), math.nan)
        pairs = ((0, 0), (1, 1), (2, 2), (1, 2))
        return cls(*rows.mean(1).tolist(), *(float(covariances[i, j]) for i, j in pairs))

    @classmethod
    def sum(cls, terms: Sequence[Moments]) -> Moments:
        return cls(*(math.fsum(column) for column in zip(*(vars(term).values() for term in terms), strict=True)))

    def measurement(self) -> SymmetryMeasurement:
        s, a = self.symmetric, self.antisymmetric
        penalty_se = math.sqrt(self.penalty_variance)
        if s <= 0 or a <= 0:  # exactly symmetric, exactly antisymmetric, or zero (which is symmetric)
            symmetry = 0.0 if a > 0 else 1.0
            return SymmetryMeasurement(self.penalty, penalty_se, symmetry, 0.0, 1.0 - symmetry, 0.0)
        ratio = math.sqrt(a / s)
        # The delta method: both are functions of log(a / s), whose variance this is.
        variance = self.symmetric_variance / s**2 + self.antisymmetric_variance / a**2 - 2 * self.covariance / (s * a)
        spread = math.sqrt(variance) if not variance < 0 else 0.0
        asymmetry = math.sqrt(a / (s + a))
        return SymmetryMeasurement(
            self.penalty,
            penalty_se,
            1 / (1 + ratio),
            spread * ratio / (2 * (1 + ratio) ** 2),
            asymmetry,
            spread * asymmetry * s / (2 * (s + a)),
        )
