"""The result of a diagnosis: the error of an EP gradient in parts for each DEQ, as data, in tables and as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from torchdeq_ep._display import html_lines, html_table, text_table
from torchdeq_ep.jacobian import SymmetryMeasurement
from torchdeq_ep.measuring.files import plain, require
from torchdeq_ep.measuring.plots import Panel, check_plot, draw_panels
from torchdeq_ep.measuring.style import save
from torchdeq_ep.state import cosine, norm

GOOD = 0.01
"""An error vector within this relative error of the exact one needs no advice."""
AMPLITUDES = tuple(10.0 ** (k / 2) for k in range(-8, 1))
"""The amplitudes of the sweep: from 1e-4 to 1, relative to the state."""
_HEADINGS = ("where", "total", "finite nudge", "asymmetry", "convergence")
_MEASURES = (
    "DEQ",
    "adjoint residual",
    "symmetry",
    "asymmetry",
    "spectral radius",
    "free residual",
    "exact residual",
    "beta",
    "best beta",
)


@dataclass(frozen=True)
class Part:
    """One part of an error.

    Args:
        relative: Its norm, relative to that of the exact error vector or gradient.
        cosine: Cosine of the angle between the exact one and the exact one with this part added.
        reason: Why both are NaN, in a few words, or an empty text.

    Example:
        >>> import torch
        >>> part = Part.of(torch.tensor([0.0, 0.75]), torch.tensor([1.0, 0.0]))
        >>> round(part.relative, 4), round(part.cosine, 4)
        (0.75, 0.8)
    """

    relative: float
    cosine: float
    reason: str = ""

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
        if not scale > 0:
            return cls(math.nan, math.nan, "exact one is zero")
        return cls(norm(part) / scale, cosine(exact, exact + part))

    @property
    def cell(self) -> str:
        """Both in a table, or the reason why they are not there."""
        if not math.isfinite(self.relative):
            return self.reason or "not finite"
        return f"{self.relative:.1e} ({self.cosine:.3f})"


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
        residual: Relative residual of the free phase as the model has it.
        sweep: Cosine of the gradient, over all parameters that the DEQ reaches, to the exact one at each of
            `AMPLITUDES`, by stencil; NaN where a nudge failed or has no usable estimate.
        limit_alignment: The same cosine in the limit of every nudge: what all stencils tend to as the amplitude falls.
        symmetry: How symmetric the Jacobian is, `J M` if the mode has a metric; `None` if it cannot be measured, e.g.
            because `f` has an operation that can be differentiated only once.
        spectral_radius: The largest modulus of an eigenvalue of the Jacobian `J`; NaN likewise.
        advice: What to do about the likeliest cause, in a sentence or two.
        notes: What the mode warned about, and what could not be measured or did not converge.
        adjoint_residual: `|v - J^T v - g| / |g|` of the estimate, the number that a [training run](certificate.md)
            reports of it.
        settled_residual: Relative residual of the free phase where it is solved further, for all parts but convergence.
        exact_residual: Relative residual of the exact adjoint; above 0.001 it is not exact, and the advice says so. NaN
            where there is none.
        reasons: Why a measure of the Jacobian or an amplitude has no number, in a few words, by the field.

    Example:
        >>> import torch, torchdeq
        >>> from torchdeq_ep import diagnose
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
    limit_alignment: float
    symmetry: SymmetryMeasurement | None
    spectral_radius: float
    advice: str
    notes: tuple[str, ...]
    adjoint_residual: float = math.nan
    settled_residual: float = math.nan
    exact_residual: float = math.nan
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What [`diagnose`][torchdeq_ep.measuring.diagnose] returns: one entry for each DEQ that the loss reaches.

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.backward}: {' '.join(self.advice)}>"

    def __str__(self) -> str:
        tables = text_table(_HEADINGS, _rows(self)), text_table(_MEASURES, _measures(self))
        return "\n\n".join([*tables, "\n".join(self.advice)])

    def _repr_html_(self) -> str:
        parts, measures = html_table(_HEADINGS, _rows(self)), html_table(_MEASURES, _measures(self))
        return parts + measures + html_lines(self.advice)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, in one sentence for each DEQ, which is named if there are several."""
        return tuple(f"{layer.name}: {layer.advice}" if len(self.layers) > 1 else layer.advice for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data.

        Returns:
            Nested dictionaries, ready for JSON: a figure that does not exist is `None`.
        """
        whole: dict[str, Any] = plain(asdict(self))
        return whole

    def to_markdown(self) -> str:
        """A table of the parts, one of the measures of each Jacobian, and the advice.

        Returns:
            One row for each DEQ and each of its parameters, as relative norm and, in brackets, cosine; then one row for
            each DEQ.
        """
        parts, measures = _markdown(_HEADINGS, _rows(self)), _markdown(_MEASURES, _measures(self))
        return "\n".join([*parts, "", *measures, "", *self.advice])

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the cosine to the exact gradient against the amplitude for each stencil, and the limit of all of them.

        Args:
            path: File to write, if any; its suffix chooses the format.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
            InvalidOptionError: If the file cannot be written.
        """
        if path is not None:
            check_plot(path)
        panels = [
            Panel(f"{layer.name or 'DEQ'}: how well is the gradient aligned?", layer.sweep, layer.limit_alignment)
            for layer in self.layers
        ]
        words = ("amplitude beta, relative to the state", "cosine to the exact gradient", "limit of every nudge")
        figure = draw_panels(panels, AMPLITUDES, *words)
        if path is not None:
            save(figure, path)
        return figure


def _rows(diagnosis: Diagnosis) -> list[list[str]]:
    rows = []
    for layer in diagnosis.layers:
        named = {f"{layer.name or 'the DEQ'}: error vector": layer.error_vector, **layer.parameters}
        for where, parts in named.items():
            cells = (parts.total, parts.finite_nudge, parts.asymmetry, parts.convergence)
            rows.append([where, *(part.cell for part in cells)])
    return rows


def _measures(diagnosis: Diagnosis) -> list[list[str]]:
    rows = []
    for layer in diagnosis.layers:
        found = layer.symmetry
        if found is None:
            symmetry = (layer.reasons.get("symmetry", "-"),) * 2
        else:
            symmetry = (
                f"{found.symmetry:.3f} ± {found.symmetry_se:.3f}",
                f"{found.asymmetry:.3f} ± {found.asymmetry_se:.3f}",
            )
        figures = (
            ("spectral_radius", layer.spectral_radius, ".3f"),
            ("residual", layer.residual, ".1e"),
            ("exact_residual", layer.exact_residual, ".1e"),
            ("beta", layer.beta, ".1e"),
            ("best_beta", layer.best_beta, ".1e"),
        )
        cells = (
            format(value, form) if math.isfinite(value) else layer.reasons.get(name, "-")
            for name, value, form in figures
        )
        certificate = format(layer.adjoint_residual, ".1e") if math.isfinite(layer.adjoint_residual) else "-"
        rows.append([layer.name or "the DEQ", certificate, *symmetry, *cells])
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
        table = rich_table.Table(box=box, pad_edge=False, padding=(0, 1, 0, 0))
        for k, heading in enumerate(headings):
            table.add_column(heading, justify="right" if k else "left", overflow="fold")
        for cells in rows:
            table.add_row(*(cell.replace(" ± ", "±") for cell in cells))  # or 80 characters do not hold it
        tables.append(table)
    return tables
