"""Which gradient for this model? Two may be called exact: which one is it near, and what does being near one cost?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchdeq_ep.measuring.rows import Row
    from torchdeq_ep.measuring.tables import Comparison

SHARES = (0.01, 0.05, 0.2)
"""How near is near."""
_SAME = 0.01
"""Two gradients that differ by less are one for the purposes of training."""


def cheapest_within(rows: Sequence[Row], share: float) -> Row | None:
    """The mode whose forward and backward pass takes least time, of those whose gradient is near enough.

    Args:
        rows: Of a comparison.
        share: The largest relative error of the gradient.

    Returns:
        A row, or `None` if none is near enough.

    Example:
        >>> from torchdeq_ep.measuring.rows import Row
        >>> rows = [Row("ift", "own", gradient_error=1e-6, step_milliseconds=3.0)]
        >>> rows.append(Row("one-step", "own", gradient_error=0.15, step_milliseconds=1.0))
        >>> cheapest_within(rows, 0.01).label, cheapest_within(rows, 0.2).label
        ('ift', 'one-step')
    """
    near = [row for row in rows if row.gradient_error <= share and math.isfinite(row.step_milliseconds)]
    return min(near, key=lambda row: row.step_milliseconds, default=None)


def ranking(comparison: Comparison) -> str:
    """What a comparison says of the choice, in sentences.

    Args:
        comparison: The comparison.

    Returns:
        Text that begins with a space; empty if there is neither a gradient through the steps made nor a time.
    """
    return "".join(f" {sentence}" for sentence in (_two_gradients(comparison), _cheapest(comparison)) if sentence)


def _two_gradients(comparison: Comparison) -> str:
    if math.isnan(comparison.gap):
        return ""
    of_equilibrium, of_steps = comparison.own_errors
    if comparison.gap <= _SAME:
        return f"The gradients of the equilibrium and of the steps made are the same here, to {comparison.gap:.1%}."
    apart = f"The gradients of the equilibrium and of the steps made are {comparison.gap:.0%} apart"
    if math.isnan(of_equilibrium + of_steps):
        return f"{apart}; errors are relative to that of the {comparison.exact}."
    near, error = ("equilibrium", of_equilibrium) if of_equilibrium < of_steps else ("steps", of_steps)
    return (
        f"{apart}; that of the model as it is is closer to that of the {near} ({error:.0%} off), and errors are "
        f"relative to that of the {comparison.exact}."
    )


def _cheapest(comparison: Comparison) -> str:
    found: dict[str, list[str]] = {}
    for share in SHARES:
        row = cheapest_within(comparison.rows, share)
        label = "none" if row is None else f"{row.label} ({row.step_milliseconds:.3g} ms)"
        found.setdefault(label, []).append(f"{share:.0%}")
    if set(found) == {"none"}:
        return ""
    parts = [f"within {_listed(shares)} {label}" for label, shares in found.items()]
    return f"Cheapest for a whole step: {'; '.join(parts)}."


def _listed(words: list[str]) -> str:
    return " and ".join(word for word in (", ".join(words[:-1]), words[-1]) if word)
