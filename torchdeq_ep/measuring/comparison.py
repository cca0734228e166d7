"""Measuring backward modes: against the exact adjoint of the same equilibria, in time and in memory.

One forward pass with an exact backward records every equilibrium `(f, z*, g)` that the loss reaches. Each mode then
solves these same equilibria, so error vectors are compared like with like also in a model of several DEQs; gradients
come from a forward and backward pass of the whole model with that mode.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep._options import check_count
from torchdeq_ep.errors import EPError, InvalidOptionError
from torchdeq_ep.host import deqs_of
from torchdeq_ep.measuring.capture import Capture, Reference, Trial, caught_warnings, left_as_found, short
from torchdeq_ep.measuring.tables import Comparison, Row
from torchdeq_ep.modes import Mode, ModeLike, available_backwards, get_backward
from torchdeq_ep.relaxation import Solver, check_solver
from torchdeq_ep.state import Map, cosine, norm, undisturbed

OWN_SOLVER = "own"


def compare(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor],
    backwards: Sequence[str | ModeLike] | str | ModeLike | None = None,
    solvers: Sequence[str | Solver | None] | str | Solver | None = None,
    *,
    repeats: int = 5,
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
        model: A module with at least one torchdeq DEQ.
        batch: See above.
        loss_fn: Returns a scalar.
        backwards: Names, specs (`"hep:n_points=6"`) or modes; by default every registered one. A mode that refuses the
            model has a row that says why.
        solvers: What drives each of them: names of solvers registered with torchdeq, callables of the same signature,
            and `None` for the package's own relaxation, which is the default.
        repeats: Number of timings of each mode; the median counts. Modes take turns, so drift of the machine hits all.

    Returns:
        The table; see [`Comparison`][torchdeq_ep.measuring.Comparison].

    Raises:
        UnknownBackwardError: If no backward mode has such a name.
        InvalidOptionError: If an option or a solver does not exist, or the loss has nothing to do with a DEQ.
        NoDEQError: If there is no DEQ in the model.
        NonFiniteError: If there is no exact adjoint to compare with.

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
    deqs = deqs_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InvalidOptionError(f"no parameter of {type(model).__name__} requires a gradient, so there is none.")
    with left_as_found(model) as found, torch.enable_grad():
        if not all(deq.training for deq in deqs):
            model.train()
        trial = Trial(model, batch, loss_fn, trained, found)
        reference = Reference()
        exact_gradient, reference_notes = trial.gradient(reference)
        if not reference.captures:
            raise InvalidOptionError("the loss has no gradient with respect to an equilibrium of any DEQ in the model.")
        # Which parameters does an error vector reach? Not a read-out, whose gradient is the same whatever the mode.
        without, _ = trial.gradient(_no_error_vector)
        reached = [k for k, pair in enumerate(zip(exact_gradient, without, strict=True)) if _differ(*pair)]
        rows = _measure(entries, trial, reference.captures, [exact_gradient[k] for k in reached], reached, repeats)
    return Comparison(
        rows=tuple(rows),
        reference=" and ".join(dict.fromkeys(capture.method for capture in reference.captures)),
        state_entries=sum(capture.equilibrium.z.numel() for capture in reference.captures),
        device=str(reference.captures[0].equilibrium.z.device),
        repeats=repeats,
        warnings=reference_notes,
    )


@dataclass(frozen=True)
class Entry:
    """A row to be measured: its labels, and the mode or the reason why there is none."""

    backward: str
    solver: str
    mode: ModeLike | None
    error: str = ""


def plan(
    backwards: Sequence[str | ModeLike] | str | ModeLike | None,
    solvers: Sequence[str | Solver | None] | str | Solver | None,
) -> tuple[Entry, ...]:
    """The rows that [`compare`][torchdeq_ep.measuring.compare] will measure; refuses names that do not exist.

    Args:
        backwards: As given to `compare`.
        solvers: As given to `compare`.

    Returns:
        Every mode with every solver.

    Raises:
        UnknownBackwardError: If no backward mode has such a name.
        InvalidOptionError: If an option or a solver does not exist, or there is nothing to compare.

    Example:
        >>> [(entry.backward, entry.solver) for entry in plan(["ift", "ep"], [None, "anderson"])]
        [('ift', 'own'), ('ift', 'anderson'), ('ep', 'own'), ('ep', 'anderson')]
    """
    chosen = list(available_backwards()) if backwards is None else _as_list(backwards)
    drivers = [None] if solvers is None else _as_list(solvers)
    for name, choice in (("backwards", chosen), ("solvers", drivers)):
        if not choice:
            raise InvalidOptionError(f"there is nothing to compare: {name} is empty.")
    for spec in chosen:
        get_backward(spec)
    for solver in drivers:
        check_solver(solver)
    return tuple(_entry(spec, solver) for spec in chosen for solver in drivers)


def _as_list(choice: Any) -> list[Any]:
    return [choice] if isinstance(choice, str) or callable(choice) else list(choice)


def _entry(spec: str | ModeLike, solver: str | Solver | None) -> Entry:
    backward, driver = _label(spec), OWN_SOLVER if solver is None else _label(solver)
    try:
        # Not every mode takes a solver, one from a plugin say.
        return Entry(backward, driver, get_backward(spec) if solver is None else get_backward(spec, solver=solver))
    except EPError as error:
        return Entry(backward, driver, None, short(error))


def _label(choice: Any) -> str:
    return choice if isinstance(choice, str) else getattr(choice, "__name__", None) or repr(choice)


def _no_error_vector(f: Map, z_star: Tensor, cotangent: Tensor) -> Tensor:
    return torch.zeros_like(z_star)


def _differ(gradient: Tensor, other: Tensor) -> bool:
    """Whether two gradients differ by more than the order of a sum on a GPU explains."""
    return norm(gradient - other) > 100 * torch.finfo(gradient.dtype).eps * norm(gradient)


@dataclass(frozen=True)
class _Solve:
    """What one mode made of the equilibria: an error vector for each, and what it reports."""

    error_vectors: list[Tensor]
    calls: int
    residual: float
    beta: float
    converged: bool | None


def _measure(
    entries: Sequence[Entry],
    trial: Trial,
    captures: Sequence[Capture],
    exact_gradient: Sequence[Tensor],
    reached: Sequence[int],
    repeats: int,
) -> list[Row]:
    """The rows. A mode that fails at any stage has one that says so."""
    exact_adjoint = _joined([capture.exact for capture in captures])
    exact = _joined(exact_gradient)
    figures: dict[int, dict[str, Any]] = {}
    errors = {k: entry.error for k, entry in enumerate(entries)}
    for k, entry in enumerate(entries):
        if entry.mode is None:
            continue
        try:
            with caught_warnings() as notes:
                solved = _solve_all(entry.mode, captures)
            gradient, _ = trial.gradient(entry.mode)
            error_vector = _joined(solved.error_vectors)
            reached_gradient = _joined([gradient[j] for j in reached])
            figures[k] = {
                "adjoint_error": _relative_error(error_vector, exact_adjoint),
                "adjoint_cosine": cosine(error_vector, exact_adjoint),
                "gradient_error": _relative_error(reached_gradient, exact),
                "gradient_cosine": cosine(reached_gradient, exact),
                "residual": solved.residual,
                "calls": solved.calls,
                "beta": solved.beta,
                "converged": solved.converged,
                "warnings": tuple(dict.fromkeys(notes)),
                "peak_mib": _peak_mib(entry.mode, captures),
            }
        except Exception as error:  # one mode, perhaps of a plugin, must not cost the others their rows
            errors[k] = short(error)
    modes = {k: entry.mode for k, entry in enumerate(entries) if k in figures and entry.mode is not None}
    for k, milliseconds in _milliseconds(modes, captures, repeats).items():
        figures[k]["milliseconds"] = milliseconds
    return [Row(e.backward, e.solver, error=errors[k], **figures.get(k, {})) for k, e in enumerate(entries)]


def _solve_all(mode: ModeLike, captures: Sequence[Capture]) -> _Solve:
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
                counted = _Counted(equilibrium.f)
                with undisturbed():
                    vector = mode(counted, equilibrium.z, equilibrium.cotangent)
                calls += counted.calls
        vectors.append(vector)
    return _Solve(
        vectors,
        calls,
        residual=max((report.residual for report in reports), default=math.nan),
        beta=max((report.beta for report in reports), default=math.nan),
        converged=all(report.converged for report in reports) if reports else None,
    )


class _Counted:
    """A map that counts its calls, for modes that do not report them."""

    def __init__(self, f: Map) -> None:
        self._f = f
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self._f(z)


def _milliseconds(modes: dict[int, ModeLike], captures: Sequence[Capture], repeats: int) -> dict[int, float]:
    """Median time of each mode; all have solved these equilibria before, so nothing is left to warm up."""
    device = captures[0].equilibrium.z.device
    times: dict[int, list[float]] = {k: [] for k in modes}
    with caught_warnings():
        for _ in range(repeats):
            for k, mode in modes.items():
                _synchronize(device)
                start = time.perf_counter()
                _solve_all(mode, captures)
                _synchronize(device)
                times[k].append(1e3 * (time.perf_counter() - start))
    return {k: statistics.median(values) for k, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(mode: ModeLike, captures: Sequence[Capture]) -> float:
    with caught_warnings():
        return peak_memory(lambda: _solve_all(mode, captures), captures[0].equilibrium.z.device) / 2**20


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Largest memory in use during a call beyond what was in use before, in bytes; NaN where nothing tells.

    Args:
        call: What to run.
        device: Where its tensors are.

    Returns:
        Bytes, by the allocator's own count on a GPU, by PyTorch's profiler on a CPU.

    Example:
        >>> import torch
        >>> peak_memory(lambda: torch.ones(1000), torch.device("cpu")) >= 4000
        True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return math.nan
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            call()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    except (RuntimeError, AttributeError):  # a profiler runs already, or this torch has another one
        return math.nan
    in_use = peak = 0
    for _, change in changes:
        in_use += change
        peak = max(peak, in_use)
    return float(peak) if changes else math.nan


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors]) if tensors else torch.zeros(0)


def _relative_error(estimate: Tensor, exact: Tensor) -> float:
    if estimate.shape != exact.shape:
        raise InvalidOptionError(f"the mode returned {estimate.numel()} entries where the state has {exact.numel()}.")
    return norm(estimate - exact) / norm(exact) if norm(exact) > 0 else math.nan
