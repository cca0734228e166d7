"""Measuring backward modes: against the exact adjoint of the same equilibria, in time and in memory.

One forward pass with an exact backward records every equilibrium `(f, z*, g)` that the loss reaches. Each mode then
solves these same equilibria, so error vectors are compared like with like also in a model of several DEQs; gradients
come from a forward and backward pass of the whole model with that mode.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.backward import Backward, ImplicitDifferentiation, NudgeReport
from torchdeq_ep.compare.table import Comparison, Row
from torchdeq_ep.equilibrium import Equilibrium, norm
from torchdeq_ep.errors import EPError, InvalidOptionError, NonFiniteError
from torchdeq_ep.evaluation import Autocast, Map, undisturbed
from torchdeq_ep.host import deqs_of, use_backward
from torchdeq_ep.jacobian import dense_jacobian
from torchdeq_ep.registry import BackwardRule, available_backwards, get_backward
from torchdeq_ep.relaxation import Solver, find_solver

LARGEST_DENSE = 4096
"""States with more entries than this have no dense reference: the Jacobian would not fit."""

OWN_SOLVER = "own"
_NOTE_LENGTH = 160
_REFERENCE_STEPS = 1000


def compare(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor],
    backwards: Sequence[str | BackwardRule] | str | BackwardRule | None = None,
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
        The table; see [`Comparison`][torchdeq_ep.compare.table.Comparison].

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
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise InvalidOptionError(f"repeats must be a whole number of at least 1, not {repeats!r}.")
    deqs = deqs_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InvalidOptionError(f"no parameter of {type(model).__name__} requires a gradient, so there is none.")
    with _left_as_found(model) as found, torch.enable_grad():
        if not all(deq.training for deq in deqs):
            model.train()
        task = _Task(model, batch, loss_fn, trained, found)
        reference = _Reference()
        exact_gradient, reference_notes = task.gradient(reference)
        if not reference.captures:
            raise InvalidOptionError("the loss has no gradient with respect to an equilibrium of any DEQ in the model.")
        # Which parameters does an error vector reach? Not a read-out, whose gradient is the same whatever the mode.
        without, _ = task.gradient(_no_error_vector)
        reached = [k for k, pair in enumerate(zip(exact_gradient, without, strict=True)) if _differ(*pair)]
        rows = _measure(entries, task, reference.captures, [exact_gradient[k] for k in reached], reached, repeats)
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
    mode: BackwardRule | None
    error: str = ""


def plan(
    backwards: Sequence[str | BackwardRule] | str | BackwardRule | None,
    solvers: Sequence[str | Solver | None] | str | Solver | None,
) -> tuple[Entry, ...]:
    """The rows that [`compare`][torchdeq_ep.compare.compare] will measure; refuses names that do not exist.

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
        if solver is not None:
            find_solver(solver)
    return tuple(_entry(spec, solver) for spec in chosen for solver in drivers)


def _as_list(choice: Any) -> list[Any]:
    return [choice] if isinstance(choice, str) or callable(choice) else list(choice)


def _entry(spec: str | BackwardRule, solver: str | Solver | None) -> Entry:
    backward, driver = _label(spec), OWN_SOLVER if solver is None else _label(solver)
    try:
        # Not every mode takes a solver, one from a plugin say.
        return Entry(backward, driver, get_backward(spec) if solver is None else get_backward(spec, solver=solver))
    except EPError as error:
        return Entry(backward, driver, None, _short(error))


def _label(choice: Any) -> str:
    return choice if isinstance(choice, str) else getattr(choice, "__name__", None) or repr(choice)


@dataclass(frozen=True)
class _Found:
    """Buffers and random state of a model, as they were found."""

    buffers: tuple[tuple[nn.Module, str, Tensor, Tensor], ...]
    random_state: Tensor
    random_states_cuda: tuple[Tensor, ...]

    @classmethod
    def on(cls, model: nn.Module) -> _Found:
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all() if in_use else []
        return cls(tuple(buffers), torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        torch.set_rng_state(self.random_state)
        if self.random_states_cuda:
            torch.cuda.set_rng_state_all(list(self.random_states_cuda))
        with torch.no_grad():
            for module, name, buffer, value in self.buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):  # writing needlessly would invalidate graphs that saved the buffer
                    buffer.copy_(value)


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[_Found]:
    found = _Found.on(model)
    training = [(module, module.training) for module in model.modules()]
    try:
        yield found
    finally:
        found.restore()
        for module, was_training in training:
            module.training = was_training


@dataclass(frozen=True)
class _Task:
    """A model with a batch and a loss, which can be differentiated over and over from the same random state."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Tensor]
    parameters: list[nn.Parameter]
    found: _Found

    def gradient(self, mode: BackwardRule) -> tuple[list[Tensor], tuple[str, ...]]:
        """The gradient of each parameter under a mode, and what the backward pass warned about."""
        self.found.restore()
        with use_backward(self.model, mode):
            loss = loss_of(self.model, self.batch, self.loss_fn)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise InvalidOptionError(
                    f"loss_fn must return a scalar that depends on the parameters of the model; got {got}"
                    f"{' without a gradient' if isinstance(loss, Tensor) and not loss.requires_grad else ''}."
                )
            with _caught() as notes:
                # The graph may be shared with weights that the caller's reset_deq has computed: keep it.
                gradients = torch.autograd.grad(
                    loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
        return list(gradients), tuple(notes)


def loss_of(model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
    """The loss of a model on a batch, by the rules that [`compare`][torchdeq_ep.compare.compare] documents.

    Args:
        model: The model.
        batch: A pair of inputs and targets, or anything else.
        loss_fn: The loss.

    Returns:
        What `loss_fn` returns.

    Example:
        >>> import torch
        >>> loss_of(torch.nn.Identity(), (torch.ones(2), torch.zeros(2)), torch.nn.functional.mse_loss)
        tensor(1.)
        >>> loss_of(torch.nn.Identity(), torch.ones(2), torch.sum)
        tensor(2.)
    """
    if _first_parameter(loss_fn) == "model":
        return loss_fn(model, batch)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        return loss_fn(model(batch))
    inputs, targets = batch
    if isinstance(inputs, dict):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return loss_fn(outputs, targets)


def _first_parameter(function: Callable[..., Any]) -> str | None:
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):  # a builtin has no signature
        return None


@dataclass(frozen=True)
class _Capture:
    """An equilibrium as the backward pass met it, with its exact adjoint in float64 and how that was found."""

    equilibrium: Equilibrium
    autocast: Autocast
    exact: Tensor
    method: str


@dataclass(frozen=True, eq=False)
class _Reference(Backward):
    """A backward mode that is exact, and keeps every equilibrium it is given."""

    captures: list[_Capture] = field(default_factory=list)

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        equilibrium.require_finite()
        with undisturbed():
            return self._solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        if norm(equilibrium.cotangent) == 0.0:
            return torch.zeros_like(equilibrium.z), NudgeReport("reference")
        if equilibrium.z.numel() <= LARGEST_DENSE:
            exact, method = dense_adjoint(equilibrium), "dense"
        else:
            tight = ImplicitDifferentiation(max_iter=_REFERENCE_STEPS, tol=equilibrium.eps)
            exact, method = tight.solve(equilibrium)[0].double(), "ift"
        autocast = Autocast.current(equilibrium.z.device.type)
        self.captures.append(_Capture(equilibrium, autocast, exact, method))
        return exact.to(equilibrium.z.dtype), NudgeReport("reference")


def dense_adjoint(equilibrium: Equilibrium) -> Tensor:
    """`(I - J^T)^-1 g` with the dense Jacobian in the dtype of the state, and the linear system in float64.

    Args:
        equilibrium: A free equilibrium of moderate size.

    Returns:
        A float64 tensor of the shape of the state.

    Raises:
        NonFiniteError: If `I - J` is singular.

    Example:
        >>> import torch
        >>> matrix, ones = torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.ones(2)
        >>> dense_adjoint(Equilibrium(lambda z: matrix @ z, torch.zeros(2), torch.zeros(2), ones, 1e-7))
        tensor([1.0000, 1.5000], dtype=torch.float64)
    """
    matrix = dense_jacobian(equilibrium.f, equilibrium.z).double().neg_().T
    matrix.diagonal().add_(1.0)
    solution, status = torch.linalg.solve_ex(matrix, equilibrium.cotangent.double().flatten())
    if int(status) != 0 or not bool(torch.isfinite(solution).all()):
        raise NonFiniteError(
            "I - J is singular at the fixed point, so no gradient exists that modes could be compared with. Look for a "
            "direction that f passes on unchanged, such as a residual connection without a final norm."
        )
    adjoint: Tensor = solution.reshape(equilibrium.z.shape)
    return adjoint


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
    task: _Task,
    captures: Sequence[_Capture],
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
            with _caught() as notes:
                solved = _solve_all(entry.mode, captures)
            gradient, _ = task.gradient(entry.mode)
            error_vector = _joined(solved.error_vectors)
            reached_gradient = _joined([gradient[j] for j in reached])
            figures[k] = {
                "adjoint_error": _relative_error(error_vector, exact_adjoint),
                "adjoint_cosine": _cosine(error_vector, exact_adjoint),
                "gradient_error": _relative_error(reached_gradient, exact),
                "gradient_cosine": _cosine(reached_gradient, exact),
                "residual": solved.residual,
                "calls": solved.calls,
                "beta": solved.beta,
                "converged": solved.converged,
                "warnings": tuple(dict.fromkeys(notes)),
                "peak_mib": _peak_mib(entry.mode, captures),
            }
        except Exception as error:  # one mode, perhaps of a plugin, must not cost the others their rows
            errors[k] = _short(error)
    modes = {k: entry.mode for k, entry in enumerate(entries) if k in figures and entry.mode is not None}
    for k, milliseconds in _milliseconds(modes, captures, repeats).items():
        figures[k]["milliseconds"] = milliseconds
    return [Row(e.backward, e.solver, error=errors[k], **figures.get(k, {})) for k, e in enumerate(entries)]


def _solve_all(mode: BackwardRule, captures: Sequence[_Capture]) -> _Solve:
    vectors, reports = [], []
    calls = 0
    for capture in captures:
        equilibrium = capture.equilibrium
        with capture.autocast.restored(True):
            if isinstance(mode, Backward):
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


def _milliseconds(modes: dict[int, BackwardRule], captures: Sequence[_Capture], repeats: int) -> dict[int, float]:
    """Median time of each mode; all have solved these equilibria before, so nothing is left to warm up."""
    device = captures[0].equilibrium.z.device
    times: dict[int, list[float]] = {k: [] for k in modes}
    with _caught():
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


def _peak_mib(mode: BackwardRule, captures: Sequence[_Capture]) -> float:
    """Largest memory in use during a solve beyond what was in use before; NaN where nothing tells."""
    device = captures[0].equilibrium.z.device
    with _caught():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            _solve_all(mode, captures)
            torch.cuda.synchronize(device)
            return (torch.cuda.max_memory_allocated(device) - before) / 2**20
        if device.type != "cpu":
            return math.nan
        try:
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
                _solve_all(mode, captures)
            events = profiler.profiler.kineto_results.events()
            changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        except (RuntimeError, AttributeError):  # a profiler runs already, or this torch has another one
            return math.nan
    in_use = peak = 0
    for _, change in changes:
        in_use += change
        peak = max(peak, in_use)
    return peak / 2**20 if changes else math.nan


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Warnings in short, kept instead of printed; the list is filled on exit."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # says nothing about the model
        yield notes
    notes.extend(_short(warning.message) for warning in caught)


def _short(problem: Warning | Exception | str) -> str:
    """Class and first sentence of an exception or warning."""
    first_line = (str(problem).strip().splitlines() or [""])[0]
    sentence = first_line.partition(". ")[0].rstrip(".")
    if len(sentence) > _NOTE_LENGTH:
        sentence = f"{sentence[:_NOTE_LENGTH].rpartition(' ')[0]} ..."
    return f"{type(problem).__name__}: {sentence}"


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors]) if tensors else torch.zeros(0)


def _relative_error(estimate: Tensor, exact: Tensor) -> float:
    if estimate.shape != exact.shape:
        raise InvalidOptionError(f"the mode returned {estimate.numel()} entries where the state has {exact.numel()}.")
    return norm(estimate - exact) / norm(exact) if norm(exact) > 0 else math.nan


def _cosine(estimate: Tensor, exact: Tensor) -> float:
    scale = norm(estimate) * norm(exact)
    return float(estimate @ exact) / scale if scale > 0 else math.nan
