"""Newton's method for the equilibria of a physical network, on the network's own matrix.

Where there is an energy, a step is Newton's with a matrix that is shifted until it is positive definite, so that it
goes downhill, and it is shortened until the energy falls: the search ends in a minimum, and not on a saddle. An exact
saddle, which only symmetry leads to, is left along its unstable direction. Where there is no energy, the steps are
implicit ones of the flow that grow as the force vanishes: pseudo-transient continuation (Kelley & Keyes 1998). What
neither settles is relaxed by explicit steps of the flow, and tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchdeq_ep_physics.matrices import Factor, Matrix, definite_factor

if TYPE_CHECKING:
    from torchdeq_ep_physics.system import PhysicalSystem, Theta

STEPS = 100
MARGIN = 1e-9
"""An eigenvalue above minus that, in units of the stiffness, is not negative but for rounding."""

_CLOSE = 1e3
_ROUNDING = 8.0
_EXPLICIT_STEPS = 500
_HALVINGS = 30
_ESCAPES = 8
_SMALLEST_SHIFT, _LARGEST_SHIFT = 1e-7, 1e8
_DECREASE = 1e-4
_FLAT = 1e-9


@dataclass(frozen=True)
class Search:
    """The equilibria of a batch under added forces.

    Args:
        system: The network.
        theta: Its physical parameters, detached.
        x: Input, of shape `(batch, ...)`.
        current: The added force, of shape `(batch, n_states)`.
    """

    system: PhysicalSystem
    theta: Theta
    x: Tensor
    current: Tensor

    def at(self, rows: Tensor) -> Search:
        """That of some rows."""
        return replace(self, x=self.x[rows], current=self.current[rows])

    def force(self, z: Tensor) -> Tensor:
        """The net force."""
        return self.system.force(z, self.theta, self.x) + self.current

    def energy(self, z: Tensor) -> Tensor:
        """The energy whose negative gradient, by the conjugate coordinate, is the net force."""
        return self.system.energy(z, self.theta, self.x) - (self.current * self.system.conjugate(z)).sum(1)

    def scale(self, z: Tensor) -> Tensor:
        """The stiffness, of the shape of the state."""
        return self.system.stiffness(z, self.theta, self.x).expand(z.shape)

    def limited(self, z: Tensor, move: Tensor) -> Tensor:
        """A move, shortened where the force is known to bend."""
        return self.system.limited(z, move, self.theta, self.x)

    def matrix(self, z: Tensor) -> Matrix:
        """The stiffness matrices."""
        return self.system.stiffness_matrix(z, self.theta, self.x)

    def imbalance(self, z: Tensor) -> Tensor:
        """The largest net force of each row beyond what rounding of its state makes, relative to the largest term."""
        info = torch.finfo(z.dtype)
        terms = torch.maximum(self.system.largest_term(z, self.theta, self.x), self.current.abs().amax(1))
        reach = torch.maximum(z.abs().amax(1), self.x.flatten(1).abs().amax(1) if self.x.numel() else z.new_zeros(()))
        rounding = _ROUNDING * info.eps * self.scale(z) * reach.unsqueeze(1)
        return (self.force(z).abs() - rounding).clamp_min(0.0).amax(1) / terms.clamp_min(info.tiny)


@dataclass(frozen=True)
class Stability:
    """Of each row: the smallest real part of an eigenvalue of the stiffness matrix, and whether none is negative.

    The factor is that of the matrix plus a hair (`MARGIN`), so that it exists where an eigenvalue is zero.
    """

    smallest: Tensor
    is_stable: Tensor
    matrix: Matrix
    factor: Factor


def stability(problem: Search, z: Tensor) -> Stability:
    """The stability of states.

    Args:
        problem: The problem.
        z: States, of shape `(batch, n_states)`; rows that are not finite count as unstable.

    Returns:
        Their stability.
    """
    finite = torch.isfinite(problem.force(z)).all(1)
    z = torch.where(finite.unsqueeze(1), z, torch.zeros_like(z))
    known = finite.reshape(-1, *(1 for _ in problem.x.shape[1:]))
    problem = replace(problem, x=torch.where(known, problem.x, torch.zeros_like(problem.x)))
    matrix, scale = problem.matrix(z), problem.scale(z)
    factor = matrix.factor(MARGIN * scale)
    if bool(factor.definite.all()):
        smallest = matrix.smallest(factor)
        smallest = smallest.clamp_min(0.0) if problem.system.reciprocal else smallest  # but for rounding
    else:
        smallest = torch.tensor([matrix.lowest(row)[0] for row in range(len(z))]).to(z)
    is_stable = factor.definite if problem.system.reciprocal else smallest > -MARGIN * scale.mean(1)
    return Stability(torch.where(finite, smallest, torch.nan), is_stable & finite, matrix, factor)


@dataclass(frozen=True)
class Settled:
    """What a search came to: states and their stability, the steps of the slowest row, how often a saddle was left."""

    z: Tensor
    stability: Stability
    steps: int
    escapes: int


def find(problem: Search, start: Tensor) -> Settled:
    """Search for stable equilibria.

    Args:
        problem: The problem.
        start: Where the search starts, of shape `(batch, n_states)`.

    Returns:
        The states; not necessarily equilibria, which is for others to judge.
    """
    first = problem.force(start)
    z, steps, left = _settled(problem, start)
    if bool(left.any()):
        rows = left.nonzero().squeeze(1)
        retried, more, lost = _settled(problem.at(rows), _relaxed(problem.at(rows), z[rows]))
        z, left = z.index_copy(0, rows, retried), left.index_copy(0, rows, lost)
        steps += more
    for escapes in range(_ESCAPES + 1):
        found = stability(problem, z)
        rows = (~found.is_stable & ~left).nonzero().squeeze(1)
        if not len(rows) or escapes == _ESCAPES:
            break
        directions = torch.stack([found.matrix.lowest(row)[1] for row in rows.tolist()])
        part = problem.at(rows)
        away = _leave(part, z[rows], directions, first[rows])
        reached, more, lost = _settled(part, away if problem.system.reciprocal else _relaxed(part, away))
        # Where the way from a saddle leads nowhere, the saddle is what there is.
        z = z.index_copy(0, rows, torch.where(lost.unsqueeze(1), z[rows], reached))
        left = left.index_copy(0, rows, lost)
        steps += more
    return Settled(z, found, steps, escapes)


def _settled(problem: Search, z: Tensor) -> tuple[Tensor, int, Tensor]:
    """Newton's steps until they no longer move a row; how many, and which rows are not there."""
    step = _downhill if problem.system.reciprocal else _continued
    left = torch.isfinite(problem.force(z)).all(1)
    failed = ~left
    shift = torch.zeros_like(z[:, 0]) if problem.system.reciprocal else torch.ones_like(z[:, 0])
    for count in range(1, STEPS + 1):
        rows = (left & ~failed).nonzero().squeeze(1)
        if not len(rows):
            return z, count - 1, failed
        moved, next_shift, is_done = step(problem.at(rows), z[rows], shift[rows])
        is_lost = ~torch.isfinite(moved).all(1) | (next_shift > _LARGEST_SHIFT)
        kept = torch.where(is_lost.unsqueeze(1), z[rows], moved)
        z, shift = z.index_copy(0, rows, kept), shift.index_copy(0, rows, next_shift)
        left = left.index_copy(0, rows, ~is_done)
        failed = failed.index_copy(0, rows, is_lost & ~is_done)
    return z, STEPS, left | failed


def _downhill(problem: Search, z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step that lowers the energy, the shift for the next one, and which rows have arrived."""
    r = problem.force(z)
    factor, shift = definite_factor(problem.matrix(z), shift, problem.scale(z))
    move = factor.solve(r)
    longest = move.abs().amax(1)
    move = move * (problem.system.largest_step / longest).clamp_max(1.0).unsqueeze(1)
    nearer = problem.limited(z, move)
    is_downhill = (r * problem.system.conjugate_slope(z) * nearer).sum(1, keepdim=True) > 0
    move = torch.where(is_downhill, nearer, move)
    length = _shortened(problem, z, move, r, shift)
    z_next = z + length.unsqueeze(1) * move
    is_done = (longest * (1 + shift) <= _close(z_next)) & (length == 1)
    is_stuck = length == 0
    if bool(
        is_stuck.any()
    ):  # where rounding hides the energy and the force is all but gone, nothing more is to be gained
        is_done |= is_stuck & (problem.imbalance(z) <= 1e4 * torch.finfo(z.dtype).eps)
    following = torch.where(is_stuck, (100 * shift).clamp_min(1e-2), shift / 10)
    return z_next, torch.where(following < _SMALLEST_SHIFT, torch.zeros_like(following), following), is_done


def _shortened(problem: Search, z: Tensor, move: Tensor, r: Tensor, shift: Tensor) -> Tensor:
    """The share of each move, a power of a half, that lowers the energy enough; 0 if none does."""
    before, gain = problem.energy(z), (r * problem.system.conjugate_slope(z) * move).sum(1)
    size = r.norm(dim=1)
    length = torch.ones_like(before)
    for _ in range(_HALVINGS):
        trial = z + length.unsqueeze(1) * move
        after = problem.energy(trial)
        accepted = after <= before - _DECREASE * length * gain
        if not bool(accepted.all()):
            # Rounding of the energy is no reason to stop: close to a minimum the force falls with every step.
            hidden = length * gain <= _FLAT * torch.maximum(before.abs(), after.abs())
            falls = problem.force(trial).norm(dim=1) <= torch.where(hidden, 2.0, 0.5) * size
            accepted |= falls & (shift == 0)
        if bool(accepted.all()):
            return length
        length = torch.where(accepted, length, length / 2)
    return torch.where(accepted, length, torch.zeros_like(length))


def _continued(problem: Search, z: Tensor, friction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An implicit step of the flow, the friction for the next one, and which rows have arrived."""
    r = problem.force(z)
    move = problem.matrix(z).factor(friction.unsqueeze(1) * problem.scale(z)).solve(r)
    longest = move.abs().amax(1)
    z_next = z + move * (problem.system.largest_step / longest).clamp_max(1.0).unsqueeze(1)
    loss = problem.force(z_next).norm(dim=1) / r.norm(dim=1).clamp_min(torch.finfo(z.dtype).tiny)
    friction = (friction * loss.clamp(0.1, 3.3)).clamp(1e-12, 1e2)
    return z_next, friction, longest <= _close(z_next)


def _close(z: Tensor) -> Tensor:
    """A move of each row that is rounding."""
    return _CLOSE * torch.finfo(z.dtype).eps * z.abs().amax(1).clamp_min(1.0)


def _relaxed(problem: Search, z: Tensor) -> Tensor:
    """Explicit steps of the flow, each as long as the stiffness allows."""
    for _ in range(_EXPLICIT_STEPS):
        move = problem.force(z) / problem.scale(z)
        longest = move.abs().amax(1, keepdim=True)
        following = z + move * (problem.system.largest_step / longest).clamp_max(0.5)
        z = torch.where(torch.isfinite(following).all(1, keepdim=True), following, z)
        if bool((longest.squeeze(1) <= _close(z)).all()):
            break
    return z


def _leave(problem: Search, z: Tensor, direction: Tensor, first: Tensor) -> Tensor:
    """A state beside a saddle, along its unstable direction and lower in energy if there is one.

    Where both sides are equal, the force at the start of the search says which it is.
    """
    unit = direction / direction.abs().amax(1, keepdim=True)
    sign = torch.where((unit * first).sum(1, keepdim=True) < 0, -1.0, 1.0).to(z)
    reach = min(0.1, problem.system.largest_step)
    if not problem.system.reciprocal:
        return z + reach * sign * unit
    before = problem.energy(z)
    for _ in range(_HALVINGS):
        sides = [z + side * reach * sign * unit for side in (1.0, -1.0)]
        energies = torch.stack([problem.energy(side) for side in sides])
        clear = energies[1] < energies[0] - 1e-9 * (before - energies[0]).abs()
        chosen = torch.where(clear.unsqueeze(1), sides[1], sides[0])
        if bool((energies.amin(0) < before).all()):
            break
        reach /= 2
    return chosen
