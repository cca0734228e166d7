"""Why is an EP gradient off? Its error, split into the three causes it can have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import EPError, EPWarning, InvalidOptionError, JacobianProductError
from torchdeq_ep.host import deqs_of
from torchdeq_ep.jacobian import Metric, SymmetryMeasurement, measure_symmetry, spectral_radius
from torchdeq_ep.measuring.capture import Capture, Reference, Trial, caught_warnings, left_as_found
from torchdeq_ep.measuring.diagnosis import AMPLITUDES, GOOD, Diagnosis, LayerDiagnosis, Part, Parts
from torchdeq_ep.modes import (
    EquilibriumPropagation,
    ImplicitDifferentiation,
    InfinitesimalEP,
    ModeLike,
    Stencil,
    get_backward,
)
from torchdeq_ep.relaxation import relax
from torchdeq_ep.state import Equilibrium, cosine, norm, undisturbed

_TIGHT_STEPS = 1000
_PROBES = 50
_STENCILS: dict[str, Callable[[float], Stencil]] = {
    "one-sided": Stencil.one_sided,
    "symmetric": Stencil.symmetric,
    "richardson-4": Stencil.richardson,
    "contour-4": Stencil.contour,
}


def diagnose(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor], backward: str | ModeLike = "ep"
) -> Diagnosis:
    """Split the error of an EP gradient into its causes, and say what to do about the largest.

    With `z**` the fixed point solved to rounding error, the estimate `v` of the mode differs from the exact adjoint by

        (v - v_tight) + (v_tight - v_limit) + (v_limit - v_exact)

    which are called *convergence*, *finite nudge* and *asymmetry*: `v_tight` is the same mode at `z**`, solved to
    rounding error, `v_limit` its limit for a vanishing nudge, and `v_exact` solves `v = J^T v + g`.

    Args:
        model: A module with at least one torchdeq DEQ; left as it was found.
        batch: As for [`compare`][torchdeq_ep.measuring.compare].
        loss_fn: As for `compare`.
        backward: A mode of equilibrium propagation, or the spec of one.

    Returns:
        The diagnosis.

    Raises:
        InvalidOptionError: If `backward` is not a mode of equilibrium propagation, or the loss reaches no DEQ.
        NoDEQError: If there is no DEQ in the model.

    Example:
        >>> import torch, torchdeq
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.deq, self.linear = torchdeq.get_deq(f_tol=1e-6), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.deq(lambda z: 0.5 * torch.tanh(self.linear(z)) + x, torch.zeros_like(x))[0][-1]
        >>> _ = torch.manual_seed(0)
        >>> batch = torch.randn(2, 4), torch.randn(2, 4)
        >>> print(diagnose(Model(), batch, torch.nn.functional.mse_loss).layers[0].advice[:56])
        Most of the error is the asymmetry of the Jacobian, whic
    """
    mode = get_backward(backward)
    if not isinstance(mode, EquilibriumPropagation):
        raise InvalidOptionError(f"only modes of equilibrium propagation have these errors to diagnose, not {mode!r}.")
    deqs = deqs_of(model)
    names = {deq: name for name, deq in model.named_modules() if deq in deqs}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with left_as_found(model) as found, torch.enable_grad():
        if not all(deq.training for deq in deqs):
            model.train()
        reference = Reference()
        Trial(model, batch, loss_fn, list(trained.values()), found).gradient(reference)
        if not reference.captures:
            raise InvalidOptionError("the loss has no gradient with respect to an equilibrium of any DEQ in the model.")
        # Those of this pass alone: the pullback of a DEQ goes through the ones before it, and adds to the list.
        captures = tuple(reference.captures)
        labels = [names[deq] for deq in reversed(deqs)] if len(deqs) == len(captures) else [""] * len(captures)
        layers = [_diagnose_layer(name, mode, capture, trained) for name, capture in zip(labels, captures, strict=True)]
    return Diagnosis(repr(mode), tuple(layers))


def _diagnose_layer(
    name: str, mode: EquilibriumPropagation, capture: Capture, trained: dict[str, nn.Parameter]
) -> LayerDiagnosis:
    given = capture.equilibrium
    with caught_warnings(), capture.autocast.restored(True):
        tight = _converged(given)
        with caught_warnings() as notes:
            v_mode, report = mode.solve(given)
        exact = ImplicitDifferentiation(max_iter=_TIGHT_STEPS, tol=10 * given.eps).solve(tight)[0]
        limit_mode = InfinitesimalEP(
            metric=mode.metric, correction=mode.correction, max_iter=_TIGHT_STEPS, tol=10 * given.eps
        )
        limit = limit_mode.solve(tight)[0]
        settled = replace(mode, schedule="parallel", max_iter=_TIGHT_STEPS, tol=10 * given.eps)
        v_tight = settled.solve(tight)[0]
        sweep = {stencil: _sweep(settled, make, tight) for stencil, make in _STENCILS.items()}
        symmetry = _symmetry(tight, mode.metric)
        with caught_warnings() as more_notes:
            radius = spectral_radius(tight.f, tight.z, generator=torch.Generator(tight.z.device).manual_seed(0))
    errors = {
        "finite_nudge": v_tight - limit,
        "asymmetry": limit - exact,
        "convergence": v_mode - v_tight,
        "total": v_mode - exact,
    }
    gradient = _pullback(tight, trained)
    exact_gradient = gradient(exact)
    in_parts = {part: gradient(error) for part, error in errors.items()}
    parameters = {
        parameter: Parts(**{part: Part.of(in_parts[part][parameter], value) for part in errors})
        for parameter, value in exact_gradient.items()
        if norm(value) > 0
    }
    whole = Parts(**{part: Part.of(error, exact) for part, error in errors.items()})
    best = _best_amplitude(settled, tight, limit, sweep)

    def alignment(vector: Tensor | None) -> float:
        return math.nan if vector is None else cosine(_joined(gradient(vector)), _joined(exact_gradient))

    return LayerDiagnosis(
        name=name,
        error_vector=whole,
        parameters=parameters,
        beta=report.beta,
        best_beta=best,
        residual=given.residual,
        sweep={stencil: tuple(alignment(vector) for vector in vectors) for stencil, vectors in sweep.items()},
        floor=alignment(limit),
        symmetry=symmetry,
        spectral_radius=radius,
        advice=_advice(whole, report.beta, best, given.residual),
        notes=(*notes, *more_notes),
    )


def _symmetry(equilibrium: Equilibrium, metric: Metric | None) -> SymmetryMeasurement | None:
    generator = torch.Generator(equilibrium.z.device).manual_seed(0)
    try:
        return measure_symmetry(equilibrium.f, equilibrium.z, _PROBES, metric=metric, generator=generator)
    except JacobianProductError:
        return None


def _converged(equilibrium: Equilibrium) -> Equilibrium:
    """The same layer at its fixed point, solved to rounding error."""
    with undisturbed(equilibrium.records):
        result = relax(
            lambda stack: equilibrium.f(stack[0]).clone().unsqueeze(0),
            equilibrium.value.detach().unsqueeze(0),
            scale=norm(equilibrium.value) or 1.0,
            tol=2 * equilibrium.eps,
            max_iter=_TIGHT_STEPS,
            floor=100 * equilibrium.eps,
        )
        z = result.value[0]
        return replace(equilibrium, z=z, value=equilibrium.f(z))


def _sweep(
    mode: EquilibriumPropagation, make: Callable[[float], Stencil], equilibrium: Equilibrium
) -> list[Tensor | None]:
    vectors: list[Tensor | None] = []
    for beta in AMPLITUDES:
        try:
            vectors.append(replace(mode, stencil=make(beta), on_divergence="raise").solve(equilibrium)[0])
        except EPError:
            vectors.append(None)
    return vectors


def _best_amplitude(
    mode: EquilibriumPropagation, equilibrium: Equilibrium, limit: Tensor, sweep: dict[str, list[Tensor | None]]
) -> float:
    stencil = mode.stencil
    if not isinstance(stencil, Stencil):
        return math.nan
    vectors = sweep.get(stencil.name)
    if vectors is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EPWarning)
            vectors = _sweep(mode, stencil.at, equilibrium)
    errors = [math.inf if v is None else norm(v - limit) for v in vectors]
    best: float = AMPLITUDES[errors.index(min(errors))]
    return best


def _pullback(equilibrium: Equilibrium, trained: dict[str, nn.Parameter]) -> Callable[[Tensor], dict[str, Tensor]]:
    """`v -> (df/dtheta)^T v` at the fixed point, for every parameter."""
    with torch.enable_grad():
        value = equilibrium.f(equilibrium.z)

    def gradient(vector: Tensor) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(
            value, list(trained.values()), vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(trained, gradients, strict=True))

    return gradient


def _joined(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


def _advice(parts: Parts, beta: float, best: float, residual: float) -> str:
    causes = {
        "finite": parts.finite_nudge.relative,
        "asymmetry": parts.asymmetry.relative,
        "convergence": parts.convergence.relative,
    }
    cause, size = max(causes.items(), key=lambda item: item[1])
    if parts.total.relative <= GOOD:
        return f"The error vector is within {parts.total.relative:.1%} of the exact one: there is nothing to mend."
    if cause == "finite":
        return (
            f"Most of the error is the size of the nudge ({size:.0%}): use beta={best:.0e} instead of {beta:.0e}, or a "
            "stencil of higher order."
        )
    if cause == "asymmetry":
        return (
            f"Most of the error is the asymmetry of the Jacobian, which no amplitude removes ({size:.0%}): give the "
            "metric of the activation, use the mode 'aep', or train with a penalty on the asymmetry."
        )
    return (
        f"Most of the error is that a phase stopped early ({size:.0%}; the free phase at a relative residual of "
        f"{residual:.0e}): raise f_max_iter, lower f_tol, or lower tol of the mode."
    )
