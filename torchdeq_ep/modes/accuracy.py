"""How far an error vector that finite nudges gave is from their limit: measured, not estimated from the amplitude.

In the limit the displacement solves `D_0(d) = d` ([eq. (6)][eq-6] of the theory page). `D_b` at a small real `b` stands
for `D_0`, whatever the stencil: the mean over `b` and `-b` is off by `O(b^2)`. So two calls of `f`, without any solve,
say what curvature, kinks, a contour beyond the radius of convergence and rounding have done together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from torchdeq_ep.modes.amplitude import Amplitude
from torchdeq_ep.modes.force import NudgedProblem
from torchdeq_ep.modes.nudged_map import NudgedMap
from torchdeq_ep.modes.stencils import Stencil
from torchdeq_ep.state import norm

FACTOR = 3.0
"""Amplitudes are made smaller by powers of this, so that they stay as they are from one pass to the next."""

_SMALLEST_FACTOR = FACTOR**-5
_WORTH_IT, _OF_TOL = 10.0, 3.0
_EXPLAINED = 2.0
_ALIKE = 2.0
_BLURRED, _BENT, _OF_SPREAD = 0.005, 0.13, 0.35
_NEARER = 30.0
_LEGIBLE, _SHARP, _CLEAR = 2e2, 1e3, 1e4


@dataclass(frozen=True)
class NudgeError:
    """What the finite amplitude of a nudge adds to the error vector, relative to the force.

    Args:
        size: The residual of the estimate in the limit, without what the solve left, and rounding.
        calls: Calls of `f` that measuring took.

    Example:
        >>> NudgeError(0.02, 2).size
        0.02
    """

    size: float
    calls: int


def measured_nudge_error(
    problem: NudgedProblem, amplitude: Amplitude, displacement: Tensor, residual: float, spread: float = math.nan
) -> NudgeError:
    """The residual of a displacement in the equation of vanishing nudges.

    Args:
        problem: What was nudged.
        amplitude: How far.
        displacement: The estimate.
        residual: What the solve left, relative to the force.
        spread: How much the response bends within the nudge: where rounding hides everything below, a kink may be why.

    Returns:
        The error.
    """
    growth = max(norm(displacement) / problem.force_size, 1.0)
    reach = float(Stencil.symmetric().resolve(amplitude.eps).beta) / growth
    own = amplitude.relative * min(abs(node) for node in amplitude.stencil.unit_nodes)
    beta = _checked_at(own, reach, amplitude.noise)
    nudge = beta * problem.unit
    mean = (_moved_once(problem, nudge, displacement) + _moved_once(problem, -nudge, displacement)) / 2
    found = norm(mean - displacement) / problem.force_size
    blur = _EXPLAINED * amplitude.noise / beta
    explained = math.hypot(residual, blur)
    is_blurred, is_as_coarse = blur > _BLURRED, beta < _ALIKE * own
    # Of the rounding in the estimate a larger nudge than its own tells, down to its own blur.
    unseen = amplitude.expected_rounding if is_as_coarse else min(amplitude.expected_rounding, blur)
    if is_blurred and is_as_coarse:
        # The estimate was rounded as coarsely as the check: what is above the mean of such errors may be its own.
        unseen = max(unseen, _beyond(found, math.hypot(residual, blur / _EXPLAINED)))
    if is_blurred and spread > _BENT:
        unseen = max(unseen, _OF_SPREAD * spread)
    error = math.hypot(_beyond(found, explained), unseen)
    return NudgeError(error, calls=2 * problem.calls_of_a_step)


def _beyond(found: float, explained: float) -> float:
    """What is left of an error if another, independent one is taken out; a square of a number may be none."""
    return math.sqrt(max((found - explained) * (found + explained), 0.0))


def _moved_once(problem: NudgedProblem, nudge: float, displacement: Tensor) -> Tensor:
    nudged = NudgedMap(
        problem.equilibrium,
        (nudge,),
        problem.force,
        correction=problem.correction,
        state_force=problem.state_force,
    )
    return nudged.displacements(nudged(nudged.states(displacement.unsqueeze(0))))[0]


def _checked_at(own: float, reach: float, noise: float) -> float:
    """Much nearer than the estimate went, since kinks close by are crossed by both; but where rounding is not all."""
    near = min(own / _ALIKE, max(own / _NEARER, _CLEAR * noise), reach)
    if near >= _SHARP * noise:
        return near
    coarse = max(own / _NEARER, _LEGIBLE * noise)
    return coarse if coarse <= own / _ALIKE else min(reach, _CLEAR * noise)


def smaller_factor(error: float, amplitude: Amplitude, tol: float) -> float:
    """By what to divide an amplitude whose error is larger than rounding and tolerance make unavoidable.

    Rounding grows as the amplitude falls; the two are balanced. A contour's error is of the order of its points; that
    of real nodes is taken to be of the first, which kinks make of every order.

    Args:
        error: Measured, relative to the force.
        amplitude: At which it was.
        tol: To which the phases are solved.

    Returns:
        A power of three; 1 where nothing is to be gained.

    Example:
        >>> amplitude = Amplitude(Stencil.symmetric(0.01), "relative", unit=1.0, eps=1e-7)
        >>> smaller_factor(0.1, amplitude, 1e-4), smaller_factor(1e-4, amplitude, 1e-4)
        (81.0, 1.0)
    """
    if not error > max(_WORTH_IT * amplitude.rounding, _OF_TOL * tol):
        return 1.0
    order = 1 if amplitude.stencil.is_real else amplitude.stencil.order
    best = max((amplitude.rounding / error) ** (1 / (order + 1)), _SMALLEST_FACTOR)
    return float(FACTOR ** round(-math.log(best, FACTOR)))
