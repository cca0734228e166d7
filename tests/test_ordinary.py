"""Ordinary models train through the switch: no exception, few words, and a gradient as good as the mode allows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import ordinary
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning
from torchdeq_ep.modes import Mode, NudgeReport
from torchdeq_ep.state import Equilibrium, Memory, Packing, Rows, are_independent, relative_difference

ROOT = Path(__file__).resolve().parents[1]
REAL = ("ift", "ep", "ep-one-sided", "aep")
SIZE = 8
ANALYTIC = ("cnn-gelu", "post-norm", "pre-norm")
CASES = [(kind, mode) for kind in ordinary.MODELS for mode in (*REAL, *(["hep"] if kind in ANALYTIC else []))]
EXPECTED = {kind: not kind.startswith("graph") for kind in ordinary.MODELS}

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AskForRows(Mode):
    """Asks each equilibrium whether its samples are independent."""

    found: list[tuple[Equilibrium, Rows | None]] = field(default_factory=list)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        self.found.append((equilibrium, equilibrium.independent_rows()))
        return equilibrium.cotangent, NudgeReport("ask")


def go_on(model: nn.Module, kind: str, mode: str, steps: int, size: int) -> None:
    """Some steps in a mode: nothing raised, every kind of warning said once, nothing that is not finite."""
    with warnings.catch_warnings(record=True) as caught, tep.use_backward(model, mode) as handle:
        warnings.simplefilter("always")
        ordinary.train(model, kind, 0, 1, steps, size)
        head, *lines = handle.summary().splitlines()
    kinds = [line for line in lines if line.startswith("  in ")]
    assert head.startswith(f"deq: {steps} backward passes, the last with a residual of ")
    assert len([warning for warning in caught if issubclass(warning.category, EPWarning)]) == len(kinds)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_goes_on_training(kind: str, mode: str) -> None:
    go_on(ordinary.make(kind, 0), kind, mode, steps=6, size=SIZE)


@pytest.mark.parametrize("kind", ordinary.MODELS)
@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.ConvergenceWarning")
def test_finds_whether_samples_are_independent(kind: str) -> None:
    model, mode = ordinary.make(kind, 0), AskForRows()
    with tep.use_backward(model, mode):
        ordinary.train(model, kind, 0, 1, steps=1, size=SIZE)
    ((equilibrium, rows),) = mode.found
    assert equilibrium.rows is not None
    assert equilibrium.rows.count == SIZE
    assert rows == (equilibrium.rows if EXPECTED[kind] else None)
    assert equilibrium.memory.calls == (2 if EXPECTED[kind] else 1)


def over_time(z: Tensor) -> Tensor:
    kernel = torch.full((5, 1, 3), 0.3)
    return functional.conv1d(z.T.unsqueeze(0), kernel, padding=1, groups=5)[0].T


def over_batch(z: Tensor) -> Tensor:
    return torch.softmax(z @ z.T, dim=1) @ z


MAPS: dict[str, tuple[Map, bool]] = {
    "dense": (lambda z: torch.tanh(z @ torch.ones(5, 5)), True),
    "layer norm": (nn.LayerNorm(5), True),
    "batch norm in eval mode": (nn.BatchNorm1d(5).eval(), True),
    "batch norm in train mode": (nn.BatchNorm1d(5).train(), False),
    "attention over the batch": (over_batch, False),
    "convolution over time": (over_time, False),
    "mean over the batch": (lambda z: torch.tanh(z) + 1e-3 * z.mean(), False),
}


@pytest.mark.parametrize(("f", "expected"), MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_finds_coupling(f: Map, expected: bool) -> None:
    z = torch.randn(8, 5)
    assert are_independent(f, z, f(z), Rows(8, (5,))) == expected


def equilibrium_of(coupled: bool) -> Equilibrium:
    """One whose Jacobian is hard enough for the mixing to begin, and that is converged to rounding."""
    weight = torch.randn(30, 30, dtype=torch.float64)
    weight = 0.98 * (weight + weight.T) / torch.linalg.matrix_norm(weight + weight.T, 2)
    ties = torch.eye(6, dtype=torch.float64)
    if coupled:
        ties = 0.5 * ties + 0.25 * (ties.roll(1, 0) + ties.roll(-1, 0))
    drive = 0.3 * torch.randn(6, 30, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return ties @ torch.tanh(z) @ weight + drive

    z = torch.zeros_like(drive)
    for _ in range(2000):
        z = f(z)
    return Equilibrium(f, z, f(z), torch.randn_like(drive), 2e-16, records=False, rows=Packing.of(z).rows)


@pytest.mark.parametrize("mode", ["ift", "ep", "aep"])
@pytest.mark.parametrize("coupled", [True, False])
def test_a_wrong_finding_costs_calls_and_no_accuracy(mode: str, coupled: bool) -> None:
    equilibrium = equilibrium_of(coupled)
    vectors = []
    for claim in (True, False):
        told = replace(equilibrium, memory=Memory(independent={(6, 30, False): claim}))
        vector, report = tep.get_backward(mode, tol=1e-6, max_iter=2000).solve(told)
        assert report.converged
        vectors.append(vector)
    assert not torch.equal(*vectors)  # the claim was heeded
    amplified = float(vectors[0].norm() / equilibrium.cotangent.norm())
    assert relative_difference(*vectors) < 1e-4 / amplified


def test_page_has_the_results(docs_script: Callable[[str], object]) -> None:
    script = docs_script("figures/ordinary")
    runs = json.loads(script.RESULTS.read_text())["runs"]
    assert [run["exception"] for run in runs] == [None] * len(runs)
    page = script.PAGE.read_text()
    assert script.insert(page, script.BEGIN, script.END, script.table(runs)) == page


@pytest.fixture(scope="module")
def trained() -> Callable[[str], nn.Module]:
    """A model that torchdeq's own gradients trained; `make ordinary` leaves it in the build folder."""

    def load(kind: str) -> nn.Module:
        model, path = ordinary.make(kind, 0), ROOT / "build" / "ordinary" / f"{kind}-0.pt"
        if not path.exists():
            ordinary.train(model, kind, 0, 3)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path))
        return model

    return load


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_goes_on_where_torchdeq_left_off(kind: str, mode: str, trained: Callable[[str], nn.Module]) -> None:
    go_on(trained(kind), kind, mode, steps=6, size=ordinary.BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ift", "aep"])
@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.ConvergenceWarning")
def test_exact_modes_train_as_well_as_torchdeq(mode: str, trained: Callable[[str], nn.Module]) -> None:
    model = ordinary.make("cnn", 0)
    with tep.use_backward(model, mode):
        ordinary.train(model, "cnn", 0, 3)
    assert ordinary.accuracy(model) > ordinary.accuracy(trained("cnn")) - 0.02


@dataclass(frozen=True)
class Keeping(Mode):
    """A mode that keeps the equilibria it is given, and gives a gradient of zero."""

    kept: list[Equilibrium] = field(default_factory=list)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        self.kept.append(equilibrium)
        return torch.zeros_like(equilibrium.z), NudgeReport("keeping")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.EPWarning")
def test_few_products_solve_a_batch_whose_samples_differ(seed: int) -> None:
    """After 26 steps of `ep`, samples of the cnn have spectra of their own."""
    model, keeping = ordinary.make("cnn", seed), Keeping()
    with tep.use_backward(model, "ep"):
        ordinary.train(model, "cnn", seed, epochs=1, steps=26, on_step=lambda step: None)
    images, labels = next(ordinary.digits().batches(seed=99, epochs=1))
    with tep.use_backward(model, keeping):
        functional.cross_entropy(model(images), labels).backward()
    for mode in (tep.ImplicitDifferentiation, tep.InfinitesimalEP):
        for correction in (None, "asymmetric") if mode is tep.InfinitesimalEP else (None,):
            options = {} if correction is None else {"correction": correction}
            steps = {}
            for name, rows in (("rows", keeping.kept[0].rows), ("joint", None)):
                equilibrium = replace(keeping.kept[0], memory=Memory(), rows=rows)
                _, report = mode(tol=1e-3, max_iter=200, **options).solve(equilibrium)
                assert report.residual <= 1e-3
                steps[name] = report.iterations
            assert steps["rows"] <= 40
            assert steps["rows"] <= 1.1 * steps["joint"] + 1
