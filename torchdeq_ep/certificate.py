"""What one backward pass knows of the error of its own gradient, from products that it makes anyway.

The gradient is exact if `v` solves `v = J^T v + g`, eq. (3) of the theory page. `J^T v` arrives with the gradients of
the parameters, so the residual `v - J^T v - g` of any error vector costs a subtraction. Equilibrium propagation solves
`v = J v + g`, or with a metric `M v = J M v + M g`, by values of `f` alone, and autograd's `J^T` must agree with it:
`<v, M (v - g)> = <J^T v, M v>`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchdeq_ep.errors import AsymmetryWarning, HiddenDerivativeWarning
from torchdeq_ep.jacobian import OperatorMetric, vjp
from torchdeq_ep.jacobian.consistency import derivative_mismatch
from torchdeq_ep.modes import Mode, ModeLike, NudgeReport
from torchdeq_ep.state import Equilibrium, Memory, undisturbed

LARGEST_INCONSISTENCY = 0.05
"""Two derivatives of one map that differ by more are not the same but for rounding, kinks and what a solve left."""
_LARGEST_ADJOINT_RESIDUAL = 0.5
_PASSES_OF_HOMEOSTASIS = 100
"""Backward passes after which homeostasis should have made the Jacobian symmetric along the error vectors."""
_MARGIN = 3.0
_TINY = 1e-30
_NOTHING = 1e-3


@dataclass(frozen=True)
class Certificate:
    """The two numbers of a pass.

    Args:
        adjoint_residual: `|v - J^T v - g| / |g|`.
        inconsistency: `|<v, M (v - g)> - <J^T v, M v>| / (|v| |M (v - g)|)`.
        unexplained: How much of that is neither rounding nor what the nudges left.

    Example:
        >>> matrix = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
        >>> g = torch.tensor([1.0, 0.0])
        >>> v = torch.linalg.solve(torch.eye(2) - matrix, g)
        >>> certificate = certify(v, g, matrix.T @ v, None, NudgeReport("ep"))
        >>> round(certificate.adjoint_residual, 3), round(certificate.inconsistency, 3)
        (0.0, 0.0)
    """

    adjoint_residual: float
    inconsistency: float
    unexplained: float


def certify(
    v: Tensor,
    g: Tensor,
    adjoint: Tensor,
    metric: Tensor | OperatorMetric | None,
    report: NudgeReport,
    rounding: float = 0.0,
) -> Certificate:
    """The certificate of an error vector.

    Args:
        v: The error vector, packed.
        g: The cotangent.
        adjoint: `J^T v`, of the same shape.
        metric: Diagonal of `M` that the mode used, an operator, or `None` for the identity.
        report: Of the solve.
        rounding: Relative rounding error of the products.

    Returns:
        The certificate.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    if isinstance(metric, OperatorMetric):
        weighed, forth = (metric.apply(tensor).to(wide).flatten() for tensor in (v, v - g))
    v, g, adjoint = (tensor.to(wide).flatten() for tensor in (v, g, adjoint))
    through = v - g
    if not isinstance(metric, OperatorMetric):
        weighed, forth = (v, through) if metric is None else (metric.flatten() * v, metric.flatten() * through)
    sizes = torch.stack([torch.linalg.vector_norm(t) for t in (v, g, forth, through, through - adjoint)])
    products = torch.stack([torch.dot(v, forth), torch.dot(adjoint, weighed)])
    of_v, of_g, of_forth, of_through, of_residual, first, second = torch.cat([sizes, products]).tolist()
    # Where J v is next to nothing beside v, it has no direction that could be compared.
    scale = of_v * of_forth if of_through > _NOTHING * of_v else 0.0
    inconsistency = abs(first - second) / scale if scale > 0 else 0.0
    left = report.inexactness * of_g / max(of_through, _TINY)
    explained = _MARGIN * (left + rounding * of_v / max(of_through, _TINY))
    return Certificate(of_residual / max(of_g, _TINY), inconsistency, inconsistency - explained)


def adjoint_residual(equilibrium: Equilibrium, v: Tensor) -> float:
    """The adjoint residual of any error vector, where no backward pass yields `J^T v`: for one product.

    Args:
        equilibrium: The free equilibrium.
        v: The error vector, packed.

    Returns:
        `|v - J^T v - g| / |g|`.

    Example:
        >>> free = Equilibrium(lambda z: 0.5 * z, torch.zeros(2), torch.zeros(2), torch.ones(2), 1e-7)
        >>> adjoint_residual(free, 2 * torch.ones(2)), adjoint_residual(free, torch.ones(2))
        (0.0, 0.5)
    """
    with undisturbed(equilibrium.records):
        adjoint = vjp(equilibrium.f, equilibrium.z)(v.to(equilibrium.z.dtype))
    return certify(v, equilibrium.cotangent, adjoint, None, NudgeReport("")).adjoint_residual


def speak_up_of_certificate(
    mode: ModeLike, certificate: Certificate | None, report: NudgeReport, memory: Memory, is_along: bool = False
) -> None:
    """Warn of a hidden derivative, or of an asymmetry that leaves little of the gradient.

    Args:
        mode: That found the error vector.
        certificate: Of it, or `None` where the backward pass did not reach the state.
        report: Of the solve.
        memory: Of the layer.
        is_along: Whether homeostasis works on the asymmetry along the error vector. As in random directions, it is
            given some passes before what is left is worth a word.
    """
    is_regulated = is_along or memory.passes - memory.regulated < _PASSES_OF_HOMEOSTASIS
    unexplained = certificate.unexplained if certificate is not None and _solves_an_equation(mode) else 0.0
    hidden = max(unexplained, memory.hidden)
    if hidden > LARGEST_INCONSISTENCY:
        finding = f"the derivative that autograd has of f is not that of its values: they differ by {hidden:.0%}"
        hiding = "f hides a part of it: detach(), .data, no_grad, NumPy or a custom backward (straight-through) do so"
        memory.warn(HiddenDerivativeWarning, "derivative", finding, lambda: f"{hiding}. {_used_by(mode)}", hidden)
        return
    if certificate is None:
        return
    residual = certificate.adjoint_residual
    explained = _MARGIN * report.inexactness
    if not memory.lasting or (is_regulated and memory.passes <= _PASSES_OF_HOMEOSTASIS):
        return
    if _is_symmetric_only(mode) and residual > max(_LARGEST_ADJOINT_RESIDUAL, explained):
        finding = (
            f"the error vector leaves a residual of {residual:.2g} of the cotangent in the exact equation "
            "v = J^T v + g, because the Jacobian of f is not symmetric, as that of an ordinary network is not"
        )
        regulated = (
            f"Homeostasis has not removed it in {memory.passes} passes, see handle.homeostasis.last: raise a fixed "
            "weight, lower the learning rate, or take 'aep', which corrects for it, or 'ift', which does not need it."
        )
        advice = (
            "Three ways on: train with homeostasis (tep.use_backward(..., homeostasis='auto')), or take 'aep', which "
            "corrects for it, or 'ift', which does not need it. tep.diagnose(...) says how far off the gradient is."
        )
        memory.warn(AsymmetryWarning, "asymmetry", finding, lambda: regulated if is_regulated else advice, residual)


def compare_derivatives(mode: ModeLike, equilibrium: Equilibrium, v: Tensor) -> int:
    """Once a DEQ: compare the derivative of the values of `f` along the error vector with autograd's.

    Args:
        mode: That found the error vector.
        equilibrium: The free equilibrium.
        v: The error vector.

    Returns:
        Calls of `f` that it took.
    """
    memory = equilibrium.memory
    if (
        not memory.lasting
        or not memory.recordable
        or memory.compared
        or not _solves_an_equation(mode)
        or not bool(torch.any(v))
    ):
        return 0
    memory.compared = True
    try:
        found = derivative_mismatch(equilibrium.f, equilibrium.z, v, equilibrium.rounding)
    except RuntimeError:  # f cannot be differentiated at the state, in whatever way it says so
        return 0
    memory.hidden = found.size if math.isfinite(found.size) else 0.0
    return found.calls


def _used_by(mode: ModeLike) -> str:
    used = mode.derivative if isinstance(mode, Mode) else None
    if used == "values":
        return (
            "This mode used the derivative of the values, hidden part included. If that is hidden on purpose, use "
            "'ift', which follows autograd."
        )
    if used == "autograd":
        return (
            "This mode used autograd's, without the hidden part. If that is hidden by mistake, unhide it, or use 'ep', "
            "which follows the values."
        )
    return "This mode mixes the two, and its gradient is neither: use 'ift', which follows autograd, or 'ep'."


def _solves_an_equation(mode: ModeLike) -> bool:
    return isinstance(mode, Mode) and mode.derivative is not None


def _is_symmetric_only(mode: ModeLike) -> bool:
    return isinstance(mode, Mode) and mode.assumes_symmetry


def certified(mode: ModeLike, report: NudgeReport, certificate: Certificate) -> NudgeReport:
    """A report with its certificate.

    Args:
        mode: That found the error vector.
        report: Of the solve.
        certificate: Of its error vector.

    Returns:
        A new report.
    """
    inconsistency = certificate.inconsistency if _solves_an_equation(mode) else math.nan
    return replace(report, adjoint_residual=certificate.adjoint_residual, inconsistency=inconsistency)
