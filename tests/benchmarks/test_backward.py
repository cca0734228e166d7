"""Time, calls of the map and memory of backward passes, beside torchdeq's implicit differentiation.

`make bench` runs these and writes JSON, from which `docs/benchmarks.md` is made. Nothing is asserted about time. Every
figure is a ratio: reference and contender take turns, so that other load on the machine meets both, and the medians
are divided. Backwards are compared at equal accuracy: each at the loosest tolerance at which its gradient is within
1e-3 of its own limit, `(I - J)^-1 g` or `(I - J^T)^-1 g`, in double precision.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torchdeq
from models import FREE_PHASE, Case, make
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.measuring.comparison import peak_memory
from torchdeq_ep.modes.base import Mode
from torchdeq_ep.modes.report import NudgeReport
from torchdeq_ep.state.equilibrium import Equilibrium

ACCURACY = 1e-3
TOLERANCES = [1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5, 1e-6]
TORCHDEQ = ["torchdeq fixed_point_iter", "torchdeq anderson", "torchdeq broyden"]
OURS = ["ift", "ep", "ep-one-sided", "ep-richardson", "hep:n_points=4", "aep"]
EXACT = ["ift", "aep", *TORCHDEQ]
ROUNDS = 7


@dataclass
class Contender:
    """A backward pass at the tolerance it needs, on a graph that is kept."""

    name: str
    tol: float
    error: float
    run: Callable[[], Tensor]
    records: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls of the map and products with its Jacobian in the last run."""
        record = self.records[-1]
        return record["report"].calls if "report" in record else int(record["nstep"].max()) + 1


@contextmanager
def quiet() -> Iterator[None]:
    """Loose tolerances are tried on purpose, and graphs without vmap fall back to loops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def limits(kind: str, batch: int | None, task: str = "classification") -> dict[str, Tensor]:
    """The gradients to which the backwards converge, in double precision."""
    case = make(kind, batch, task).double()
    found = {}
    for mode in (tep.ImplicitDifferentiation(tol=1e-8, max_iter=500), tep.InfinitesimalEP(tol=1e-8, max_iter=500)):
        with tep.use_backward(case.model, mode), quiet():
            found[type(mode).__name__] = case.gradient(case.loss())
    return found


def contender(name: str, kind: str, batch: int | None = None, task: str = "classification") -> Contender:
    """A backward at the loosest tolerance that is accurate enough; the tightest one if none is."""
    case = make(kind, batch, task)
    limit = limits(kind, batch, task)["ImplicitDifferentiation" if name in EXACT else "InfinitesimalEP"]
    records: list[Mapping[str, Any]] = []
    for tol in TOLERANCES:
        if name in TORCHDEQ:
            solver = {"b_solver": name.split()[1], "b_tol": tol, "b_stop_mode": "rel", "b_max_iter": 100}
            case.model.deq = torchdeq.get_deq(**FREE_PHASE, **solver)
            loss = case.loss(records.append)
        else:
            with tep.use_backward(case.model, name, tol=tol):
                loss = case.loss(records.append)
        with quiet():
            error = float((case.gradient(loss).double() - limit).norm() / limit.norm())
        if error <= ACCURACY:
            break
    return Contender(name, tol, error, lambda: case.gradient(loss), records)


@dataclass(frozen=True)
class _FreeOfCharge(Mode):
    """A backward whose error vector costs nothing, so that what is left is the parameter gradient."""

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return equilibrium.cotangent, NudgeReport(repr(self))


@cache
def memory_of_parameter_gradients(kind: str, batch: int | None, task: str) -> float:
    """Peak memory that every backward needs, in bytes."""
    case = make(kind, batch, task)
    with tep.use_backward(case.model, _FreeOfCharge()):
        loss = case.loss()
    return peak_memory(lambda: case.gradient(loss), torch.device("cpu"))


@cache
def fastest_torchdeq(kind: str, batch: int | None, task: str = "classification") -> Contender:
    """torchdeq's implicit differentiation with the one of its own solvers that is fastest here."""
    candidates = [c for c in (contender(name, kind, batch, task) for name in TORCHDEQ) if c.error <= ACCURACY]
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    with quiet():
        for _ in range(ROUNDS):
            for c in candidates:
                times[c.name].append(timed(c.run))
    return min(candidates, key=lambda c: statistics.median(times[c.name]))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    benchmark: BenchmarkFixture, run: Callable[[], Any], reference: Callable[[], Any], rounds: int = ROUNDS
) -> float:
    """Time `run` by the benchmark, with a run of the reference before each; the ratio of the medians."""
    times: dict[str, list[float]] = {"reference": [], "run": []}
    with quiet():
        run(), reference()
        benchmark.pedantic(
            lambda: times["run"].append(timed(run)),
            setup=lambda: times["reference"].append(timed(reference)),
            rounds=rounds,
        )
    benchmark.extra_info["reference_ms"] = 1e3 * statistics.median(times["reference"])
    ratio = statistics.median(times["run"]) / statistics.median(times["reference"])
    benchmark.extra_info["ratio"] = ratio
    return ratio


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("kind", "batch", "task"),
    [
        ("dense", 50, "classification"),
        ("dense", 400, "classification"),
        ("convolutional", 16, "classification"),
        ("convolutional", 4, "classification"),
        ("convolutional", 16, "regression"),
        ("attention", 16, "classification"),
        ("graph", None, "classification"),
    ],
)
def test_against_implicit_differentiation(
    benchmark: BenchmarkFixture, kind: str, batch: int | None, task: str, name: str
) -> None:
    if kind == "graph" and name.startswith("hep"):
        pytest.skip("a sparse product has no rule for complex states")
    benchmark.group = "against torchdeq"
    ours, reference = contender(name, kind, batch, task), fastest_torchdeq(kind, batch, task)
    compare(benchmark, ours.run, reference.run)
    with quiet():
        memory = [peak_memory(c.run, torch.device("cpu")) for c in (ours, reference)]
    benchmark.extra_info.update(
        model=kind,
        batch=batch,
        task=task,
        backward=name,
        reference=reference.name,
        tol=ours.tol,
        error=ours.error,
        calls=ours.calls,
        reference_calls=reference.calls,
        memory_ratio=memory[0] / memory[1],
        memory_ratio_of_gradients=memory_of_parameter_gradients(kind, batch, task) / memory[1],
        memory_mib=memory[0] / 2**20,
    )


class _Recorded:
    """The map, keeping the states at which it is called."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f
        self.states: list[Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.states is not None:
            self.states.append(z.clone())
        return self.f(z)


def equilibrium(case: Case) -> tuple[_Recorded, Equilibrium]:
    """The free equilibrium of a case, with a cotangent, and its map."""
    f = _Recorded(case.model.map(case.x))
    with torch.no_grad():
        z = case.model(case.x)
        for _ in range(20):
            z = f(z)
    return f, Equilibrium(f, z, f(z), torch.randn_like(z), torch.finfo(z.dtype).eps, records=False)


@pytest.mark.parametrize("solver", ["plain", "auto"])
@pytest.mark.parametrize("kind", ["dense", "convolutional", "attention", "graph"])
def test_overhead(benchmark: BenchmarkFixture, kind: str, solver: str) -> None:
    """A nudged solve beside the same calls of the map alone, at the default amplitude and a tolerance of 1e-3."""
    benchmark.group = "overhead"
    f, free = equilibrium(make(kind))
    mode: Mode = tep.EquilibriumPropagation("one-sided", tol=1e-3, solver=solver)
    with torch.no_grad():
        for _ in range(2):  # in the first two passes more is measured
            mode.solve(free)
        f.states = states = []
        mode.solve(free)
        f.states = None

        def bare() -> None:
            for z in states:
                f(z)

        compare(benchmark, lambda: mode.solve(free), bare, rounds=15)
    benchmark.extra_info.update(model=kind, solver=solver, calls=len(states))


@pytest.mark.parametrize("backward", ["ep", "ep-one-sided", "hep:n_points=4"])
def test_training_gradient(benchmark: BenchmarkFixture, backward: str) -> None:
    """Free phase, nudged phases and parameter gradients of the dense network, in calls of its bare map.

    The accuracy asked for is that of the papers' 150 free and 20 nudged plain steps at the same amplitude.
    """
    benchmark.group = "training gradient"
    limit = limits("dense", 50)["InfinitesimalEP"]
    case = make("dense", 50)
    papers = make("dense", 50)
    papers.model.deq = torchdeq.get_deq(
        ift=True, f_solver="fixed_point_iter", f_max_iter=150, f_tol=1e-12, f_stop_mode="rel"
    )

    def gradient(which: Case, mode: Any) -> Tensor:
        with tep.use_backward(which.model, mode):
            return which.gradient(which.loss())

    def error(value: Tensor) -> float:
        return float((value.double() - limit).norm() / limit.norm())

    with quiet():
        plain_steps = tep.EquilibriumPropagation("symmetric", schedule=tep.Online(steps=20, periods=1))
        wanted = error(gradient(papers, plain_steps))
        for f_tol, tol in (
            (1e-2, 1e-2),
            (3e-3, 3e-3),
            (1e-3, 1e-3),
            (3e-4, 3e-4),
            (1e-4, 1e-4),
            (1e-5, 3e-5),
            (1e-6, 1e-5),
        ):
            case.model.deq = torchdeq.get_deq(**{**FREE_PHASE, "f_tol": f_tol})
            mode = tep.get_backward(backward, tol=tol)
            reached = error(gradient(case, mode))
            if reached <= wanted:
                break
        f = case.model.map(case.x)
        z = torch.randn(50, 522)

        def bare() -> None:
            with torch.no_grad():
                for _ in range(10):
                    f(z)

        with tep.use_backward(case.model, mode):
            for _ in range(2):  # in the first two passes more is measured
                case.gradient(case.loss())
            ratio = compare(benchmark, lambda: case.gradient(case.loss()), bare, rounds=15)
    benchmark.extra_info.update(
        backward=backward, bare_calls=10 * ratio, error=reached, error_of_170_steps=wanted, f_tol=f_tol, tol=tol
    )


@pytest.mark.parametrize("n_points", [4, 8, 16, 32])
def test_scaling_with_points(benchmark: BenchmarkFixture, n_points: int) -> None:
    benchmark.group = "scaling with N"
    _, free = equilibrium(make("dense"))
    modes = [tep.get_backward("hep", n_points=n, beta=0.05, tol=1e-4) for n in (n_points, 4)]
    compare(benchmark, lambda: modes[0].solve(free), lambda: modes[1].solve(free))
    benchmark.extra_info.update(n_points=n_points, calls=modes[0].solve(free)[1].calls)


@pytest.mark.parametrize("batch", [50, 200, 800])
def test_scaling_with_batch(benchmark: BenchmarkFixture, batch: int) -> None:
    benchmark.group = "scaling with batch"
    states = [equilibrium(make("dense", b))[1] for b in (batch, 50)]
    mode = tep.EquilibriumPropagation(tol=1e-4)
    compare(benchmark, lambda: mode.solve(states[0]), lambda: mode.solve(states[1]))
    benchmark.extra_info.update(batch=batch, calls=mode.solve(states[0])[1].calls)


@pytest.mark.parametrize("max_iter", [10, 50, 200])
def test_memory_over_iterations(benchmark: BenchmarkFixture, max_iter: int) -> None:
    benchmark.group = "memory over iterations"
    _, free = equilibrium(make("dense"))
    mode = tep.EquilibriumPropagation(tol=1e-12, max_iter=max_iter)
    with quiet():
        benchmark.pedantic(mode.solve, args=(free,), rounds=1)
        states = peak_memory(lambda: mode.solve(free), torch.device("cpu")) / (free.z.numel() * free.z.element_size())
    benchmark.extra_info.update(max_iter=max_iter, states=states)


@pytest.mark.parametrize("name", ["ep", "ep-one-sided"])
def test_tiny_model(benchmark: BenchmarkFixture, name: str) -> None:
    """State of 16 units, one sample."""
    benchmark.group = "tiny"
    ours, reference = contender(name, "tiny"), fastest_torchdeq("tiny", None)
    compare(benchmark, ours.run, reference.run, rounds=50)
    benchmark.extra_info.update(backward=name, reference=reference.name, calls=ours.calls)
