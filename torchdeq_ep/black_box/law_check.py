"""Whether the law that is differentiated is that of the system that is solved, from states that were measured anyway.

At the free state `F(z*) = 0`, and at each nudged one `F(z_b) + b p = 0` for the force `b p` that was added. Both hold
at any amplitude and for any system, reciprocal or not, so what is left of them is not truncation. It is noise of the
states, or another law than the solver's. How much of it noise explains, more values of the law tell: at the scatter of
the repeats, and at states moved at random by the error of a solve.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchdeq_ep.errors import ConvergenceWarning, LawMismatchError
from torchdeq_ep.state import norm, row_dots

MISMATCH = 0.1
"""The part of the added force that may be missing in the law without an error."""

UNSETTLED = 0.01
"""The part of its norm by which the force left at the free state may move it without a warning."""

_SIGMAS = 5.0
_DRAWS = 16
_ROUNDINGS = 4.0
_PARALLEL = 0.9
_STILL = 3.0
_SHALLOW = 0.1
_UNITS_DECADE = 10.0


@dataclass(frozen=True)
class LawCheck:
    """How far a force law is from the system whose states were measured.

    Each number but the last four comes with the part of it that errors of the states explain, with room for chance; 0
    if there was no need to ask.

    Args:
        residual: `|F(z_b) - F(z*) + b p| / |b p|`, at the nudge where it is largest.
        residual_noise: See above.
        free_residual: `|F(z*)|` in units of the force that would move the state by its own norm.
        free_noise: See above.
        factor: How many times the added forces the law's changes are, along these: 1 where they agree.
        factor_noise: See above.
        work: The part of the work of the added forces that the law does not account for. Where a system is stiff, noise
            hides the forces and not the work.
        work_noise: See above.
        cosine: Between the law's changes and those wanted.
        moved: How far the largest nudge moved the state, relative to its norm.
        error: How far errors of the solves move it.
        unsettled: Whether the force left at the free state is more than a tenth of the largest added one.

    Example:
        >>> LawCheck(residual=2.0, free_residual=0.0, factor=-1.0, cosine=-1.0, moved=0.1).is_wrong
        True
    """

    residual: float
    free_residual: float
    residual_noise: float = 0.0
    free_noise: float = 0.0
    factor: float = 1.0
    factor_noise: float = 0.0
    work: float = 0.0
    work_noise: float = 0.0
    cosine: float = 1.0
    moved: float = math.nan
    error: float = 0.0
    unsettled: bool = False

    @property
    def is_wrong(self) -> bool:
        """Whether law and system differ by more than a tenth beyond the noise."""
        beyond = (
            self.residual - self.residual_noise,
            self.free_residual - self.free_noise,
            abs(self.factor - 1) - self.factor_noise,
            self.work - self.work_noise,
        )
        return any(excess > MISMATCH for excess in beyond)

    @property
    def may_be_cut_off(self) -> bool:
        """Whether readings that do not follow the nudges would explain it."""
        settled = self.free_residual - self.free_noise <= MISMATCH
        return settled and 1 / _UNITS_DECADE < self.factor < _UNITS_DECADE

    def require_agreement(self) -> None:
        """Refuse a law that is not that of the system, and warn of a free state that is not quite an equilibrium.

        Raises:
            LawMismatchError: If so, with the likeliest cause first.
        """
        if self.is_wrong:
            raise LawMismatchError(
                "force and solve do not belong to the same system. Where a current is added, force changes by "
                f"{-self.factor:+.4g} times the current instead of -1 times; the mismatch is {self.residual:.2g} of "
                f"it, and noise explains {min(self.residual_noise, self.residual):.1g}. The force left at the free "
                f"state would move it by {self.free_residual:.1g} of its norm. Likeliest: {self._likeliest()} If "
                "force is meant to be only the part of the law that depends on theta and x, say check=False: the law "
                "is then taken on trust."
            )
        if self.free_residual - self.free_noise > UNSETTLED:
            warnings.warn(
                f"the free state is not quite an equilibrium of force: what is left of it would move the state by "
                f"{self.free_residual:.1%} of its norm. The gradient is approximate. Let solve converge further. If "
                f"this is its resolution, say noise={self.free_residual:.0e}; if force is only the part of the law "
                "that depends on theta and x, check=False.",
                ConvergenceWarning,
                stacklevel=2,
            )

    def _likeliest(self) -> str:
        """The cause that the numbers speak for, and what to do."""
        if not math.isfinite(self.residual + self.free_residual):
            return "force is not finite at the states that solve found. Use a smaller beta, or another force."
        if self.moved <= _STILL * self.error:
            return "solve ignores the current: the state did not move. Add the current to the forces that balance."
        if self.unsettled or self.free_residual - self.free_noise > MISMATCH:
            resolution = max(self.residual * self.moved, self.free_residual)
            known = f", or give its error as noise={resolution:.0e}" if resolution < MISMATCH else ""
            return (
                f"solve has not converged. Let it converge further{known}, or use a larger beta. Else force lacks a "
                "part that acts in solve, or has other parameters."
            )
        if abs(self.cosine) < _PARALLEL:
            return (
                "force lacks a part that acts in solve, or has other parameters. Else solve has not converged; or "
                "readings are noisy, and need repeats= or noise=; or they are cut off, and need a smaller beta."
            )
        size = abs(self.factor)
        if self.factor < 0 and abs(size - 1) <= MISMATCH:
            return "force has the wrong sign. Return -F, or let solve add the current, if it subtracts it."
        sign = ", and has the wrong sign" if self.factor < 0 else ""
        return f"force is in units {size:.4g} times those of the current{sign}. Divide it by {self.factor:.4g}."


@dataclass(frozen=True)
class Phases:
    """States of the free and the nudged phases, and the law at them.

    Args:
        law: The force at a state, without a graph.
        free: The free state, as often as it was solved: `(repeats, ...)`.
        nudged: The nudged ones: `(nudges, repeats, ...)`.
        amplitudes: One for each nudge.
        direction: The force at amplitude 1.
        size: The norm that errors of the state are relative to.

    Example:
        >>> free, nudged = torch.tensor([[0.5]]), torch.tensor([[[0.6]], [[0.4]]])
        >>> phases = Phases(lambda z: 1 - 2 * z, free, nudged, [0.2, -0.2], torch.ones(1), size=0.5)
        >>> round(phases.check(0.0, False).residual, 6)
        0.0
        >>> phases = Phases(lambda z: 2 * z - 1, free, nudged, [0.2, -0.2], torch.ones(1), size=0.5)
        >>> round(phases.check(0.0, False).residual, 6)
        2.0
    """

    law: Callable[[Tensor], Tensor]
    free: Tensor
    nudged: Tensor
    amplitudes: Sequence[float]
    direction: Tensor
    size: float

    def check(self, error: float, systematic: bool) -> LawCheck:
        """Compare the law with the system.

        Args:
            error: Of one solve, relative to the state.
            systematic: Whether repeats share it, so that they do not average it.

        Returns:
            What was found. The noise is asked for only if something is amiss.
        """
        rest, states = self.free.mean(0), self.nudged.mean(1)
        at_rest = self.law(rest)
        changes = torch.stack([self.law(state) for state in states]) - at_rest
        b = torch.tensor(self.amplitudes, dtype=changes.dtype, device=changes.device)
        p, square = self.direction.to(changes), float(b.square().sum())
        added = b.abs() * norm(p)
        left = (changes + torch.einsum("k,...->k...", b, p)).flatten(1).norm(dim=1) / added
        # The sums over the nudges of b times the change of the law, and of the state.
        total, path = (torch.einsum("k,k...->...", b, each.to(b)) for each in (changes, states - rest))
        work = max(abs(_dot(p, path)), _SHALLOW * norm(p) * norm(path)) * square
        moved = max(norm(state - rest) for state in states)
        to_state = moved / float(added.max()) / self.size
        first = LawCheck(
            residual=_or_infinite(float(left.max())),
            free_residual=_or_infinite(norm(at_rest) * to_state),
            factor=-_dot(total, p) / square / norm(p) ** 2,
            work=abs(_dot(total + square * p, path)) / work if work else 0.0,
            cosine=-_dot(total, p) / (norm(total) * norm(p)) if norm(total) else 0.0,
            moved=moved / self.size,
            error=error,
        )
        is_settled = first.free_residual <= UNSETTLED
        if (is_settled and not first.is_wrong) or not math.isfinite(first.residual + first.free_residual):
            return first
        weight = math.sqrt(square + float(b.sum()) ** 2)
        size, along, lost = 0.0, 0.0, 0.0
        for deviations, effects, freedom in self._scatter(error, systematic):
            room = _SIGMAS * (1 + _SIGMAS / freedom) / math.sqrt(freedom)
            mixed = weight * (row_dots(effects, path) + row_dots(deviations, total + square * p))
            size = max(size, room * norm(effects))
            along = max(along, room * weight * norm(row_dots(effects, p)))
            lost = max(lost, room * norm(mixed + weight**2 * (effects * deviations).flatten(1).sum(1)))
        return replace(
            first,
            residual_noise=math.sqrt(2) * size / float(added.min()),
            free_noise=size * to_state,
            factor_noise=along / square / norm(p) ** 2,
            work_noise=lost / work if work else 0.0,
            unsettled=norm(at_rest) - size > MISMATCH * float(added.max()),
        )

    def _scatter(self, error: float, systematic: bool) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Errors of the mean states, what they make of the law's values, and how many of them are independent."""
        rest, repeats = self.free.mean(0), len(self.free)
        # A generator of its own: the user's random numbers are not touched.
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(_DRAWS, *rest.shape, generator=generator, dtype=torch.float64).to(rest)
        averaged = error if systematic else error / math.sqrt(repeats)
        draws = draws * (averaged * self.size / math.sqrt(rest.numel()))
        yield draws, self._effects(rest, draws), _DRAWS
        if repeats > 1 and not systematic:
            phases = [self.free, *self.nudged]
            deviations = [(phase - phase.mean(0)) / math.sqrt(repeats) for phase in phases]
            effects = [self._effects(p.mean(0), several) for p, several in zip(phases, deviations, strict=True)]
            yield torch.cat(deviations), torch.cat(effects), len(phases) * (repeats - 1)

    def _effects(self, state: Tensor, deviations: Tensor) -> Tensor:
        value = self.law(state)
        return torch.stack([self.law(state + deviation) - value for deviation in deviations])


def rounding_of_a_solve(eps: float) -> float:
    """The error that a solver is granted whose tolerance is the rounding of its dtype.

    Args:
        eps: Relative rounding error of one operation.

    Returns:
        A few times that.

    Example:
        >>> rounding_of_a_solve(1e-7)
        4e-07
    """
    return _ROUNDINGS * eps


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
