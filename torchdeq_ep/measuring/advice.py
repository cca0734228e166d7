"""What to do about an EP gradient that is off: the likeliest cause first, and nothing about what is not known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchdeq_ep.certificate import LARGEST_INCONSISTENCY
from torchdeq_ep.measuring.capture import Adjoint
from torchdeq_ep.measuring.diagnosis import GOOD, Parts
from torchdeq_ep.modes.judgement import NEAR_ONE, UNCONVERGED_STATE

PARTS = {
    "finite_nudge": ("tight solve", "limit"),
    "asymmetry": ("limit", "exact adjoint"),
    "convergence": ("estimate", "tight solve"),
    "total": ("estimate", "exact adjoint"),
}
"""Each part is the first vector less the second."""
_ENOUGH = 0.5
"""An amplitude helps if it leaves less than this of the error of the nudge."""


@dataclass(frozen=True)
class Findings:
    """What the advice on a DEQ is drawn from; NaN is what is not known.

    Args:
        parts: Of the error of the error vector.
        exact: The exact adjoint.
        free: Relative residual of the free phase as the model has it.
        settled: The same where it is solved further.
        radius: Spectral radius of the Jacobian.
        kinks: Name of an operation of `f` with kinks, or an empty text.
        beta: Amplitude of the mode.
        best: Amplitude with the smallest error of the nudge.
        best_error: That error, relative to the exact vector.
        unsettled: Of `"tight solve"` and `"limit"`, those that did not converge.
        hidden: How far autograd's derivative of `f` along the estimate is from that of its values.

    Example:
        >>> import torch
        >>> from torchdeq_ep.measuring import Part
        >>> some, large = Part(0.01, 1.0), Part(0.2, 0.98)
        >>> exact = Adjoint(torch.ones(2), "dense", 0.0)
        >>> findings = Findings(Parts(some, large, some, large), exact, 1e-6, 1e-7, 0.99, "", 0.01, 0.01, 0.01)
        >>> advise(findings)[:51]
        'The spectral radius of the Jacobian is 0.990: I - J'
    """

    parts: Parts
    exact: Adjoint
    free: float
    settled: float
    radius: float
    kinks: str
    beta: float
    best: float
    best_error: float
    unsettled: tuple[str, ...] = ()
    hidden: float = math.nan


def advise(found: Findings) -> str:
    """What to do, the likeliest cause first: a hidden derivative, the free phase, the radius, then the largest part.

    Args:
        found: What was measured.

    Returns:
        A sentence or two.
    """
    total = found.parts.total.relative
    if found.hidden > LARGEST_INCONSISTENCY:
        return (
            f"f hides a part of its derivative from autograd: along the error vector, the derivative of its values is "
            f"{found.hidden:.0%} off autograd's, which the limit and the exact adjoint follow. Look for detach(), "
            ".data, no_grad, NumPy or a custom backward. If that is meant, use 'ift'; if not, unhide it."
        )
    if not found.exact.is_known:
        causes = [*_of_free_phase(found), *_of_radius(found)]
        remedy = ["Lower f_tol and raise f_max_iter until it is."] if not causes else []
        return " ".join([_unknown(found.exact), *causes, *remedy])
    if found.exact.method == "zero":
        return "The cotangent is zero, so the exact error vector is, and there is nothing to compare."
    if total <= GOOD:
        return f"The error vector is within {total:.1%} of the exact one: there is nothing to mend."
    return " ".join([*_of_free_phase(found), *_of_radius(found), _of_parts(found)])


def _unknown(exact: Adjoint) -> str:
    if exact.method == "none":
        return f"There is no exact adjoint ({exact.note}), so no error is known."
    reason = f": {exact.note}" if exact.note else ""
    return (
        f"The exact adjoint is itself not known: it stopped at a relative residual of {exact.residual:.0e}{reason}. "
        "The parts say how far the estimates are from that, and no more."
    )


def _of_free_phase(found: Findings) -> list[str]:
    if not found.free > UNCONVERGED_STATE:
        return []
    further = f" ({found.settled:.0e} when solved further)" if found.settled < found.free else ""
    return [
        f"The free phase stopped at a relative residual of {found.free:.0e}{further}: raise f_max_iter, lower f_tol, "
        "or use a solver that converges (f_solver='anderson', 'broyden' or 'relaxation'), before anything else."
    ]


def _of_radius(found: Findings) -> list[str]:
    if not found.radius > NEAR_ONE:
        return []
    return [
        f"The spectral radius of the Jacobian is {found.radius:.3f}: I - J is nearly singular, which amplifies every "
        "error. Weight norms, homeostasis or a norm at the end of f keep it below 1."
    ]


def _of_parts(found: Findings) -> str:
    parts = {
        "finite_nudge": found.parts.finite_nudge.relative,
        "asymmetry": found.parts.asymmetry.relative,
        "convergence": found.parts.convergence.relative,
    }
    known = {cause: size for cause, size in parts.items() if math.isfinite(size)}
    if len(known) < len(parts):
        return f"What the rest is due to is not known: {_reasons(found.parts)}. The notes say why."
    cause, size = max(known.items(), key=lambda item: item[1])
    rests_on = [name for name in found.unsettled if name in PARTS[cause]]
    if rests_on:
        return (
            f"The largest part is the {cause.replace('_', ' ')} ({size:.0%}), but the {' and the '.join(rests_on)} "
            "that it is read from did not converge, so it is not known to be the cause."
        )
    if cause == "finite_nudge":
        return _of_nudge(found, size)
    if cause == "asymmetry":
        return (
            f"Most of the error is the asymmetry of the Jacobian, which no amplitude removes ({size:.0%}): give the "
            "metric of the activation, use the mode 'aep', or train with a penalty on the asymmetry."
        )
    return (
        f"Most of the error is that a phase stopped early ({size:.0%}; the free phase at a relative residual of "
        f"{found.free:.0e}): raise f_max_iter, lower f_tol, or lower tol of the mode."
    )


def _of_nudge(found: Findings, size: float) -> str:
    opening = f"Most of the error is the size of the nudge ({size:.0%})"
    if found.best_error <= _ENOUGH * size:
        return f"{opening}: use beta={found.best:.0e} instead of {found.beta:.0e}, or a stencil of higher order."
    if found.kinks:
        return (
            f"{opening}, and no amplitude leaves less than {found.best_error:.0%}: f has kinks ({found.kinks}), which "
            "limit what a finite nudge can reach. Use 'ep-infinitesimal' or 'ift', or a smooth activation."
        )
    return f"{opening}, and no amplitude leaves less than {found.best_error:.0%}: use a stencil of higher order."


def _reasons(parts: Parts) -> str:
    told = (parts.finite_nudge, parts.asymmetry, parts.convergence, parts.total)
    return ", ".join(dict.fromkeys(part.reason for part in told if part.reason)) or "a part is not finite"
