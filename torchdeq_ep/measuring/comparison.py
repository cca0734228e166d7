"""Measuring backward modes: against the exact adjoint of the same equilibria, in time and in memory.

One forward pass with an exact backward records every equilibrium `(f, z*, g)` that the loss reaches. Each mode then
solves these same equilibria, so error vectors are compared like with like also in a model of several DEQs; gradients
come from a forward and backward pass of the whole model with that mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.certificate import adjoint_residual
from torchdeq_ep.errors import InvalidOptionError, MissingHistoryError
from torchdeq_ep.jacobian.spectrum import rough_spectral_radius
from torchdeq_ep.measuring.capture import (
    Capture,
    Trial,
    capture_all,
    caught_warnings,
    short,
    trying,
)
from torchdeq_ep.measuring.costs import milliseconds
from torchdeq_ep.measuring.costs import peak_memory as peak_memory
from torchdeq_ep.measuring.planning import OWN_SOLVER, Entry, plan
from torchdeq_ep.measuring.progress import OnProgress, Steps
from torchdeq_ep.measuring.rows import Row
from torchdeq_ep.measuring.tables import Comparison
from torchdeq_ep.modes import Mode, ModeLike, NudgeReport, Unrolled
from torchdeq_ep.relaxation import Solver
from torchdeq_ep.state import CountedMap, Equilibrium, cosine, norm, undisturbed

Exact = Literal["equilibrium", "steps"]
"""What an error is measured against: the gradient of the equilibrium, or that through the steps that were made."""
EXACT = get_args(Exact)


def compare(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor],
    backwards: Sequence[str | ModeLike] | str | ModeLike | None = None,
    solvers: Sequence[str | Solver | None] | str | Solver | None = None,
    *,
    exact: Exact = "equilibrium",
    repeats: int = 5,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Measure backward modes on a model and a batch: how exact, how fast, how large.

    The model is left as it was found: parameters and their `.grad`, buffers, random state of torch, training mode, the
    backward of its DEQs. It is measured in training mode, since torchdeq gives no gradient otherwise. Hooks of your own
    run as in any other forward pass.

    How the loss is computed:

    * `batch` a pair `(inputs, targets)`: `loss_fn(model(inputs), targets)`, with `model(*inputs)` if `inputs` is a
      tuple and `model(**inputs)` if it is a dictionary;
    * any other batch: `loss_fn(model(batch))`;
    * a `loss_fn` whose first parameter is called `model`: `loss_fn(model, batch)`, for models that need more than that.

    Args:
        model: A module with at least one torchdeq DEQ, or one that runs a [`loop`][torchdeq_ep.loop].
        batch: See above.
        loss_fn: Returns a scalar.
        backwards: Names, specs (`"hep:n_points=6"`) or modes; by default every registered one. A mode that refuses the
            model has a row that says why.
        solvers: What drives each of them: names of solvers registered with torchdeq, callables of the same signature,
            and `None` for the package's own relaxation, which is the default.
        exact: What errors are relative to: `"equilibrium"`, the exact gradient of an equilibrium at the state at which
            the forward pass stopped; or `"steps"`, backpropagation through the steps that it made, the gradient of what
            was computed. How far the two are apart is measured either way.
        repeats: Number of timings of each mode; the median counts. Modes take turns, so drift of the machine hits all.
        on_progress: Called as `on_progress(what, done, total)` before each step of the work and at its end, and not
            between timings. By default a notebook shows a bar, and nothing else does.

    Returns:
        The table; see [`Comparison`][torchdeq_ep.measuring.Comparison]. What cannot be measured is a cell without a
        number, and a note says why.

    Raises:
        UnknownBackwardError: If no backward mode has such a name.
        InvalidOptionError: If an option or a solver does not exist, or the loss has nothing to do with a DEQ.
        NoDEQError: If there is no DEQ in the model, and no loop ran.
        MissingHistoryError: If errors are to be relative to the steps made, and those of the solver are not plain.

    Example:
        >>> import torch, torchdeq
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.deq, self.linear = torchdeq.get_deq(ift=True), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.deq(lambda z: 0.5 * torch.tanh(self.linear(z)) + x, torch.zeros_like(x))[0][-1]
        >>> batch = torch.randn(2, 4), torch.randn(2, 4)
        >>> table = compare(Model(), batch, torch.nn.functional.mse_loss, ["ift", "ep"], repeats=1)
        >>> [(row.backward, row.converged) for row in table.rows]
        [('ift', True), ('ep', True)]
    """
    entries = plan(backwards, solvers)
    check_count("repeats", repeats)
    check_choice("exact", exact, EXACT)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InvalidOptionError(f"no parameter of {type(model).__name__} requires a gradient, so there is none.")
    with trying(model, batch, loss_fn, trained) as trial:
        tell = Steps(on_progress, len(entries) + 3)
        tell("the exact gradient")
        equilibrium, captures, notes = capture_all(trial)
        # Which parameters does an error vector reach? Not a read-out, whose gradient is the same whatever the mode.
        without, _ = trial.gradient(_NoErrorVector())
        reached = [k for k, pair in enumerate(zip(equilibrium, without, strict=True)) if _differ(*pair)]
        references, more = _references(trial, equilibrium, reached, exact)
        tell("the spectral radius")
        radii = [_radius(capture) for capture in captures]
        for capture in captures:
            _find_out(capture)
        rows = _measure(entries, trial, captures, references, reached, repeats, tell)
    return Comparison(
        rows=tuple(rows),
        reference=" and ".join(dict.fromkeys(capture.method for capture in captures)),
        state_entries=sum(capture.equilibrium.z.numel() for capture in captures),
        device=str(captures[0].equilibrium.z.device),
        repeats=repeats,
        warnings=(*notes, *more),
        reference_residual=_largest([capture.adjoint.residual for capture in captures]),
        free_residual=_largest([capture.equilibrium.residual for capture in captures]),
        spectral_radius=_largest(radii),
        exact=exact,
        gap=references.gap,
        own_errors=references.own_errors,
    )


@dataclass(frozen=True)
class References:
    """The two gradients that may be called exact, and the one of the model as it is, of the parameters reached."""

    exact: Exact
    equilibrium: Tensor
    steps: Tensor | None
    own: Tensor | None

    @property
    def chosen(self) -> Tensor:
        return self.steps if self.exact == "steps" and self.steps is not None else self.equilibrium

    @property
    def other(self) -> Tensor | None:
        return self.equilibrium if self.exact == "steps" else self.steps

    @property
    def gap(self) -> float:
        return math.nan if self.other is None else _relative_error(self.other, self.chosen)

    @property
    def own_errors(self) -> tuple[float, float]:
        """Relative to the gradient of the equilibrium, and to that of the steps."""
        if self.own is None:
            return math.nan, math.nan
        to_steps = math.nan if self.steps is None else _relative_error(self.own, self.steps)
        return _relative_error(self.own, self.equilibrium), to_steps


def _references(
    trial: Trial, equilibrium: Sequence[Tensor], reached: Sequence[int], exact: Exact
) -> tuple[References, list[str]]:
    found: dict[str, Tensor | None] = {"steps": None, "own": None}
    notes = []
    for name, mode in (("steps", Unrolled()), ("own", None)):
        try:
            gradient, _ = trial.gradient(mode)
            found[name] = _joined([gradient[k] for k in reached])
        except MissingHistoryError:  # a solver whose steps are not plain has no such gradient
            if name == exact:
                raise
        except Exception as error:  # not enough memory for all of them
            if name == exact:
                raise
            notes.append(f"no gradient {'through the steps made' if name == 'steps' else 'of its own'}: {short(error)}")
    return References(exact, _joined([equilibrium[k] for k in reached]), **found), notes


class _NoErrorVector(Mode):
    """Zero, also where the cotangent is not finite."""

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return self._solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return torch.zeros_like(equilibrium.z), NudgeReport("zero")


def _differ(gradient: Tensor, other: Tensor) -> bool:
    """Whether two gradients differ by more than the order of a sum on a GPU explains."""
    return norm(gradient - other) > 100 * torch.finfo(gradient.dtype).eps * norm(gradient)


def _largest(values: Sequence[float]) -> float:
    """NaN if one of them is: it might be the largest."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _radius(capture: Capture) -> float:
    try:
        with caught_warnings(), capture.autocast.restored(True):
            return rough_spectral_radius(capture.equilibrium.f, capture.equilibrium.z)
    except Exception:  # an operation without products, in whatever way it says so
        return math.nan


def _find_out(capture: Capture) -> None:
    """Which rows are independent and how `f` rounds: remembered, as in training, so that no mode is charged for it."""
    for find in (capture.equilibrium.independent_rows, lambda: capture.equilibrium.rounding):
        with suppress(Exception), capture.autocast.restored(True), undisturbed(capture.equilibrium.records):
            find()


def _measure(
    entries: Sequence[Entry],
    trial: Trial,
    captures: Sequence[Capture],
    references: References,
    reached: Sequence[int],
    repeats: int,
    tell: Steps,
) -> list[Row]:
    """The rows. A mode that fails at any stage has one that says so."""
    figures: dict[int, dict[str, Any]] = {}
    errors = {k: entry.error for k, entry in enumerate(entries)}
    calls: dict[int, Callable[[], object]] = {}
    passes: dict[int, Callable[[], object]] = {}
    exact = _joined([capture.exact for capture in captures])
    for k, entry in enumerate(entries):
        tell(entry.backward if entry.solver == OWN_SOLVER else f"{entry.backward} / {entry.solver}")
        if entry.mode is None:
            continue
        # Each has its own memory of what was said, or the warnings of the first would silence the others.
        own = [capture.anew() for capture in captures]
        try:
            figures[k] = _figures(entry.mode, trial, own, exact, references, reached)
        except Exception as error:  # one mode, perhaps of a plugin, must not cost the others their rows
            errors[k] = short(error)
        else:
            calls[k] = partial(_solve_all, entry.mode, own)
            if "gradient_error" in figures[k]:
                passes[k] = partial(trial.go_on, entry.mode)
    tell("times")
    device = captures[0].equilibrium.z.device
    of_passes, _ = milliseconds(passes, device, repeats, trial.found.restore)
    for k, figure in of_passes.items():
        figures[k]["step_milliseconds"] = figure
    times, failed = milliseconds({k: call for k, call in calls.items() if not _is_bound(entries[k])}, device, repeats)
    for k in calls:
        figures[k]["milliseconds"] = times.get(k, math.nan)
        if k in failed:
            figures[k]["warnings"] += (f"no time: {failed[k]}",)
    tell.end()
    return [Row(e.backward, e.solver, error=errors[k], **figures.get(k, {})) for k, e in enumerate(entries)]


def _is_bound(entry: Entry) -> bool:
    """Whether a mode makes nothing of an equilibrium by itself, without what a solver or loop keeps for it."""
    return getattr(entry.mode, "needs", None) is not None


def _figures(
    mode: ModeLike,
    trial: Trial,
    captures: Sequence[Capture],
    exact_adjoint: Tensor,
    references: References,
    reached: Sequence[int],
) -> dict[str, Any]:
    """All of a row but the time. A mode that solves the equilibria and then fails in the model has those figures."""
    if getattr(mode, "needs", None) is not None:
        with caught_warnings() as notes:
            found = _gradient_figures(mode, trial, references, reached)
        return {**found, "warnings": tuple(notes)}
    with caught_warnings() as notes:
        vectors, calls, reports = _solve_all(mode, captures)
    error_vector = _joined(vectors)
    figures: dict[str, Any] = {
        "adjoint_error": _relative_error(error_vector, exact_adjoint),
        "adjoint_cosine": cosine(error_vector, exact_adjoint),
        "adjoint_residual": _largest(_adjoint_residuals(captures, vectors)),
        "nudge_error": max((report.nudge_error for report in reports), default=math.nan),
        "residual": max((report.residual for report in reports), default=math.nan),
        "calls": calls,
        "beta": max((report.beta for report in reports), default=math.nan),
        "converged": all(report.converged for report in reports) if reports else None,
        "usable": all(report.is_usable for report in reports) if reports else None,
    }
    unusable = [f"no usable estimate: {_fault(report)}" for report in reports if not report.is_usable]
    try:
        figures |= _gradient_figures(mode, trial, references, reached)
    except Exception as error:
        notes.append(f"no gradient: {short(error)}")
    try:
        with caught_warnings():
            device = captures[0].equilibrium.z.device
            figures["peak_mib"] = peak_memory(lambda: _solve_all(mode, captures), device) / 2**20
    except Exception as error:
        notes.append(f"no memory: {short(error)}")
    return {**figures, "warnings": tuple(dict.fromkeys([*unusable, *notes]))}


def _gradient_figures(mode: ModeLike, trial: Trial, references: References, reached: Sequence[int]) -> dict[str, float]:
    """How far the gradient of the whole model is from the two that may be called exact."""
    every, _ = trial.gradient(mode)
    gradient = _joined([every[j] for j in reached])
    return {
        "gradient_error": _relative_error(gradient, references.chosen),
        "gradient_cosine": cosine(gradient, references.chosen),
        "other_error": math.nan if references.other is None else _relative_error(gradient, references.other),
    }


def _adjoint_residuals(captures: Sequence[Capture], vectors: Sequence[Tensor]) -> list[float]:
    residuals = []
    for capture, vector in zip(captures, vectors, strict=True):
        with capture.autocast.restored(True):
            residuals.append(adjoint_residual(capture.equilibrium, vector))
    return residuals


def _fault(report: NudgeReport) -> str:
    return "it diverged" if report.diverged else f"a relative residual of {report.residual:.1e}"


def _solve_all(mode: ModeLike, captures: Sequence[Capture]) -> tuple[list[Tensor], int, list[NudgeReport]]:
    """What a mode makes of the equilibria: an error vector for each, the calls of the map, and what it reports."""
    vectors, reports = [], []
    calls = 0
    for capture in captures:
        equilibrium = capture.equilibrium
        with capture.autocast.restored(True):
            if isinstance(mode, Mode):
                vector, report = mode.solve(equilibrium)
                reports.append(report)
                calls += report.calls
            else:
                counted = CountedMap(equilibrium.f)  # such modes do not report their calls
                with undisturbed():
                    vector = mode(counted, equilibrium.z, equilibrium.cotangent)
                calls += counted.calls
        vectors.append(vector)
    return vectors, calls, reports


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().cpu().double() for tensor in tensors]) if tensors else torch.zeros(0)


def _relative_error(estimate: Tensor, exact: Tensor) -> float:
    if estimate.shape != exact.shape:
        raise InvalidOptionError(f"the mode returned {estimate.numel()} entries where the state has {exact.numel()}.")
    return norm(estimate - exact) / norm(exact) if norm(exact) > 0 else math.nan
