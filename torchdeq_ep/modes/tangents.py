"""How a mode finds tangents. A tangent of an equilibrium solves `d = J d + (df/dtheta) dtheta`, for any `J`.

That is the equation of a nudge by the force `(df/dtheta) dtheta`: nothing is transposed, so no symmetry is needed, no
metric, and no correction.
"""

from __future__ import annotations

from dataclasses import replace

from torchdeq_ep.errors import TransformError
from torchdeq_ep.modes.base import Mode, OnDivergence, RelaxedMode
from torchdeq_ep.modes.linear import InfinitesimalEP
from torchdeq_ep.modes.propagation import EquilibriumPropagation
from torchdeq_ep.modes.registry import ModeLike
from torchdeq_ep.modes.series import Neumann, OneStep
from torchdeq_ep.modes.shine import Shine
from torchdeq_ep.modes.steps import StepwiseMode

_APPROXIMATIONS = (StepwiseMode, OneStep, Neumann, Shine)


def require_equilibrium(mode: ModeLike) -> None:
    """Refuse a mode whose gradient is not that of the equilibrium.

    Args:
        mode: Any mode.

    Raises:
        TransformError: If it differentiates steps, sums a part of a series, or needs what a solver left.
    """
    if isinstance(mode, _APPROXIMATIONS):
        raise TransformError(
            f"{mode!r} is an approximation that belongs to a backward pass: it has no forward derivative, and the "
            "transforms of torch.func do not see it. Call loss.backward(), or use 'ift', 'aep' or 'ep'."
        )


def tangent_mode(mode: ModeLike) -> Mode:
    """The mode that solves `d = J d + force` in the way of another.

    Args:
        mode: Any mode that solves an equation of the equilibrium.

    Returns:
        Plain nudges of the same stencil for equilibrium propagation; for a mode that takes products with the Jacobian,
        and for any other callable, products `J d`. Options of the solver are kept.

    Example:
        >>> from torchdeq_ep import get_backward
        >>> tangent_mode(get_backward("ep-richardson")).stencil.order
        4
        >>> tangent_mode(get_backward("ift:max_iter=7"))
        InfinitesimalEP(solver=None, max_iter=7, tol=None, on_divergence='shrink', metric=None, correction=None)
    """
    require_equilibrium(mode)
    if not isinstance(mode, RelaxedMode):
        return InfinitesimalEP()
    # Implicit differentiation has the adjoint to fall back on, which is no tangent.
    on_divergence: OnDivergence = "shrink" if mode.on_divergence == "ift" else mode.on_divergence
    if isinstance(mode, EquilibriumPropagation) and mode.correction is None:
        return replace(mode, metric=None, on_divergence=on_divergence)
    return InfinitesimalEP(solver=mode.solver, max_iter=mode.max_iter, tol=mode.tol, on_divergence=on_divergence)
