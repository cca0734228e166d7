"""The backward modes: from a free equilibrium and a cotangent to an error vector.

With `J = df/dz` at `z*` and `g = dL/dz*`, implicit differentiation solves `v = J^T v + g`; every nudged mode solves
`d = D_b(d)` (see [`displacement`][torchdeq_ep.displacement]) and so tends to `(I - J)^-1 g`, which is the same vector
when `J` is symmetric, or with a metric or a correction that makes up for it. A mode is an immutable value: it can be
compared, pickled and shared between threads.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from torchdeq_ep.displacement import (
    DisplacementMap,
    Metric,
    asymmetric_correction,
    diagonal_metric,
    infinitesimal_map,
    loss_force,
)
from torchdeq_ep.equilibrium import Equilibrium, Packing, State, norm, relative_difference
from torchdeq_ep.errors import (
    ConvergenceWarning,
    FallbackWarning,
    InvalidOptionError,
    LossMismatchWarning,
    NonFiniteError,
    NudgeDivergedError,
    PrecisionWarning,
    StochasticMapError,
    unknown_name,
)
from torchdeq_ep.evaluation import Batching, undisturbed
from torchdeq_ep.jacobian import Product, vjp
from torchdeq_ep.relaxation import Relaxation, Solver, Step, find_solver, relax
from torchdeq_ep.stencils import Node, Stencil

Correction = Literal["asymmetric"]
OnDivergence = Literal["shrink", "raise", "ift"]

DEFAULT_MAX_ITER = 100
UNCONVERGED_STATE = 1e-2
"""A free state with a larger relative residual than this is warned about: its gradient is off by about as much."""
MEANINGLESS = 0.5
"""A relaxation that stops with a larger relative residual than this has found no estimate at all."""

STATEFUL = (
    "Look for dropout in train mode (use torchdeq's VariationalDropout, which keeps its mask), random noise, or a "
    "layer that updates its state on every call."
)

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


@dataclass(frozen=True)
class NudgeReport:
    """What one backward solve did.

    Args:
        backward: Description of the mode.
        beta: Relative amplitude used (after `"auto"` and any shrinking); 0 for modes without a nudge.
        nudge: Absolute amplitude used: `beta * |z*| / |M g|` for relative scaling.
        calls: States at which `f` was evaluated, plus products with its Jacobian.
        iterations: Steps of all relaxations together; one step may evaluate several stacked nodes.
        residual: Largest relative residual `|D(d) - d| / |M g|` of a node, over the whole state.
        tol: The tolerance it was to reach.
        converged: Whether it did, up to the rounding error of a finite nudge.
        batching: `"vmap"` or `"loop"`: how stacked nodes were evaluated.
        retries: How often the amplitude was halved.
        trace: Relative residual at every step, one relaxation after the other.
    """

    backward: str
    beta: float = 0.0
    nudge: float = 0.0
    calls: int = 0
    iterations: int = 0
    residual: float = 0.0
    tol: float = 0.0
    converged: bool = True
    batching: str = "loop"
    retries: int = 0
    trace: tuple[float, ...] = ()


@dataclass(frozen=True)
class Backward(ABC):
    """Base class of the backward modes that come with the package.

    A mode is called as `mode(f, z_star, cotangent)` and returns the error vector. Any callable of that form can take
    the place of a mode; deriving from this class adds the checks, and a report of each solve.
    """

    def __call__(self, f: Callable[..., Any], z_star: State, cotangent: State) -> State:
        """The error vector at a fixed point.

        Args:
            f: The map: a tensor to a tensor of the same shape, or several to several.
            z_star: Fixed point of `f`: a tensor of any shape, or a tuple or list of tensors.
            cotangent: `dL/dz*`, of the same form.

        Returns:
            The error vector, of the same form; detached.

        Raises:
            MapContractError: If `f` changes shape or dtype.
            NonFiniteError: If the cotangent or `f(z_star)` is not finite.
            NudgeDivergedError: If the relaxation diverges.
        """
        packing = Packing.of(z_star)
        z = packing.pack(z_star, "z_star").detach()
        g = packing.pack(cotangent, "the cotangent").detach()
        packed = packing.map(f)
        with undisturbed() as guard:
            value = packed(z)
        equilibrium = Equilibrium(packed, z, value, g, torch.finfo(z.dtype).eps, guard.withheld)
        return packing.unpack(self.solve(equilibrium)[0])

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        """The error vector of a packed equilibrium, and a report of how it was found.

        Args:
            equilibrium: The free state and its cotangent.

        Returns:
            A tensor of the shape of the packed state, and the report.

        Raises:
            NonFiniteError: If the cotangent or `f(z*)` is not finite.
            NudgeDivergedError: If the relaxation diverges.
        """
        equilibrium.require_finite()
        residual = equilibrium.residual
        if residual > UNCONVERGED_STATE:
            warnings.warn(
                f"the free phase stopped at a relative residual |f(z*) - z*| / |z*| of {residual:.1e}, so the gradient "
                "is taken at a state that is not an equilibrium. Raise f_max_iter, or use a solver that converges "
                "(f_solver='anderson' or 'broyden').",
                ConvergenceWarning,
                stacklevel=2,
            )
        if norm(equilibrium.cotangent) == 0.0:
            return torch.zeros_like(equilibrium.z), NudgeReport(repr(self), calls=0)
        with undisturbed(equilibrium.records):
            return self._solve(equilibrium)

    @abstractmethod
    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        """The error vector for a finite, non-zero cotangent; called where calls of `f` leave no trace."""


@dataclass(frozen=True)
class _RelaxedBackward(Backward):
    """A mode whose error vector is the fixed point of a map: its solver, and what it does if that fails."""

    solver: str | Solver | None = field(default=None, kw_only=True)
    max_iter: int | None = field(default=None, kw_only=True)
    tol: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_iter is not None and (not isinstance(self.max_iter, int) or self.max_iter < 1):
            raise InvalidOptionError(f"max_iter must be a whole number of at least 1, not {self.max_iter!r}.")
        if self.tol is not None and (not isinstance(self.tol, (int, float)) or not 0 < self.tol < 1):
            raise InvalidOptionError(
                f"tol must lie between 0 and 1, not be {self.tol!r}: it is relative to the norm of the cotangent."
            )
        if self.solver is not None:
            find_solver(self.solver)

    def _relax(self, step: Step, start: Tensor, scale: float, tol: float) -> Relaxation:
        return relax(step, start, scale=scale, tol=tol, max_iter=self.max_iter or DEFAULT_MAX_ITER, solver=self.solver)

    def _judge(self, relaxation: Relaxation, equilibrium: Equilibrium, tol: float, floor: float, what: str) -> bool:
        """Whether a relaxation converged; speaks up if not, and raises if it is no estimate at all."""
        converged = relaxation.residual <= max(tol, floor)
        if converged and not relaxation.diverged:
            return True
        again = equilibrium.f(equilibrium.z)
        if relative_difference(again, equilibrium.value) > change_tolerance(equilibrium.eps):
            raise StochasticMapError(
                f"f gives different answers for the same state, so it has no fixed point to nudge. {STATEFUL}"
            )
        if relaxation.diverged or relaxation.residual > MEANINGLESS:
            raise NudgeDivergedError(
                f"{what} diverged: relative residual {relaxation.residual:.1e} after {len(relaxation.trace)} steps. "
                "The map may not be contractive at the fixed point (its Jacobian has an eigenvalue near or beyond 1): "
                "try solver='broyden', on_divergence='ift', a smaller beta, or weight norms that keep f contractive."
            )
        warnings.warn(
            f"{what} stopped at a relative residual of {relaxation.residual:.1e} after {len(relaxation.trace)} steps "
            f"(tolerance {tol:.1e}), and the error vector is about as wrong as that. Raise max_iter, loosen tol, or "
            "try another solver ('anderson', 'broyden').",
            ConvergenceWarning,
            stacklevel=2,
        )
        return False


def change_tolerance(eps: float) -> float:
    """Relative difference between two values of `f` at one state that rounding alone does not explain."""
    return min(max(1e3 * eps, 1e-9), 0.05)


@dataclass(frozen=True)
class _LinearBackward(_RelaxedBackward):
    """A mode whose map is affine in the error vector, so that one relaxation of one vector solves it."""

    def _solve_linear(
        self, equilibrium: Equilibrium, linear_map: Product, force: Tensor, what: str
    ) -> tuple[Tensor, NudgeReport]:
        tol = self.tol or 10 * equilibrium.eps
        relaxation = self._relax(lambda v: linear_map(v[0]).unsqueeze(0), force.unsqueeze(0), norm(force), tol)
        floor = 100 * equilibrium.eps
        converged = self._judge(relaxation, equilibrium, tol, floor, what)
        steps = len(relaxation.trace)
        return relaxation.displacement[0], NudgeReport(
            repr(self),
            calls=steps + 1,
            iterations=steps,
            residual=relaxation.residual,
            tol=tol,
            converged=converged,
            trace=relaxation.trace,
        )


@dataclass(frozen=True)
class ImplicitDifferentiation(_LinearBackward):
    """Implicit differentiation: `v = J^T v + g`, by VJPs. What torchdeq calls IFT; exact for every map.

    Args:
        solver: Name of a torchdeq solver or a callable; `None` for the package's own.
        max_iter: Largest number of VJPs, by default 100.
        tol: Residual relative to the cotangent at which to stop; by default 10 times the rounding error of the dtype.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> ImplicitDifferentiation()(lambda z: matrix @ z, torch.zeros(2), torch.ones(2))
        tensor([1.0000, 1.5000])
    """

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        product = vjp(equilibrium.f, equilibrium.z)
        force = equilibrium.cotangent
        return self._solve_linear(equilibrium, lambda v: product(v) + force, force, "the adjoint iteration")


@dataclass(frozen=True)
class InfinitesimalEP(_LinearBackward):
    """The limit of vanishing nudges, `d = J d + g`, by forward-mode JVPs: the reference value of every EP mode.

    Args:
        metric: Positive diagonal `M` as a function of the state; the result is `M^-1 (I - J)^-1 M g`.
        correction: `"asymmetric"` replaces `J` by its adjoint, which makes the result exact.
        solver: Name of a torchdeq solver or a callable; `None` for the package's own.
        max_iter: Largest number of JVPs, by default 100.
        tol: Residual relative to the force at which to stop; by default 10 times the rounding error of the dtype.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> InfinitesimalEP()(lambda z: matrix @ z, torch.zeros(2), torch.ones(2))
        tensor([1.5000, 1.0000])
    """

    metric: Metric | None = field(default=None, kw_only=True)
    correction: Correction | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_metric_and_correction(self.metric, self.correction)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        metric = diagonal_metric(self.metric, equilibrium.z)
        force = equilibrium.cotangent if metric is None else metric * equilibrium.cotangent
        correction = asymmetric_correction(equilibrium, metric) if self.correction else None
        linear_map = infinitesimal_map(equilibrium, force, correction)
        displacement, report = self._solve_linear(equilibrium, linear_map, force, "the infinitesimal nudge")
        return displacement if metric is None else displacement / metric, report


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
class EquilibriumPropagation(_RelaxedBackward):
    """Equilibrium propagation: the error vector is read off nudged equilibria of the map itself.

    The estimate is `Re sum_k c_k d_k`, with `d_k` the displacement per unit of nudge at node `b_k` of the stencil
    (Scellier & Bengio 2017; Laborieux & Zenke, arXiv 2309.02214, eq. 8). It tends to `(I - J)^-1 g`, and needs no
    reverse-mode pass through `f` in the state.

    Args:
        stencil: A [`Stencil`][torchdeq_ep.Stencil], or the name of one with `beta="auto"`: `"one-sided"`,
            `"symmetric"`, `"richardson"` or `"contour"`.
        metric: Positive diagonal `M` as a function of the state; the estimate is `M^-1 (I - J)^-1 M g`, which is exact
            when `J M` is symmetric.
        correction: `"asymmetric"` adds `J^T d - J d` to the map; the limit is then exact for every `J` (arXiv
            2602.03670).
        scale: `"relative"` multiplies the amplitude by `|z*| / |M g|`, one number for the whole batch; `"absolute"`
            takes it as it is.
        schedule: `"parallel"` solves every node to the tolerance; `"online"`, or an
            [`Online`][torchdeq_ep.backward.Online] with its numbers, visits them in turn.
        solver: Name of a torchdeq solver or a callable of the same signature; `None` for the package's own.
        max_iter: Largest number of steps of one relaxation, by default 100.
        tol: Residual of the displacement relative to the force at which to stop; by default the rounding error of the
            stencil.
        batching: `"auto"` evaluates the nodes in one call by `torch.vmap`, and in a loop where that is not possible;
            `"vmap"` and `"loop"` insist.
        on_divergence: `"shrink"` halves the amplitude up to four times and then raises; `"raise"` raises at once;
            `"ift"` falls back to implicit differentiation with a warning.

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
    on_divergence: OnDivergence = field(default="shrink", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stencil, str):
            if self.stencil not in _STENCILS:
                raise InvalidOptionError(unknown_name("stencil", self.stencil, _STENCILS))
            object.__setattr__(self, "stencil", _STENCILS[self.stencil]())
        elif not isinstance(self.stencil, Stencil):
            raise InvalidOptionError(f"stencil must be a tep.Stencil or the name of one, not {self.stencil!r}.")
        _check_metric_and_correction(self.metric, self.correction)
        _check_choice("scale", self.scale, ("relative", "absolute"))
        _check_choice("batching", self.batching, ("auto", "vmap", "loop"))
        _check_choice("on_divergence", self.on_divergence, ("shrink", "raise", "ift"))
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
        problem = _NudgedProblem.pose(self, equilibrium)
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
                    raise NudgeDivergedError(f"{error}{tried}") from error
                stencil = stencil.at(float(stencil.beta) / 2)
        v = displacement if problem.metric is None else displacement / problem.metric
        return v.to(equilibrium.z.dtype), replace(report, retries=retry)

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

    def _solve_at(self, problem: _NudgedProblem, stencil: Stencil) -> tuple[Tensor, NudgeReport]:
        eps = problem.equilibrium.eps
        beta = float(stencil.beta)
        unit = problem.unit_amplitude if self.scale == "relative" else 1.0
        relative = beta if self.scale == "relative" else beta / problem.unit_amplitude
        # Rounding of f, seen through the division by the smallest amplitude of the stencil.
        noise = eps / (relative * min(abs(node) for node in stencil.unit_nodes))
        tol = self.tol or max(2 * stencil.noise_gain * eps / relative, 100 * eps)
        floor = 30 * noise if self.schedule == "parallel" else _ONLINE_FLOOR
        run = _NudgedSolve(self, problem, unit, tol, floor, f"the {stencil.name} nudge (beta = {beta:.2g})")
        if self.schedule == "parallel":
            displacement = run.parallel(*stencil.upper_half(), coarse=max(tol, min(relative, 0.1)))
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
            trace=run.trace,
        )


@dataclass(frozen=True)
class _NudgedProblem:
    """What the nudged phases of one backward pass share."""

    equilibrium: Equilibrium
    metric: Tensor | None
    force: Tensor
    correction: Product | None
    state_force: Callable[[Tensor], Tensor] | None
    unit_amplitude: float

    @classmethod
    def pose(cls, mode: EquilibriumPropagation, equilibrium: Equilibrium) -> _NudgedProblem:
        metric = diagonal_metric(mode.metric, equilibrium.z)
        wide = torch.promote_types(equilibrium.z.dtype, torch.float32)
        force = (equilibrium.cotangent if metric is None else metric * equilibrium.cotangent).to(wide)
        state_force = None
        if equilibrium.loss_of_state is not None:
            state_force, mismatch = loss_force(equilibrium, metric)
            if mismatch > _LOSS_MISMATCH:
                warnings.warn(
                    "the loss given to nudge_loss has another gradient at the free state than the one that reached "
                    f"the layer (they differ by {mismatch:.0%} beyond a factor), so the layer is nudged by another "
                    "loss than the one being minimised. Include every term of the training loss, read-out included.",
                    LossMismatchWarning,
                    stacklevel=2,
                )
        correction = asymmetric_correction(equilibrium, metric) if mode.correction else None
        # A fixed point at zero has no scale of its own: one per entry then stands for it.
        state_norm = norm(equilibrium.z) or equilibrium.z.numel() ** 0.5
        return cls(equilibrium, metric, force, correction, state_force, state_norm / norm(force))


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

    def parallel(self, nodes: tuple[Node, ...], coefficients: tuple[float, ...], coarse: float) -> Tensor:
        """`Re sum_k c_k d_k`. All nodes share `d` up to `O(beta)`: the first, a real one, is solved that far alone."""
        start = self._problem.force
        if len(nodes) > 1:
            start = self._relax(nodes[:1], start, coarse, final=False)[0]
        total = torch.zeros_like(self._problem.force)
        for complex_nodes in (False, True):
            group = [k for k, node in enumerate(nodes) if isinstance(node, complex) == complex_nodes]
            if not group:
                continue
            displacements = self._relax(tuple(nodes[k] for k in group), start, self._tol)
            for k, displacement in zip(group, displacements, strict=True):
                total += coefficients[k] * displacement.real
        return total

    def online(self, nodes: tuple[Node, ...], coefficients: tuple[float, ...], schedule: Online) -> Tensor:
        """The same sum with each node started from the last, a fixed number of steps each, averaged over periods."""
        maps = [self._map((node,)) for node in nodes]
        d = self._problem.force.unsqueeze(0)
        total = torch.zeros_like(self._problem.force)
        for _ in range(schedule.periods):
            for k, displacement_map in enumerate(maps):
                d = d.to(displacement_map.amplitudes.dtype) if displacement_map.is_complex else d.real
                for _ in range(schedule.steps):
                    last, d = d, displacement_map(d)
                self._count(displacement_map, 1, schedule.steps)
                self.trace += (norm(d - last) / norm(self._problem.force),)
                total += coefficients[k] / schedule.periods * d[0].real
        self._judge(Relaxation(d, self.trace[-1], self.trace, not math.isfinite(self.trace[-1])))
        return total

    def _map(self, nodes: tuple[Node, ...]) -> DisplacementMap:
        problem = self._problem
        return DisplacementMap(
            problem.equilibrium,
            tuple(self._unit * node for node in nodes),
            problem.force,
            correction=problem.correction,
            state_force=problem.state_force,
            batching=self._mode.batching,
        )

    def _relax(self, nodes: tuple[Node, ...], start: Tensor, tol: float, final: bool = True) -> Tensor:
        displacement_map = self._map(nodes)
        start = start.to(displacement_map.amplitudes.dtype).expand(len(nodes), *start.shape)
        relaxation = self._mode._relax(displacement_map, start, norm(self._problem.force), tol)
        if final or relaxation.diverged:
            self._judge(relaxation)
        self._count(displacement_map, len(nodes), len(relaxation.trace))
        self.trace += relaxation.trace
        return relaxation.displacement

    def _judge(self, relaxation: Relaxation) -> None:
        self.residual = max(self.residual, relaxation.residual)
        converged = self._mode._judge(relaxation, self._problem.equilibrium, self._tol, self._floor, self._what)
        self.converged = self.converged and converged

    def _count(self, displacement_map: DisplacementMap, nodes: int, steps: int) -> None:
        products = 2 if self._problem.correction is not None else 0
        self.calls += (1 + products) * nodes * steps
        self.iterations += steps
        if nodes > 1:
            self.batching = displacement_map.evaluate.used


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidOptionError(unknown_name(f"value of {name}", value, choices))


def _check_metric_and_correction(metric: object, correction: object) -> None:
    if metric is not None and not callable(metric):
        raise InvalidOptionError(
            f"metric must be a function from the state to the positive diagonal of M, or None, not {metric!r}."
        )
    if correction not in (None, "asymmetric"):
        raise InvalidOptionError(f"correction must be None or 'asymmetric', not {correction!r}.")
