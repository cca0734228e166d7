"""Why is an EP gradient off? Its error, split into the three causes it can have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.backward import ImplicitDifferentiation, InfinitesimalEP
from torchdeq_ep.capture import Capture, Reference, Task, caught_warnings, left_as_found
from torchdeq_ep.compare.files import require
from torchdeq_ep.compare.plot import check_plot
from torchdeq_ep.compare.style import COLOURS, INK, SHAPES, dress, new_figure, save
from torchdeq_ep.equilibrium import Equilibrium, norm
from torchdeq_ep.errors import EPError, EPWarning, InvalidOptionError, JacobianProductError
from torchdeq_ep.evaluation import undisturbed
from torchdeq_ep.homeostasis import SymmetryMeasurement, measure_symmetry
from torchdeq_ep.host import deqs_of
from torchdeq_ep.jacobian import spectral_radius
from torchdeq_ep.metric import Metric
from torchdeq_ep.propagation import EquilibriumPropagation
from torchdeq_ep.registry import BackwardRule, get_backward
from torchdeq_ep.relaxation import relax
from torchdeq_ep.stencils import Stencil

GOOD = 0.01
"""An error vector within this relative error of the exact one needs no advice."""

AMPLITUDES = tuple(10.0 ** (k / 2) for k in range(-8, 1))
"""The amplitudes of the sweep: from 1e-4 to 1, relative to the state."""

_TIGHT_STEPS = 1000
_PROBES = 50
_HEADINGS = ("where", "total", "finite nudge", "asymmetry", "convergence")
_MEASURES = ("DEQ", "symmetry", "asymmetry", "spectral radius", "beta", "best beta")
_STENCILS: dict[str, Callable[[float], Stencil]] = {
    "one-sided": Stencil.one_sided,
    "symmetric": Stencil.symmetric,
    "richardson-4": Stencil.richardson,
    "contour-4": Stencil.contour,
}


@dataclass(frozen=True)
class Part:
    """One part of an error.

    Args:
        relative: Its norm, relative to that of the exact error vector or gradient.
        cosine: Cosine of the angle between the exact one and the exact one with this part added.

    Example:
        >>> part = Part.of(torch.tensor([0.0, 0.75]), torch.tensor([1.0, 0.0]))
        >>> round(part.relative, 4), round(part.cosine, 4)
        (0.75, 0.8)
    """

    relative: float
    cosine: float

    @classmethod
    def of(cls, part: Tensor, exact: Tensor) -> Part:
        """The part `part` of an error, measured against the exact vector.

        Args:
            part: What is added to the exact vector.
            exact: The exact error vector or gradient.

        Returns:
            The two numbers; NaN where the exact vector is zero.
        """
        scale = norm(exact)
        spoiled = exact + part
        lengths = scale * norm(spoiled)
        cosine = float((exact * spoiled).sum()) / lengths if lengths > 0 else math.nan
        return cls(norm(part) / scale if scale > 0 else math.nan, cosine)


@dataclass(frozen=True)
class Parts:
    """An error as the sum of three, each measured by itself.

    Args:
        finite_nudge: What the nudge at a finite amplitude adds to its limit.
        asymmetry: What the limit differs from the exact adjoint by, because the Jacobian is not symmetric.
        convergence: What the free and nudged phases add by stopping early.
        total: All three together.

    Example:
        >>> none, some = Part(0.0, 1.0), Part(0.1, 0.995)
        >>> Parts(finite_nudge=none, asymmetry=some, convergence=none, total=some).asymmetry.relative
        0.1
    """

    finite_nudge: Part
    asymmetry: Part
    convergence: Part
    total: Part


@dataclass(frozen=True)
class LayerDiagnosis:
    """The diagnosis of one DEQ.

    Args:
        name: Its name in the model.
        error_vector: The error of the error vector in parts.
        parameters: The same for the gradient of each parameter that the DEQ reaches, by name.
        beta: Relative amplitude that the mode used.
        best_beta: Amplitude of the sweep with the smallest finite-nudge error, for the stencil of the mode.
        residual: Relative residual of the free phase.
        sweep: Cosine of the gradient, over all parameters that the DEQ reaches, to the exact one at each of
            `AMPLITUDES`, by stencil; NaN where a nudge failed.
        floor: The same cosine in the limit of every nudge: what all stencils tend to as the amplitude falls.
        symmetry: How symmetric the Jacobian is, `J M` if the mode has a metric; `None` if `f` has an operation that can
            be differentiated only once.
        spectral_radius: The largest modulus of an eigenvalue of the Jacobian `J`.
        advice: What to do, in one sentence.
        notes: What the mode and the spectral radius warned about.

    Example:
        >>> import torchdeq
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.deq, self.linear = torchdeq.get_deq(f_tol=1e-6), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.deq(lambda z: 0.5 * torch.tanh(self.linear(z)) + x, torch.zeros_like(x))[0][-1]
        >>> (layer,) = diagnose(Model(), torch.randn(2, 4), torch.Tensor.sum).layers
        >>> layer.name, sorted(layer.parameters), layer.spectral_radius < 1
        ('deq', ['linear.bias', 'linear.weight'], True)
    """

    name: str
    error_vector: Parts
    parameters: dict[str, Parts]
    beta: float
    best_beta: float
    residual: float
    sweep: dict[str, tuple[float, ...]]
    floor: float
    symmetry: SymmetryMeasurement | None
    spectral_radius: float
    advice: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What [`diagnose`][torchdeq_ep.diagnose.diagnose] returns: one entry for each DEQ that the loss reaches.

    Args:
        backward: The mode diagnosed.
        layers: The DEQs, in the order of the backward pass.

    Example:
        >>> part = Part(0.0, 1.0)
        >>> layer = LayerDiagnosis(
        ...     "deq", Parts(part, part, part, part), {}, 0.01, 0.01, 1e-7, {}, 1.0, None, 0.5, "Nothing to do.", ()
        ... )
        >>> Diagnosis("ep", (layer,)).advice
        ('Nothing to do.',)
    """

    backward: str
    layers: tuple[LayerDiagnosis, ...]

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, in one sentence for each DEQ, which is named if there are several."""
        return tuple(f"{layer.name}: {layer.advice}" if len(self.layers) > 1 else layer.advice for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data.

        Returns:
            Nested dictionaries, ready for JSON: a figure that does not exist is `None`.
        """
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_markdown(self) -> str:
        """A table of the parts, one of the measures of each Jacobian, and the advice.

        Returns:
            One row for each DEQ and each of its parameters, as relative norm and, in brackets, cosine; then one row for
            each DEQ.
        """
        parts, measures = _markdown(_HEADINGS, _rows(self)), _markdown(_MEASURES, _measures(self))
        return "\n".join([*parts, "", *measures, "", *self.advice])

    def plot(self, path: str | Path) -> None:
        """Draw the cosine to the exact gradient against the amplitude for each stencil, with the asymmetry floor.

        Args:
            path: File to write; its suffix chooses the format.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
            InvalidOptionError: If the file cannot be written.
        """
        check_plot(path)
        save(_draw(self), path)


def diagnose(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor], backward: str | BackwardRule = "ep"
) -> Diagnosis:
    """Split the error of an EP gradient into its causes, and say what to do about the largest.

    With `z**` the fixed point solved to rounding error, the estimate `v` of the mode differs from the exact adjoint by

        (v - v_tight) + (v_tight - v_limit) + (v_limit - v_exact)

    which are called *convergence*, *finite nudge* and *asymmetry*: `v_tight` is the same mode at `z**`, solved to
    rounding error, `v_limit` its limit for a vanishing nudge, and `v_exact` solves `v = J^T v + g`.

    Args:
        model: A module with at least one torchdeq DEQ; left as it was found.
        batch: As for [`compare`][torchdeq_ep.compare.compare].
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
        Task(model, batch, loss_fn, list(trained.values()), found).gradient(reference)
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
        return math.nan if vector is None else _cosine(_joined(gradient(vector)), _joined(exact_gradient))

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


def _cosine(estimate: Tensor, exact: Tensor) -> float:
    lengths = norm(estimate) * norm(exact)
    return float((estimate * exact).sum()) / lengths if lengths > 0 else math.nan


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


def _rows(diagnosis: Diagnosis) -> list[list[str]]:
    rows = []
    for layer in diagnosis.layers:
        named = {f"{layer.name or 'the DEQ'}: error vector": layer.error_vector, **layer.parameters}
        for where, parts in named.items():
            cells = (parts.total, parts.finite_nudge, parts.asymmetry, parts.convergence)
            rows.append([where, *(f"{part.relative:.1e} ({part.cosine:.3f})" for part in cells)])
    return rows


def _measures(diagnosis: Diagnosis) -> list[list[str]]:
    rows = []
    for layer in diagnosis.layers:
        found = layer.symmetry
        symmetry = (
            ("-", "-")
            if found is None
            else (
                f"{found.symmetry:.3f} ± {found.symmetry_se:.3f}",
                f"{found.asymmetry:.3f} ± {found.asymmetry_se:.3f}",
            )
        )
        amplitudes = (f"{layer.beta:.1e}", f"{layer.best_beta:.1e}")
        rows.append([layer.name or "the DEQ", *symmetry, f"{layer.spectral_radius:.3f}", *amplitudes])
    return rows


def _markdown(headings: Sequence[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def to_rich_tables(diagnosis: Diagnosis) -> list[Any]:
    """The tables of parts and of measures for a terminal.

    Args:
        diagnosis: What to show.

    Returns:
        Two of `rich.table.Table`.

    Raises:
        MissingDependencyError: If rich is not installed.
    """
    rich_table = require("rich.table", "rich", "A table in the terminal")
    box = require("rich.box", "rich", "A table in the terminal").SIMPLE_HEAD
    tables = []
    for headings, rows in ((_HEADINGS, _rows(diagnosis)), (_MEASURES, _measures(diagnosis))):
        table = rich_table.Table(box=box, pad_edge=False)
        for k, heading in enumerate(headings):
            table.add_column(heading, justify="right" if k else "left", overflow="fold")
        for cells in rows:
            table.add_row(*cells)
        tables.append(table)
    return tables


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(diagnosis: Diagnosis) -> Any:
    layers: Sequence[LayerDiagnosis] = diagnosis.layers
    figure = new_figure(6.4 * len(layers), 4.4)
    figure.set_layout_engine("constrained")
    for k, layer in enumerate(layers):
        axes = figure.add_subplot(1, len(layers), k + 1)
        dress(axes)
        for (stencil, cosines), colour, marker in zip(layer.sweep.items(), COLOURS[1:], SHAPES, strict=False):
            if any(math.isfinite(cosine) for cosine in cosines):
                axes.plot(AMPLITUDES, cosines, color=colour, marker=marker, label=stencil)
        axes.axhline(layer.floor, color="black", linestyle="--", linewidth=1, label="limit of every nudge")
        axes.set_xscale("log")
        axes.set_xlabel("amplitude beta, relative to the state", color=INK)
        axes.set_ylabel("cosine to the exact gradient", color=INK)
        axes.set_title(
            f"{layer.name or 'DEQ'}: how well is the gradient aligned?", loc="left", fontsize="medium", color=INK
        )
        axes.legend(frameon=False, labelcolor=INK)
    return figure
