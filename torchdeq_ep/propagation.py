"""Equilibrium propagation: nudged phases at the nodes of a stencil, combined to an error vector."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor

from torchdeq_ep.backward import (
    Correction,
    ImplicitDifferentiation,
    NudgeReport,
    RelaxedBackward,
    check_metric_and_correction,
)
from torchdeq_ep.displacement import AsymmetricCorrection, NudgedMap, diagonal_metric, loss_force
from torchdeq_ep.equilibrium import Equilibrium, norm
from torchdeq_ep.errors import (
    ConvergenceWarning,
    FallbackWarning,
    InvalidOptionError,
    LossMismatchWarning,
    NonFiniteError,
    NudgeDivergedError,
    PrecisionWarning,
    TruncationWarning,
    unknown_name,
)
from torchdeq_ep.holomorphic.mode import Crossing, Piecewise
from torchdeq_ep.metric import Metric
from torchdeq_ep.relaxation import Relaxation
from torchdeq_ep.stencils import Node, Stencil

Batching = Literal["auto", "loop", "vmap"]
OnDivergence = Literal["shrink", "raise", "accept", "ift"]

_STENCILS: dict[str, Callable[[], Stencil]] = {
    "one-sided": Stencil.one_sided,
    "symmetric": Stencil.symmetric,
    "richardson": Stencil.richardson,
    "contour": Stencil.contour,
}
_RETRIES = 4
_COARSE = 0.02
_LOSS_MISMATCH = 1e-2
_ONLINE_FLOOR = 1e-2
_LARGEST_TRUNCATION = 0.05


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
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidOptionError(
                    f"{name} of an online schedule must be a whole number of at least 1, not {value!r}."
                )


@dataclass(frozen=True)
class EquilibriumPropagation(RelaxedBackward):
    """Equilibrium propagation: the error vector is read off nudged equilibria of the map itself.

    The estimate is `Re sum_k c_k d_k`, with `d_k` the displacement per unit of nudge at node `b_k` of the stencil
    (Scellier & Bengio 2017; Laborieux & Zenke, arXiv 2309.02214, eq. 8). It tends to `(I - J)^-1 g`, and needs no
    reverse-mode pass through `f` in the state.

    Args:
        stencil: A [`Stencil`][torchdeq_ep.Stencil], or the name of one with `beta="auto"`: `"one-sided"`,
            `"symmetric"`, `"richardson"` or `"contour"`.
        metric: Positive diagonal `M` as a function of the state, e.g. an
            [`ActivityMetric`][torchdeq_ep.metric.ActivityMetric]; the estimate is `M^-1 (I - J)^-1 M g`, which is exact
            when `J M` is symmetric. `"auto"` fits one to the Jacobian, see
            [`automatic_metric`][torchdeq_ep.metric.automatic_metric].
        correction: `"asymmetric"` adds `J^T d - J d` to the map; the limit is then exact for every `J` (arXiv
            2602.03670).
        scale: `"relative"` multiplies the amplitude by `|z*| / |M g|`, one number for the whole batch; `"absolute"`
            takes it as it is.
        schedule: `"parallel"` solves every node to the tolerance; `"online"`, or an
            [`Online`][torchdeq_ep.Online] with its numbers, visits them in turn.
        solver: Name of a torchdeq solver or a callable of the same signature; `None` for the package's own.
        max_iter: Largest number of steps of one relaxation, by default 100.
        tol: Residual of the displacement relative to the force at which to stop; by default the rounding error of the
            stencil.
        batching: `"auto"` and `"loop"` solve one node after the other, each from the polynomial through those before
            it, which takes the fewest calls of `f`. `"vmap"` solves the real nodes in one stack and then the
            complex ones in another: more calls, but fewer launches, which small models on a GPU may prefer.
        piecewise: `"real-part"` lets complex nodes pass piecewise analytic operations such as ReLU, choosing the piece
            by the real part; the report counts the units that may have crossed a kink. `None` refuses them.
        on_divergence: `"shrink"` halves the amplitude up to four times and then raises; `"raise"` raises at once;
            `"accept"` takes the best estimate that was found, with a warning, as the papers' fixed number of steps does
            without one; `"ift"` falls back to implicit differentiation with a warning.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
        >>> mode = EquilibriumPropagation("symmetric")
        >>> z_star, cotangent = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> mode(lambda z: torch.tanh(matrix @ z), z_star, cotangent)
        tensor([1.3333, 0.6667], dtype=torch.float64)
    """

    stencil: Stencil | str = "symmetric"
    metric: Metric | None = field(default=None, kw_only=True)
    correction: Correction | None = field(default=None, kw_only=True)
    scale: Literal["relative", "absolute"] = field(default="relative", kw_only=True)
    schedule: Literal["parallel", "online"] | Online = field(default="parallel", kw_only=True)
    batching: Batching = field(default="auto", kw_only=True)
    piecewise: Piecewise | None = field(default=None, kw_only=True)
    on_divergence: OnDivergence = field(default="shrink", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stencil, str):
            if self.stencil not in _STENCILS:
                raise InvalidOptionError(unknown_name("stencil", self.stencil, _STENCILS))
            object.__setattr__(self, "stencil", _STENCILS[self.stencil]())
        elif not isinstance(self.stencil, Stencil):
            raise InvalidOptionError(f"stencil must be a tep.Stencil or the name of one, not {self.stencil!r}.")
        check_metric_and_correction(self.metric, self.correction)
        _check_choice("scale", self.scale, ("relative", "absolute"))
        _check_choice("batching", self.batching, ("auto", "vmap", "loop"))
        if self.piecewise is not None:
            _check_choice("piecewise", self.piecewise, ("real-part",))
        _check_choice("on_divergence", self.on_divergence, ("shrink", "raise", "accept", "ift"))
        if not isinstance(self.schedule, Online):
            _check_choice("schedule", self.schedule, ("parallel", "online"))

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        try:
            return super().solve(equilibrium)
        except NonFiniteError as error:
            if self.on_divergence != "ift":
                raise
            warnings.warn(f"passed on as it is: {error}", FallbackWarning, stacklevel=2)
            return torch.full_like(equilibrium.z, torch.nan), NudgeReport(repr(self), converged=False)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        stencil = self._resolved_stencil(equilibrium)
        advance = equilibrium.residual > max(stencil.expected_error(equilibrium.eps), self.tol or 0.0)
        returned = equilibrium.value
        if advance:  # one call of f, so that an early stop of the free phase costs no more than it costs the adjoint
            equilibrium = equilibrium.advanced()
        problem = _NudgedProblem.pose(self, equilibrium, returned)
        self._require_visible(stencil, problem)
        retries = _RETRIES if self.on_divergence == "shrink" else 0
        for retry in range(retries + 1):
            try:
                displacement, report = self._solve_at(problem, stencil)
                break
            except NudgeDivergedError as error:
                if self.on_divergence == "ift":
                    warnings.warn(f"implicit differentiation took over, because {error}", FallbackWarning, stacklevel=2)
                    return ImplicitDifferentiation(max_iter=self.max_iter, tol=self.tol)._solve(equilibrium)
                if retry == retries:
                    tried = f" Amplitudes down to beta = {stencil.beta:.1e} were tried." if retries else ""
                    raise NudgeDivergedError(f"{error.args[0]}{tried}") from error
                stencil = stencil.at(float(stencil.beta) / 2)
        v = displacement if problem.metric is None else displacement / problem.metric
        calls = report.calls + advance + problem.metric_calls
        return v.to(equilibrium.z.dtype), replace(report, calls=calls, retries=retry)

    def _resolved_stencil(self, equilibrium: Equilibrium) -> Stencil:
        chosen = cast(Stencil, self.stencil)
        stencil = chosen.resolve(equilibrium.eps)
        if chosen.beta == "auto" and stencil.expected_error(equilibrium.eps) > _COARSE:
            warnings.warn(
                f"with rounding errors of {equilibrium.eps:.0e} in f, the {stencil.name} stencil is good to about "
                f"{stencil.expected_error(equilibrium.eps):.0%}. Keep the state in float32 (torch.autocast does), or "
                "use 'ep-infinitesimal' or 'ift'.",
                PrecisionWarning,
                stacklevel=2,
            )
        return stencil

    def _relative_amplitude(self, stencil: Stencil, problem: _NudgedProblem) -> float:
        beta = float(stencil.beta)
        return beta if self.scale == "relative" else beta / problem.unit_amplitude

    def _require_visible(self, stencil: Stencil, problem: _NudgedProblem) -> None:
        """Raises InvalidOptionError if the nudge is lost in the rounding of the state."""
        eps, relative = problem.equilibrium.eps, self._relative_amplitude(stencil, problem)
        rounding = stencil.noise_gain * eps / relative
        if rounding >= 1:
            raise InvalidOptionError(
                f"a nudge of relative amplitude {relative:.1e} is lost in the rounding of f, which is {eps:.0e}: the "
                f"error vector would be noise. Use beta='auto', or at least {100 * stencil.noise_gain * eps:.0e}."
            )

    def _solve_at(self, problem: _NudgedProblem, stencil: Stencil) -> tuple[Tensor, NudgeReport]:
        eps = problem.equilibrium.eps
        beta = float(stencil.beta)
        unit = problem.unit_amplitude if self.scale == "relative" else 1.0
        relative = self._relative_amplitude(stencil, problem)
        # Rounding of f, seen through the division by the smallest amplitude of the stencil.
        noise = eps / (relative * min(abs(node) for node in stencil.unit_nodes))
        tol = self.tol or max(2 * stencil.noise_gain * eps / relative, 100 * eps)
        floor = 30 * noise if self.schedule == "parallel" else _ONLINE_FLOOR
        run = _NudgedSolve(self, problem, unit, tol, floor, f"the {stencil.name} nudge (beta = {beta:.2g})")
        if self.schedule == "parallel":
            displacement = run.parallel(*stencil.upper_half())
            _warn_of_truncation(stencil, relative, run.decay)
        else:
            online = self.schedule if isinstance(self.schedule, Online) else Online()
            displacement = run.online(*stencil.upper_half(), online)
        return displacement, NudgeReport(
            repr(self),
            beta=relative,
            nudge=beta * unit,
            calls=run.calls,
            iterations=run.iterations,
            residual=run.residual,
            tol=tol,
            converged=run.converged,
            batching=run.batching,
            crossings=run.crossings,
            truncation=run.decay**stencil.order,
            radius=relative / run.decay if run.decay else math.nan,
            trace=run.trace,
        )


@dataclass(frozen=True)
class _NudgedProblem:
    """What the nudged phases of one backward pass share."""

    equilibrium: Equilibrium
    metric: Tensor | None
    metric_calls: int
    force: Tensor
    force_size: float
    correction: AsymmetricCorrection | None
    state_force: Callable[[Tensor], Tensor] | None
    unit_amplitude: float

    @classmethod
    def pose(cls, mode: EquilibriumPropagation, equilibrium: Equilibrium, returned: Tensor) -> _NudgedProblem:
        metric, metric_calls = diagonal_metric(mode.metric, equilibrium.f, equilibrium.z)
        wide = torch.promote_types(equilibrium.z.dtype, torch.float32)
        force = (equilibrium.cotangent if metric is None else metric * equilibrium.cotangent).to(wide)
        state_force = None
        if equilibrium.loss_of_state is not None:
            state_force, mismatch = loss_force(equilibrium, returned, mode.metric, metric, mode.piecewise)
            if mismatch > _LOSS_MISMATCH:
                warnings.warn(
                    "the loss given to nudge_loss has another gradient at the equilibrium than the one that reached "
                    f"the layer (they differ by {mismatch:.0%} beyond a factor), so the layer is nudged by another "
                    "loss than the one being minimised. Include every term of the training loss, read-out included.",
                    LossMismatchWarning,
                    stacklevel=2,
                )
        correction = AsymmetricCorrection.at(equilibrium, metric) if mode.correction else None
        # A fixed point at zero has no scale of its own: one per entry then stands for it.
        state_size = equilibrium.size or equilibrium.z.numel() ** 0.5
        force_size = equilibrium.cotangent_size if metric is None else norm(force)
        if not math.isfinite(force_size):
            raise NonFiniteError(
                f"the cotangent times the metric is not finite in {force.dtype}: the metric is up to "
                f"{float(cast(Tensor, metric).max()):.1e} at z*. Bound it; if it is one over a slope, keep the slope "
                "away from zero."
            )
        return cls(
            equilibrium, metric, metric_calls, force, force_size, correction, state_force, state_size / force_size
        )


class _NudgedSolve:
    """One solve of all nodes at one amplitude, with its statistics."""

    def __init__(
        self, mode: EquilibriumPropagation, problem: _NudgedProblem, unit: float, tol: float, floor: float, what: str
    ) -> None:
        self._mode, self._problem, self._unit = mode, problem, unit
        self._tol, self._floor, self._what = tol, floor, what
        self.calls, self.iterations, self.residual = 0, 0, 0.0
        self.converged = True
        self.batching = "loop"
        self.trace: tuple[float, ...] = ()
        self.decay = math.nan
        self.crossings: tuple[Crossing, ...] = ()

    def parallel(self, nodes: tuple[Node, ...], coefficients: tuple[float, ...]) -> Tensor:
        """`Re sum_k c_k d_k`, each group of nodes started from the polynomial in `b` through those solved before."""
        solved: dict[Node, Tensor] = {}
        for group in _groups(nodes, stacked=self._mode.batching == "vmap"):
            solved.update(zip(group, self._relax(group, solved), strict=True))
        if any(isinstance(node, complex) for node in nodes):
            self.decay = _contour_decay([solved[node] for node in nodes], isinstance(nodes[-1], complex))
        return cast(Tensor, sum(c * solved[node].real for node, c in zip(nodes, coefficients, strict=True)))

    def _first_guess(self) -> Tensor:
        """With the asymmetric correction, the limit of vanishing nudges: it takes VJPs alone."""
        problem = self._problem
        if problem.correction is None:
            return problem.force
        relaxation = self._mode.run_linear(problem.correction.limit, problem.force, self._tol, self._floor)
        self.calls += relaxation.steps
        self.iterations += relaxation.steps
        self.trace += relaxation.trace
        return problem.force if relaxation.diverged else relaxation.value[0]

    def online(self, nodes: tuple[Node, ...], coefficients: tuple[float, ...], schedule: Online) -> Tensor:
        """The same sum with each node started from the last, a fixed number of steps each, averaged over periods."""
        maps = [self._map((node,)) for node in nodes]
        d = self._problem.force.unsqueeze(0)
        total = torch.zeros_like(self._problem.force)
        for _ in range(schedule.periods):
            for k, nudged in enumerate(maps):
                states = nudged.states(d if nudged.is_complex else d.real)
                for _ in range(schedule.steps):
                    last, states = states, nudged(states)
                d = nudged.displacements(states)
                self._count(1, schedule.steps)
                self.trace += (norm(states - last) / (nudged.smallest * self._problem.force_size),)
                total += coefficients[k] / schedule.periods * d[0].real
        self.crossings = tuple(crossing for nudged in maps for crossing in nudged.crossings)
        self._judge(Relaxation(d, self.trace[-1], self.trace, self.iterations, not math.isfinite(self.trace[-1])))
        return total

    def _map(self, nodes: tuple[Node, ...]) -> NudgedMap:
        problem = self._problem
        return NudgedMap(
            problem.equilibrium,
            tuple(self._unit * node for node in nodes),
            problem.force,
            correction=problem.correction,
            state_force=problem.state_force,
            piecewise=self._mode.piecewise,
        )

    def _start(self, nodes: tuple[Node, ...], solved: dict[Node, Tensor]) -> Tensor:
        if not solved:
            return self._first_guess().expand(len(nodes), *self._problem.force.shape)
        return torch.stack([_extrapolate(solved, node) for node in nodes])

    def _relax(self, nodes: tuple[Node, ...], solved: dict[Node, Tensor]) -> Tensor:
        nudged = self._map(nodes)
        start = nudged.states(self._start(nodes, solved))
        # In the unit of the smallest nudge of the stack, no displacement is less accurate than asked.
        scale = nudged.smallest * self._problem.force_size
        relaxation = self._mode.run(nudged, start, scale, self._tol, self._floor)
        displacements = nudged.displacements(relaxation.value)
        relaxation = relaxation.after(norm(displacements), self._problem.force_size)
        self._judge(relaxation)
        self._count(len(nodes), relaxation.steps)
        self.crossings += nudged.crossings
        self.trace += relaxation.trace
        return displacements

    def _judge(self, relaxation: Relaxation) -> None:
        self.residual = max(self.residual, relaxation.residual)
        try:
            converged = self._mode.judge(relaxation, self._problem.equilibrium, self._tol, self._floor, self._what)
        except NudgeDivergedError as error:
            if self._mode.on_divergence != "accept":
                raise
            warnings.warn(f"accepted, although {error.args[0]}", ConvergenceWarning, stacklevel=2)
            converged = False
        self.converged = self.converged and converged

    def _count(self, nodes: int, steps: int) -> None:
        products = 2 if self._problem.correction is not None else 0
        self.calls += (1 + products) * nodes * steps
        self.iterations += steps
        if nodes > 1:
            self.batching = "vmap"


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


def _warn_of_truncation(stencil: Stencil, beta: float, decay: float) -> None:
    if decay**stencil.order > _LARGEST_TRUNCATION:
        warnings.warn(
            f"the {stencil.name} stencil of relative amplitude {beta:.2g} is too large: its estimated error is "
            f"{decay**stencil.order:.0%}, because the displacement is analytic only up to about {beta / decay:.2g}. "
            f"Use beta={0.3 * beta / decay:.1g} or less, or more points.",
            TruncationWarning,
            stacklevel=2,
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidOptionError(unknown_name(f"value of {name}", value, choices))
