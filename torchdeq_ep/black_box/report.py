"""What a backward pass through a black box did, and how well the gradient it measured is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from torchdeq_ep._display import html_fields
from torchdeq_ep.black_box.containers import map_tensors
from torchdeq_ep.errors import InvalidOptionError


@dataclass(frozen=True)
class EquilibriumReport:
    """What the nudged phases of one backward pass did, and how well the gradient is known.

    Args:
        stencil: Name of the stencil.
        beta: Amplitude used, after `"auto"`.
        nudge: Factor of the cotangent in the added force: `beta` times the scale.
        noise: Relative error of one solve that the amplitude was chosen for: measured from the repeats of the free
            phase, or given, or the rounding error of the dtype.
        signal_to_noise: How far the largest nudge moved the state, in units of that error.
        calls: Solves asked for: the free phase, pilots and nudged phases.
        failures: Solves that failed and were repeated.
        standard_error: That of the gradient, for `theta`, in the form of `theta`; `None` without repeats.
        standard_error_x: Likewise for `x`.
        degrees_of_freedom: Of the standard errors (Welch and Satterthwaite).
        law_residual: How far the law is from the system: the mismatch between the change of `force` from the free to a
            nudged state and the current that was added, relative to that current, where it is largest. 0 is right,
            1 is no answer to the current, 2 the wrong sign. NaN with `check=False`.
        law_noise: The part of it that errors of the states explain; 0 if it was too small to ask.
        free_residual: `force` at the free state, in units of the current that would move the state by its norm.
        reciprocity: With `check="reciprocity"`, how far the system is from a reciprocal one: an estimate, from one
            random direction, of the error of the error vector, relative to it. Else NaN.

    Example:
        >>> report = EquilibriumReport("symmetric", 0.1, 0.1, 0.01, 9.0, calls=9, failures=0)
        >>> report.signal_to_noise, report.standard_error is None
        (9.0, True)
    """

    stencil: str
    beta: float
    nudge: float
    noise: float
    signal_to_noise: float
    calls: int
    failures: int
    standard_error: Any = None
    standard_error_x: Any = None
    degrees_of_freedom: float = math.nan
    law_residual: float = math.nan
    law_noise: float = math.nan
    free_residual: float = math.nan
    reciprocity: float = math.nan

    def _repr_html_(self) -> str:
        return html_fields(self)

    def interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """Half widths of the confidence intervals for `theta` and `x`, by Student's distribution.

        Args:
            level: Probability that an interval holds the value that a noiseless solver would give.

        Returns:
            In the forms of `theta` and `x`.

        Raises:
            InvalidOptionError: If the level is not between 0 and 1, or nothing was repeated.

        Example:
            >>> import torch
            >>> report = EquilibriumReport("symmetric", 0.1, 0.1, 0.01, 9.0, 9, 0, torch.tensor([0.5]), None, 6.0)
            >>> report.interval()[0]
            tensor([1.2234])
        """
        if not 0 < level < 1:
            raise InvalidOptionError(f"level must lie between 0 and 1, not be {level!r}.")
        if self.standard_error is None and self.standard_error_x is None:
            raise InvalidOptionError("there is no interval without a standard error: use repeats=2 or more.")
        factor = student_quantile(0.5 + level / 2, self.degrees_of_freedom)
        first, second = (
            map_tensors(tree, lambda t: factor * t) for tree in (self.standard_error, self.standard_error_x)
        )
        return first, second


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's distribution, to 1 % from two degrees of freedom on (Abramowitz & Stegun 26.7.5)."""
    x = NormalDist().inv_cdf(probability)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
