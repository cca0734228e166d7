"""Nudged phases: the nodes of a stencil solved one after the other, in stacks, or in turn as an online learner would.

Each returns `Re sum_k c_k d_k`, with `d_k` the displacement per unit of nudge at node `b_k`, and a report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from torchdeq_ep._options import check_count
from torchdeq_ep.holomorphic import Piecewise
from torchdeq_ep.modes.amplitude import Amplitude
from torchdeq_ep.modes.force import NudgedProblem
from torchdeq_ep.modes.judgement import FreeLimit, is_converged
from torchdeq_ep.modes.nudged_map import NudgedMap
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.modes.stencils import Node
from torchdeq_ep.relaxation import Run
from torchdeq_ep.state import norm

_SHARE, _MUCH = 0.2, 3e-3


@dataclass(frozen=True)
class Online:
    """The online schedule: nodes are visited in turn, each from where the one before left off.

    Args:
        steps: Steps of the map at each node.
        periods: How often the whole circle of nodes is visited; the estimate is the mean over the periods.

    Raises:
        InvalidOptionError: If a number is not a whole one of at least 1.

    Example:
        >>> Online(steps=10, periods=4)
        Online(steps=10, periods=4)
    """

    steps: int = 20
    periods: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "periods"):
            check_count(f"{name} of an online schedule", getattr(self, name))


@dataclass(frozen=True)
class NudgedPhases:
    """The nudged phases of one solve at one amplitude.

    Args:
        problem: What is nudged.
        amplitude: How far.
        start: First guess of the displacement.
        run: The relaxation that solves a stack of nodes.
        tol: The residual to which it does.
        accepted: The largest residual with which a node counts as converged.
        limited: Whether rows are solved no further than their free phase warrants.
        starts_at_limit: Whether the first guess is the limit of vanishing nudges, and the amplitude one of our choice.
        piecewise: See [`NudgedMap`][torchdeq_ep.modes.nudged_map.NudgedMap].
    """

    problem: NudgedProblem
    amplitude: Amplitude
    start: Tensor
    run: Run
    tol: float
    accepted: float
    limited: bool
    starts_at_limit: bool
    piecewise: Piecewise | None = None

    def parallel(self, stacked: bool) -> tuple[Tensor, NudgeReport]:
        """Each group of nodes started from the polynomial in `b` through those solved before."""
        nodes, coefficients = self.amplitude.stencil.upper_half()
        report = NudgeReport("")
        solved: dict[Node, Tensor] = {}
        for group in _groups(nodes, stacked):
            displacements, phase = self._relax(group, solved)
            solved.update(zip(group, displacements, strict=True))
            report = report + phase
        if any(isinstance(node, complex) for node in nodes):
            decay = _contour_decay([solved[node] for node in nodes], isinstance(nodes[-1], complex))
            radius = self.amplitude.relative / decay if decay else math.nan
            report = replace(report, truncation=decay**self.amplitude.stencil.order, radius=radius)
        report = replace(report, spread=_spread(solved))
        total = sum(c * solved[node].real for node, c in zip(nodes, coefficients, strict=True))
        return cast(Tensor, total), report

    def online(self, schedule: Online) -> tuple[Tensor, NudgeReport]:
        """Each node started from the last, a fixed number of steps each, averaged over periods."""
        nodes, coefficients = self.amplitude.stencil.upper_half()
        force, force_size = self.problem.force, self.problem.force_size
        maps = [self._map((node,)) for node in nodes]
        d, total = force.unsqueeze(0), torch.zeros_like(force)
        report = NudgeReport("")
        for _ in range(schedule.periods):
            for coefficient, nudged in zip(coefficients, maps, strict=True):
                states = nudged.states(d if nudged.is_complex else d.real)
                for _ in range(schedule.steps):
                    last, states = states, nudged(states)
                d = nudged.displacements(states)
                residual = norm(states - last) / (nudged.smallest * force_size)
                report = report + self._count(1, schedule.steps, (residual,))
                total += coefficient / schedule.periods * d[0].real
        final = report.trace[-1]
        crossings = tuple(crossing for nudged in maps for crossing in nudged.crossings)
        return total, replace(
            report,
            residual=final,
            solved=final,
            converged=final <= self.accepted,
            diverged=not math.isfinite(final),
            crossings=crossings,
        )

    def _enough(self, nudged: NudgedMap) -> FreeLimit:
        origin = nudged.free
        origin = torch.view_as_real(origin) if origin.is_complex() else origin
        return FreeLimit(self.problem.equilibrium, self.problem.force, origin, nudged.smallest)

    def _map(self, nodes: tuple[Node, ...]) -> NudgedMap:
        problem = self.problem
        return NudgedMap(
            problem.equilibrium,
            tuple(self.amplitude.factor * node for node in nodes),
            problem.force,
            correction=problem.correction,
            state_force=problem.state_force,
            piecewise=self.piecewise,
        )

    def _guess(self, nodes: tuple[Node, ...], solved: dict[Node, Tensor]) -> Tensor:
        if not solved:
            return self.start.expand(len(nodes), *self.start.shape)
        return torch.stack([_extrapolate(solved, node) for node in nodes])

    def _relax(self, nodes: tuple[Node, ...], solved: dict[Node, Tensor]) -> tuple[Tensor, NudgeReport]:
        nudged, force_size = self._map(nodes), self.problem.force_size
        # In the unit of the smallest nudge of the stack, no displacement is less accurate than asked.
        scale, steps = nudged.smallest * force_size, 0
        options: dict[str, Any] = {}
        alone = self.limited and len(nodes) == 1
        if alone and self.starts_at_limit:
            # The guess is the limit, so the first residual is what the size of the nudge adds. Where that is much,
            # because of kinks or of a Jacobian that amplifies, a fifth of it will do, and steps that gain nothing end.
            # Where it is more than the force itself, a displacement that far away says nothing of the limit.
            before = nudged.states(self._guess(nodes, solved))
            first, steps = nudged(before), 1
            added = norm(first - before) / scale
            if added > _MUCH:
                options = {"tol": max(self.tol, _SHARE * added), "floor": added}
            if added > 1:
                options["max_iter"] = 1
            del before
        enough = self._enough(nudged) if alone else None
        # No name is given to guesses and states where that can be, for it would keep them in memory.
        relaxation = self.run(
            nudged,
            first if steps else nudged.states(self._guess(nodes, solved)),
            scale=scale,
            enough=enough,
            **options,
        )
        displacements = nudged.displacements(relaxation.value)
        relaxation = relaxation.after(norm(displacements), force_size)
        counted = self._count(len(nodes), steps + relaxation.steps, relaxation.trace)
        report = replace(
            counted,
            residual=relaxation.residual,
            converged=is_converged(relaxation, self.accepted),
            diverged=relaxation.diverged,
            rows_left=relaxation.left,
            solved=relaxation.solved,
            crossings=nudged.crossings,
        )
        return displacements, report

    def _count(self, nodes: int, steps: int, trace: tuple[float, ...]) -> NudgeReport:
        calls = self.problem.calls_of_a_step * nodes * steps
        batching = "vmap" if nodes > 1 else "loop"
        return NudgeReport("", calls=calls, iterations=steps, batching=batching, trace=trace)


def _groups(nodes: tuple[Node, ...], stacked: bool) -> list[tuple[Node, ...]]:
    """The nodes in the order in which they are solved, real ones first; those of a group together."""
    real = [node for node in nodes if not isinstance(node, complex)]
    others = [node for node in nodes if isinstance(node, complex)]
    if stacked:
        return [tuple(group) for group in (real, others) if group]
    ordered: list[Node] = list(real)
    while others:  # the node farthest from all before it (Leja), else high-degree polynomials would not interpolate
        known = ordered + [node.conjugate() for node in ordered if isinstance(node, complex)]
        farthest = max(others, key=lambda node: math.prod(abs(node - other) for other in known))
        ordered.append(farthest)
        others.remove(farthest)
    return [(node,) for node in ordered]


def _extrapolate(solved: dict[Node, Tensor], node: Node) -> Tensor:
    """The polynomial through the displacements known, those at conjugate nodes included, at another node."""
    known = dict(solved)
    for point, displacement in solved.items():
        if isinstance(point, complex):
            known[point.conjugate()] = displacement.conj()
    total: Tensor | float = 0.0
    for point, displacement in known.items():
        weight = math.prod((node - other) / (point - other) for other in known if other != point)
        total = total + weight * displacement
    return cast(Tensor, total)


def _spread(solved: dict[Node, Tensor]) -> float:
    """Half the difference of displacements at the two farthest opposite real nodes, relative to their mean."""
    pairs = [node for node in solved if not isinstance(node, complex) and node > 0 and -node in solved]
    if not pairs:
        return math.nan
    forth, back = solved[max(pairs)].real, solved[-max(pairs)].real
    mean = norm(forth + back)
    return norm(forth - back) / mean if mean > 0 else math.nan


def _contour_decay(half: list[Tensor], odd: bool) -> float:
    """How much smaller each Fourier coefficient of the displacement over the whole circle is than the one before.

    Coefficient `j` is `a_j beta^j` for a displacement `sum_j a_j b^j`, so by the root test the ratio is
    `beta / radius`, and the first one that the trapezoidal rule takes for the mean is of relative size
    `ratio^n_points`.

    Args:
        half: Displacements on the closed upper half circle, in order.
        odd: Whether the number of points on the whole circle is odd, so that -beta is none of them.
    """
    mirrored = half[1:] if odd else half[1:-1]
    circle = torch.stack([d.to(half[1].dtype) for d in half] + [d.conj() for d in reversed(mirrored)])
    sizes: list[float] = torch.linalg.vector_norm(torch.fft.fft(circle, dim=0).flatten(1), dim=1).tolist()
    return max(math.pow(size / sizes[0], 1 / j) for j, size in enumerate(sizes) if j > 0)
