"""What a comparison measured of one backward mode."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One backward mode, driven by one solver. Figures that do not exist are NaN.

    Args:
        backward: Name or spec of the mode.
        solver: Name of the solver, or `"own"` for the one that the mode comes with.
        adjoint_error: Norm of the difference between the error vector and the exact adjoint, relative to the latter.
        adjoint_cosine: Cosine of the angle between the two.
        gradient_error: The same for the gradient, of the parameters that it reaches through an equilibrium.
        gradient_cosine: Cosine of the angle between this gradient and the exact one.
        residual: Largest relative residual at which a solve stopped.
        calls: Evaluations of the map and products with its Jacobian.
        milliseconds: Median time of the backward solve alone.
        peak_mib: Largest amount of memory that the solve held beyond what was there before, in MiB.
        beta: Largest relative amplitude of a nudge; 0 for a mode without one.
        converged: Whether every solve did; `None` where the mode does not tell.
        warnings: What the mode warned about, in short.
        error: Why the mode has no figures, or an empty text.
        usable: Whether every estimate was one: not diverged, with a residual of 0.1 at most; `None` as above.
        adjoint_residual: Largest residual `|v - J^T v - g| / |g|` of an error vector in the exact equation: what a
            training run [reports](certificate.md) where the error itself is not known.
        other_error: As `gradient_error`, relative to the other gradient that may be called exact: that through the
            steps made, or, with `exact="steps"`, that of the equilibrium.
        step_milliseconds: Median time of a forward and backward pass of the whole model.
        nudge_error: Largest [error of a finite amplitude](certificate.md#nudge-error) that a solve reported.

    Example:
        >>> row = Row("ep", "anderson", gradient_error=1e-3, error="")
        >>> row.label, row.notes
        ('ep / anderson', ())
    """

    backward: str
    solver: str
    adjoint_error: float = math.nan
    adjoint_cosine: float = math.nan
    gradient_error: float = math.nan
    gradient_cosine: float = math.nan
    residual: float = math.nan
    calls: float = math.nan
    milliseconds: float = math.nan
    peak_mib: float = math.nan
    beta: float = math.nan
    converged: bool | None = None
    warnings: tuple[str, ...] = ()
    error: str = ""
    usable: bool | None = None
    adjoint_residual: float = math.nan
    nudge_error: float = math.nan
    other_error: float = math.nan
    step_milliseconds: float = math.nan

    @property
    def label(self) -> str:
        """The mode, and the solver unless it is the mode's own."""
        return self.backward if self.solver == "own" else f"{self.backward} / {self.solver}"

    @property
    def notes(self) -> tuple[str, ...]:
        """The error, or the warnings."""
        return (self.error,) if self.error else self.warnings
