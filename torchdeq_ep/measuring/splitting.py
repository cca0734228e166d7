"""The error of one DEQ in parts. Each thing may fail or not converge, and then it hides nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchdeq_ep import holomorphic
from torchdeq_ep.certificate import adjoint_residual
from torchdeq_ep.errors import JacobianProductError, NonFiniteError, NotHolomorphicError, NudgeDivergedError
from torchdeq_ep.jacobian import SymmetryMeasurement, measure_symmetry, spectral_radius
from torchdeq_ep.jacobian.consistency import derivative_mismatch
from torchdeq_ep.measuring import capture as capturing
from torchdeq_ep.measuring.advice import PARTS, Findings, advise
from torchdeq_ep.measuring.capture import CERTAIN, Adjoint, Capture, caught_warnings, exact_adjoint, short
from torchdeq_ep.measuring.diagnosis import AMPLITUDES, LayerDiagnosis, Part, Parts
from torchdeq_ep.measuring.progress import Steps
from torchdeq_ep.modes import EquilibriumPropagation, InfinitesimalEP, NudgeReport, Stencil
from torchdeq_ep.relaxation import relax
from torchdeq_ep.state import Equilibrium, cosine, norm, undisturbed

Result = TypeVar("Result")
Pullback = Callable[[Tensor], dict[str, Tensor]]

STENCILS: dict[str, Callable[[float], Stencil]] = {
    "one-sided": Stencil.one_sided,
    "symmetric": Stencil.symmetric,
    "richardson-4": Stencil.richardson,
    "contour-4": Stencil.contour,
}
STEPS = 7 + len(STENCILS) * len(AMPLITUDES)
"""How often progress is told of for one DEQ."""
_PROBES = 50
_USABLE = 0.1


@dataclass(frozen=True)
class Effort:
    """How far things are solved: far enough to tell the parts apart, in a time that a user will wait for.

    Args:
        steps: Of each phase.
        tol: Relative residual at which it stops; what rounding leaves if that is more.
        sweep_steps: The same for each point of the sweep.
        sweep_tol: Likewise.

    Example:
        >>> LARGE.steps < SMALL.steps
        True
    """

    steps: int
    tol: float
    sweep_steps: int
    sweep_tol: float

    @classmethod
    def on(cls, equilibrium: Equilibrium) -> Effort:
        """What an equilibrium is worth.

        Args:
            equilibrium: Of a small or a large state.

        Returns:
            With tolerances that can be reached.
        """
        effort = LARGE if equilibrium.z.numel() > capturing.LARGEST_DENSE else SMALL
        rounding = 10 * equilibrium.eps
        return replace(effort, tol=max(effort.tol, rounding), sweep_tol=max(effort.sweep_tol, rounding))


SMALL = Effort(steps=1000, tol=0.0, sweep_steps=1000, sweep_tol=0.0)
LARGE = Effort(steps=200, tol=1e-4, sweep_steps=60, sweep_tol=1e-3)


@dataclass
class Examination:
    """One DEQ that is being diagnosed.

    Args:
        capture: Its equilibrium.
        mode: The mode.
        trained: Parameters of the model by name.
        tell: Told of each step.
        notes: What there is to say so far.
        reasons: Why something has no number, by its name.
        unsettled: What did not converge, by name.
    """

    capture: Capture
    mode: EquilibriumPropagation
    trained: Mapping[str, nn.Parameter]
    tell: Steps
    notes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    unsettled: list[str] = field(default_factory=list)

    def diagnosis(self) -> LayerDiagnosis:
        """Solve and measure all there is.

        Returns:
            The diagnosis.
        """
        # Its own memory: what the reference warned of must not silence the mode.
        given = self.capture.anew().equilibrium
        with self.capture.autocast.restored(True):
            tight = self._settle(given)
            self._step("the mode")
            estimate, report = self._solve("estimate", self.mode, given)
            exact = self._exact(tight)
            self._step("the limit")
            limit = self._solve("limit", self._limit_mode, tight)[0]
            self._step("the nudge")
            settled = self._solve("tight solve", self._at_amplitude(report.beta), tight)[0]
            sweep = {name: self._sweep(make, tight, name) for name, make in STENCILS.items()}
            self._step("the Jacobian")
            symmetry = self._measure("symmetry", lambda: self._symmetry(tight), None)
            radius = self._measure("spectral_radius", lambda: self._radius(tight), math.nan)
            kinks = _kinks(tight)
            hidden = self._measure("derivative", lambda: _hidden(given, estimate), math.nan)
            adjoint = math.nan if estimate is None else adjoint_residual(given, estimate)
            self._step("the gradients")
            nothing: Pullback = _no_gradient
            gradient = self._measure("gradient", lambda: _pullback(tight, self.trained), nothing)
        known = exact.vector.to(given.z.dtype) if exact.residual <= _USABLE else None
        vectors = {"estimate": estimate, "tight solve": settled, "limit": limit, "exact adjoint": known}
        whole = in_parts(vectors)
        scale = math.nan if known is None else norm(known)
        best, best_error = self._best_amplitude(tight, limit, sweep, scale)
        gradients = {name: None if vector is None else gradient(vector) for name, vector in vectors.items()}
        align = partial(_alignment, gradient, gradients["exact adjoint"])
        residuals, amplitudes = (given.residual, tight.residual), (report.beta, best, best_error)
        findings = Findings(whole, exact, *residuals, radius, kinks, *amplitudes, tuple(self.unsettled), hidden)
        return LayerDiagnosis(
            name=self.capture.deq,
            error_vector=whole,
            parameters=_of_parameters(gradients),
            beta=report.beta,
            best_beta=best,
            residual=given.residual,
            sweep={stencil: tuple(map(align, found)) for stencil, found in sweep.items()},
            limit_alignment=align(limit),
            symmetry=symmetry,
            spectral_radius=radius,
            advice=advise(findings),
            notes=tuple(dict.fromkeys(self.notes)),
            adjoint_residual=adjoint,
            settled_residual=tight.residual,
            exact_residual=exact.residual,
            reasons=self.reasons,
        )

    @property
    def _effort(self) -> Effort:
        return Effort.on(self.capture.equilibrium)

    @property
    def _limit_mode(self) -> InfinitesimalEP:
        metric, correction, effort = self.mode.metric, self.mode.correction, self._effort
        return InfinitesimalEP(
            metric=metric, correction=correction, max_iter=effort.steps, tol=effort.tol, on_divergence="accept"
        )

    @property
    def _settled_mode(self) -> EquilibriumPropagation:
        effort = self._effort
        return replace(self.mode, schedule="parallel", max_iter=effort.steps, tol=effort.tol, on_divergence="accept")

    def _at_amplitude(self, beta: float) -> EquilibriumPropagation:
        """Solved further at the amplitude that the mode chose: another choice there would look like an early stop."""
        mode, stencil = self._settled_mode, self.mode.stencil
        is_free = self.mode.scale == "relative" and self.mode.correction is None and beta > 0
        if is_free and isinstance(stencil, Stencil) and stencil.beta == "auto":
            return replace(mode, stencil=stencil.at(beta))
        return mode

    def _step(self, what: str) -> None:
        self.tell(f"{self.capture.deq}: {what}" if self.capture.deq else what)

    def _measure(self, what: str, call: Callable[[], Result], otherwise: Result) -> Result:
        """What a call returns, with its warnings in the notes; something else if it raises."""
        try:
            with caught_warnings() as warned:
                found = call()
        except Exception as error:
            self.notes.append(f"no {what.replace('_', ' ')}: {short(error)}")
            self.reasons[what] = _in_a_word(error)
            return otherwise
        self.notes += warned
        return found

    def _settle(self, given: Equilibrium) -> Equilibrium:
        self._step("the free phase")
        tight = self._measure("fixed point", lambda: _settled(given, self._effort), given)
        if not tight.residual <= CERTAIN:
            self.notes.append(
                f"the free phase could not be solved further than to a relative residual of {tight.residual:.1e}"
            )
        return tight

    def _exact(self, tight: Equilibrium) -> Adjoint:
        self._step("the exact adjoint")
        with caught_warnings():
            exact = exact_adjoint(tight, self._effort.tol, self._effort.steps)
        if exact.note:
            self.notes.append(f"exact adjoint: {exact.note}")
        if exact.residual > CERTAIN:
            self.notes.append(f"the exact adjoint stopped at a relative residual of {exact.residual:.1e}")
        self.reasons["exact_residual"] = "no exact adjoint"
        return exact

    def _solve(
        self, what: str, mode: EquilibriumPropagation | InfinitesimalEP, equilibrium: Equilibrium
    ) -> tuple[Tensor | None, NudgeReport]:
        """An error vector, or `None` if there is none; the estimate of the mode itself counts whatever it is."""
        try:
            with caught_warnings() as warned:
                vector, report = mode.solve(equilibrium)
        except Exception as error:
            self.notes.append(f"no {what}: {short(error)}")
            self.reasons.setdefault("beta", _in_a_word(error))
            return None, NudgeReport(what, beta=math.nan)
        if mode is self.mode:
            self.notes += warned
            return vector, report
        if report.residual > CERTAIN or report.diverged:
            end = "diverged" if report.diverged else f"stopped at a relative residual of {report.residual:.1e}"
            self.unsettled.append(what)
            self.notes.append(f"the {what} {end} after {report.iterations} steps")
        return (vector if report.is_usable else None), report

    def _symmetry(self, tight: Equilibrium) -> SymmetryMeasurement:
        return measure_symmetry(tight.f, tight.z, _PROBES, metric=self.mode.metric, generator=_seeded(tight.z))

    def _radius(self, tight: Equilibrium) -> float:
        return spectral_radius(tight.f, tight.z, generator=_seeded(tight.z))

    def _sweep(self, make: Callable[[float], Stencil], tight: Equilibrium, name: str = "") -> list[Tensor | None]:
        """The error vectors of a stencil at all amplitudes; named if it is told of."""
        steps, tol = self._effort.sweep_steps, self._effort.sweep_tol
        vectors: list[Tensor | None] = []
        refused, failed = "", 0
        for beta in AMPLITUDES:
            if name:
                self._step(f"{name} at {beta:.0e}")
            if not refused:
                mode = replace(self._settled_mode, stencil=make(beta), max_iter=steps, tol=tol)
                try:
                    with caught_warnings():
                        vector, report = mode.solve(tight)
                    vectors.append(vector if report.is_usable else None)
                    failed += not report.is_usable
                    continue
                except NotHolomorphicError as error:  # at every amplitude
                    refused = short(error)
                except Exception:
                    failed += 1
            vectors.append(None)
        if name and (refused or failed):
            why = refused or f"no usable estimate at {failed} of {len(AMPLITUDES)} amplitudes"
            self.notes.append(f"{name}: {why}")
        return vectors

    def _best_amplitude(
        self, tight: Equilibrium, limit: Tensor | None, sweep: dict[str, list[Tensor | None]], scale: float
    ) -> tuple[float, float]:
        """The amplitude with the smallest error of the nudge, and that error."""
        stencil = self.mode.stencil
        if limit is None or not isinstance(stencil, Stencil):
            self.reasons["best_beta"] = "no limit"
            return math.nan, math.nan
        vectors = sweep[stencil.name] if stencil.name in sweep else self._sweep(stencil.at, tight)
        errors = {beta: norm(v - limit) for beta, v in zip(AMPLITUDES, vectors, strict=True) if v is not None}
        if not errors:
            self.reasons["best_beta"] = "no estimate"
            return math.nan, math.nan
        best = min(errors, key=errors.__getitem__)
        return best, errors[best] / scale if scale > 0 else math.nan


def _in_a_word(error: Exception) -> str:
    words: dict[type[Exception], str] = {
        JacobianProductError: "no products",
        NonFiniteError: "not finite",
        NudgeDivergedError: "diverged",
    }
    return words.get(type(error), "failed")


def in_parts(vectors: Mapping[str, Tensor | None]) -> Parts:
    """An error in parts, from the vectors that it lies between.

    Args:
        vectors: `"estimate"`, `"tight solve"`, `"limit"` and `"exact adjoint"`, of which some may be missing.

    Returns:
        The parts; NaN with a reason where a vector is missing.

    Example:
        >>> one = torch.ones(2)
        >>> parts = in_parts({"estimate": 1.5 * one, "tight solve": None, "limit": one, "exact adjoint": one})
        >>> parts.total.relative, parts.convergence.reason
        (0.5, 'no tight solve')
    """
    exact = vectors["exact adjoint"]
    parts = {}
    for part, names in PARTS.items():
        one, other = (vectors[name] for name in names)
        missing = [name for name in (*names, "exact adjoint") if vectors[name] is None]
        if exact is None or one is None or other is None:
            parts[part] = Part(math.nan, math.nan, f"no {missing[0]}")
        else:
            parts[part] = Part.of(one - other, exact)
    return Parts(**parts)


def _of_parameters(gradients: Mapping[str, dict[str, Tensor] | None]) -> dict[str, Parts]:
    exact = gradients["exact adjoint"] or {}
    # What is nothing but rounding, as of a bias before a batch norm, has no parts.
    whole = norm(_joined(exact)) if exact else 0.0
    return {
        parameter: in_parts({name: None if found is None else found[parameter] for name, found in gradients.items()})
        for parameter, value in exact.items()
        if norm(value) > 100 * torch.finfo(value.dtype).eps * whole
    }


def _alignment(gradient: Pullback, exact: dict[str, Tensor] | None, vector: Tensor | None) -> float:
    if vector is None or not exact:
        return math.nan
    return cosine(_joined(gradient(vector)), _joined(exact))


def _joined(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


def _seeded(z: Tensor) -> torch.Generator:
    return torch.Generator(z.device).manual_seed(0)


def _settled(equilibrium: Equilibrium, effort: Effort) -> Equilibrium:
    """The same layer at its fixed point, or as close to it as the effort allows."""
    with undisturbed(equilibrium.records):
        result = relax(
            lambda stack: equilibrium.f(stack[0]).clone().unsqueeze(0),
            equilibrium.value.detach().unsqueeze(0),
            scale=norm(equilibrium.value) or 1.0,
            tol=max(2 * equilibrium.eps, 0.1 * effort.tol if effort.tol > 10 * equilibrium.eps else 0.0),
            max_iter=effort.steps,
            floor=100 * equilibrium.eps,
            rows=equilibrium.independent_rows,
        )
        z = result.value[0]
        found = replace(equilibrium, z=z, value=equilibrium.f(z).clone())
    return found if found.residual < equilibrium.residual else equilibrium


def _kinks(equilibrium: Equilibrium) -> str:
    """The operations of a map that are analytic in pieces only, by name: those that a complex state comes upon."""
    with holomorphic.mode("real-part") as context, undisturbed(equilibrium.records):
        with suppress(Exception):  # if it is not analytic at all, what came before is known
            equilibrium.f(equilibrium.z.to(equilibrium.z.dtype.to_complex()))
        return ", ".join(crossing.operation for crossing in context.crossings)


def _hidden(equilibrium: Equilibrium, vector: Tensor | None) -> float:
    """How far autograd's derivative of the map along an error vector is from that of its values."""
    if vector is None or not bool(torch.any(vector)):
        return math.nan
    with undisturbed(equilibrium.records):
        return derivative_mismatch(equilibrium.f, equilibrium.z, vector, equilibrium.rounding).size


def _no_gradient(vector: Tensor) -> dict[str, Tensor]:
    return {}


def _pullback(equilibrium: Equilibrium, trained: Mapping[str, nn.Parameter]) -> Pullback:
    """`v -> (df/dtheta)^T v` at the fixed point, for every parameter."""
    with torch.enable_grad():
        value = equilibrium.f(equilibrium.z)

    def gradient(vector: Tensor) -> dict[str, Tensor]:
        if not value.requires_grad:
            return {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        gradients: Sequence[Tensor] = torch.autograd.grad(
            value, list(trained.values()), vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(trained, gradients, strict=True))

    return gradient
