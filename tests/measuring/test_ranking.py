"""Two gradients that may be called exact, and what being near one of them costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torchdeq
from problems import contraction
from torch import Tensor, nn

import torchdeq_ep as tep
from torchdeq_ep.errors import MissingHistoryError
from torchdeq_ep.measuring import compare
from torchdeq_ep.measuring.ranking import cheapest_within
from torchdeq_ep.measuring.rows import Row
from torchdeq_ep.measuring.tables import Comparison

SPECS = ["unrolled", "unrolled:k=2", "one-step", "ift:tol=1e-12", "aep", "ep"]
pytestmark = pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.ConvergenceWarning")


class Looped(nn.Module):
    """A loop of a few steps, far from its equilibrium."""

    def __init__(self, steps: int = 4, backward: str = "unrolled") -> None:
        super().__init__()
        self.weight, self.steps, self.backward = nn.Parameter(contraction(6, 0, 0.95)), steps, backward
        self.read_out = nn.Linear(6, 1, dtype=torch.float64)

    def map(self, x: Tensor):
        return lambda z: torch.tanh(z @ self.weight.T + x)

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(tep.loop(self.map(x), torch.zeros_like(x), self.steps, self.backward))


class Deq(Looped):
    """The same by torchdeq, and one step more."""

    def __init__(self, steps: int = 3, **options: object) -> None:
        super().__init__(steps)
        self.deq = torchdeq.get_deq(f_max_iter=steps, f_tol=1e-12, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(self.deq(self.map(x), torch.zeros_like(x))[0][-1])


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)


def row_of(table: Comparison, spec: str) -> Row:
    (row,) = [row for row in table.rows if row.backward == spec]
    return row


def gradient(model: Looped, batch: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """By hand, through all steps."""
    x, y = batch
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = model.map(x)(z)
    return torch.autograd.grad(nn.functional.mse_loss(model.read_out(z), y), model.weight)[0]


@pytest.mark.parametrize("make", [Looped, Deq])
def test_the_steps_made_are_a_reference(make: type[Looped]) -> None:
    model, batch = make(), data()
    table = compare(model, batch, nn.functional.mse_loss, SPECS, exact="steps", repeats=1)
    by_hand = gradient(model, batch, 4)
    assert row_of(table, "unrolled").gradient_error < 1e-12
    assert row_of(table, "ift:tol=1e-12").gradient_error == pytest.approx(table.gap, rel=1e-3)
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    (own,) = torch.autograd.grad(loss, model.weight)
    assert table.own_errors[1] == pytest.approx(float((own - by_hand).norm() / by_hand.norm()), abs=1e-12)
    assert math.isfinite(row_of(table, "one-step").step_milliseconds)
    assert row_of(table, "unrolled").other_error == pytest.approx(
        compare(model, batch, nn.functional.mse_loss, ["unrolled"], repeats=1).rows[0].gradient_error
    )
    sentence = table.sentence()
    assert "closer to that of the steps" in sentence
    assert "within 1%, 5% and 20% unrolled" in sentence or "within 1%" in sentence


def test_a_converged_model_has_one_gradient() -> None:
    table = compare(Looped(300), data(), nn.functional.mse_loss, ["unrolled", "ift"], repeats=1)
    assert table.gap < 1e-5
    assert "are the same here" in table.sentence()


def test_a_model_trained_by_another_gradient_is_told_so() -> None:
    table = compare(Looped(4, "ift:tol=1e-12"), data(), nn.functional.mse_loss, ["one-step", "ift"], repeats=1)
    assert table.own_errors[0] < 1e-5
    assert "closer to that of the equilibrium" in table.sentence()


def test_a_solver_that_mixes_has_no_gradient_of_its_steps() -> None:
    model, batch = Deq(6, f_solver="anderson"), data()
    table = compare(model, batch, nn.functional.mse_loss, ["unrolled", "ift"], repeats=1)
    assert math.isnan(table.gap)
    assert not any("steps made" in note for note in table.warnings)  # the row says it to those who asked
    assert "mixes or extrapolates" in row_of(table, "unrolled").error
    with pytest.raises(MissingHistoryError):
        compare(model, batch, nn.functional.mse_loss, ["ift"], exact="steps", repeats=1)


def test_a_looped_model_can_be_diagnosed() -> None:
    (layer,) = tep.diagnose(Looped(40), data(), nn.functional.mse_loss).layers
    assert layer.name == "loop"
    assert layer.error_vector.asymmetry.relative > 0.05


def test_the_cheapest_of_those_that_are_near_enough() -> None:
    rows = (
        Row("ift", "own", gradient_error=1e-6, milliseconds=2.0, step_milliseconds=3.0),
        Row("neumann", "own", gradient_error=0.04, milliseconds=1.0, step_milliseconds=2.0),
        Row("one-step", "own", gradient_error=0.15, milliseconds=0.0, step_milliseconds=1.0),
        Row("ep", "own", gradient_error=0.6, milliseconds=0.5, step_milliseconds=0.5),
    )
    assert [cheapest_within(rows, share).backward for share in (0.01, 0.05, 0.2)] == ["ift", "neumann", "one-step"]
    table = Comparison(rows, "dense", 8, "cpu", 5)
    assert table.sentence().endswith("within 1% ift (3 ms); within 5% neumann (2 ms); within 20% one-step (1 ms).")
    assert cheapest_within(rows[3:], 0.2) is None
    assert "Cheapest" not in replace(table, rows=rows[3:]).sentence()
