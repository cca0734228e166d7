"""`tep.compare`: figures against dense linear algebra, a model left as it was found, and the forms of the table."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import pytest
import torch
import torchdeq
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError, NoDEQError, UnknownBackwardError
from torchdeq_ep.measuring import capture as capture_module
from torchdeq_ep.measuring import comparison as comparison_module
from torchdeq_ep.measuring.comparison import compare
from torchdeq_ep.measuring.planning import plan
from torchdeq_ep.measuring.rows import Row
from torchdeq_ep.measuring.tables import Comparison
from torchdeq_ep.modes.registry import available_backwards

N = 6


class Linear(nn.Module):
    """`f(z) = W z + U x`, so that `J = W`, with a read-out and a batch norm after it."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        weight = torch.randn(N, N, dtype=torch.float64)
        self.weight = nn.Parameter(gain * weight / torch.linalg.matrix_norm(weight, 2))
        self.inject = nn.Linear(N, N, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(N, dtype=torch.float64)
        self.read_out = nn.Linear(N, 1, dtype=torch.float64)
        self.deq = torchdeq.get_deq(ift=True, f_max_iter=200, f_tol=1e-13)

    def forward(self, x: Tensor) -> Tensor:
        drive = self.norm(self.inject(x))
        states, _ = self.deq(lambda z: z @ self.weight.T + drive, torch.zeros_like(drive))
        noise = 0.1 * torch.rand(len(x), 1, dtype=x.dtype)
        return self.read_out(states[-1]) + noise


class Stacked(nn.Module):
    """Two DEQs, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(), Linear()
        self.first.read_out = nn.Linear(N, N, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, N, dtype=torch.float64), torch.randn(rows, 1, dtype=torch.float64)


def row_of(table: Comparison, backward: str) -> Row:
    return next(row for row in table.rows if row.backward == backward)


def test_exact_modes_are_exact_and_the_bias_of_ep_is_the_one_of_the_dense_matrices() -> None:
    model = Linear()
    table = compare(model, batch(), mean_square, ["ift", "ep", "aep"], repeats=1)
    # The cotangent of every row is a multiple of the read-out weights, and so are both error vectors.
    g, w, eye = model.read_out.weight[0].detach(), model.weight.detach(), torch.eye(N, dtype=torch.float64)
    exact, biased = torch.linalg.solve(eye - w.T, g), torch.linalg.solve(eye - w, g)
    assert table.reference == "dense"
    assert table.state_entries == 4 * N
    for name in ("ift", "aep"):
        row = row_of(table, name)
        assert row.adjoint_error < 1e-6
        assert row.gradient_error < 1e-6
        assert row.gradient_cosine == pytest.approx(1.0, abs=1e-9)
        assert row.converged is True
    ep = row_of(table, "ep")
    assert ep.adjoint_error == pytest.approx(float((biased - exact).norm() / exact.norm()), rel=1e-5)
    assert ep.adjoint_error > 1e-2
    assert ep.adjoint_cosine == pytest.approx(float(torch.cosine_similarity(biased, exact, dim=0)), rel=1e-6)
    assert ep.gradient_error > 1e-3
    assert ep.calls > 0
    assert ep.milliseconds > 0
    assert ep.peak_mib > 0
    assert ep.beta > 0


def test_the_gradient_is_judged_on_the_parameters_that_the_error_vector_reaches() -> None:
    """Without an error vector all of their gradient is lost; that of the read-out is exact, and must not count."""
    table = compare(Linear(), batch(), mean_square, [lambda f, z, g: torch.zeros_like(z)], repeats=1)
    assert table.rows[0].gradient_error == pytest.approx(1.0, abs=1e-12)
    assert table.rows[0].adjoint_error == pytest.approx(1.0, abs=1e-12)


def test_large_states_are_compared_with_a_tight_implicit_differentiation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Linear(), batch()
    dense = compare(model, data, mean_square, ["ep"], repeats=1)
    monkeypatch.setattr(capture_module, "LARGEST_DENSE", 4)
    large = compare(model, data, mean_square, ["ep"], repeats=1)
    assert large.reference == "ift"
    assert large.rows[0].adjoint_error == pytest.approx(dense.rows[0].adjoint_error, rel=1e-6)


def test_several_deqs_are_joined() -> None:
    table = compare(Stacked(), batch(), mean_square, ["ift", "ep"], repeats=1)
    assert table.state_entries == 2 * 4 * N
    assert row_of(table, "ift").gradient_error < 1e-6
    assert row_of(table, "ep").gradient_error > 1e-3


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "random": torch.get_rng_state(),
        "training": [module.training for module in model.modules()],
    }


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    pairs = [*zip(left["grads"], right["grads"], strict=True), *zip(left["buffers"], right["buffers"], strict=True)]
    tensors = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
    return tensors and torch.equal(left["random"], right["random"]) and left["training"] == right["training"]


def _refuse(f: Any, z: Tensor, g: Tensor) -> Tensor:
    raise RuntimeError("no, thank you. Not today.")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("end", ["table", "failing mode", "failing loss"])
def test_the_model_is_left_as_it_was_found(training: bool, end: str) -> None:
    model = Linear().train(training)
    model.weight.grad = torch.ones_like(model.weight)
    rules = model.deq.produce_grad
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(outputs.detach())
        if end == "failing loss" and len(calls) == 3:
            raise KeyboardInterrupt
        return mean_square(outputs, targets)

    data, before = batch(), _snapshot(model)
    torch.set_rng_state(before["random"])
    modes: list[Any] = ["ep", _refuse] if end == "failing mode" else ["ep"]
    if end == "failing loss":
        with pytest.raises(KeyboardInterrupt):
            compare(model, data, loss_fn, modes, repeats=1)
    else:
        compare(model, data, loss_fn, modes, repeats=1)
    assert _same(before, _snapshot(model))
    assert model.deq.produce_grad is rules
    # The random state is the same before each forward pass, so all gradients are of one loss.
    assert all(torch.equal(call, calls[0]) for call in calls)
    assert len(calls) >= 3


def test_a_mode_that_fails_has_a_row_that_says_so() -> None:
    table = compare(Linear(), batch(), mean_square, ["ift", _refuse], repeats=1)
    failed = table.rows[1]
    assert failed.error == "RuntimeError: no, thank you"
    assert failed.backward == "_refuse"
    assert math.isnan(failed.gradient_error)
    assert math.isnan(failed.milliseconds)
    assert row_of(table, "ift").error == ""
    assert "_refuse could not be used" in table.sentence()


def test_warnings_of_modes_are_notes_in_their_rows() -> None:
    """Warnings are errors in this suite, so that one printed instead would fail here."""
    table = compare(Linear(0.9), batch(), mean_square, ["ift:max_iter=4", "ift"], repeats=2)
    assert table.rows[0].converged is False
    assert len(table.rows[0].warnings) == 1
    assert table.rows[0].warnings[0].startswith("ConvergenceWarning: the adjoint iteration stopped")
    assert table.rows[1].warnings == ()


def test_every_registered_mode_is_compared_by_default_and_each_with_each_solver() -> None:
    table = compare(Linear(), batch(), mean_square, repeats=1)
    assert [row.backward for row in table.rows] == [name for name in available_backwards() if name != "jfb"]
    table = compare(Linear(), batch(), mean_square, ["ift", "ep"], [None, "anderson"], repeats=1)
    assert [row.label for row in table.rows] == ["ift", "ift / anderson", "ep", "ep / anderson"]
    assert table.rows[1].gradient_error < 1e-5


def test_the_loss_can_be_put_in_every_documented_way() -> None:
    model, (x, y) = Linear(), batch()
    expected = compare(model, (x, y), mean_square, ["ep"], repeats=1).rows[0].gradient_error
    ways = [
        (((x,), y), mean_square),
        (({"x": x}, y), mean_square),
        (x, lambda outputs: mean_square(outputs, y)),
        ({"pixels": x}, lambda model, batch: mean_square(model(batch["pixels"]), y)),
    ]
    for data, loss_fn in ways:
        error = compare(model, data, loss_fn, ["ep"], repeats=1).rows[0].gradient_error
        assert error == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_compared_is_refused_before_any_work() -> None:
    def untouched(*_: Any) -> Tensor:
        raise AssertionError("the model was run")

    model, data = Linear(), batch()
    with pytest.raises(UnknownBackwardError, match="richardson"):
        compare(model, data, untouched, ["ep", "ep-richardsn"])
    with pytest.raises(InvalidOptionError, match="n_pts"):
        compare(model, data, untouched, ["hep:n_pts=3"])
    with pytest.raises(InvalidOptionError, match="unknown solver 'andersen'"):
        compare(model, data, untouched, ["ep"], ["andersen"])
    with pytest.raises(InvalidOptionError, match="repeats"):
        compare(model, data, untouched, ["ep"], repeats=0)
    with pytest.raises(InvalidOptionError, match="backwards is empty"):
        compare(model, data, untouched, [])
    with pytest.raises(NoDEQError):
        compare(nn.Linear(N, 1, dtype=torch.float64), data, mean_square, ["ep"])


def test_losses_that_define_no_gradient_are_refused() -> None:
    model, data = Linear(), batch()
    with pytest.raises(InvalidOptionError, match=r"shape \(4, 1\)"):
        compare(model, data, lambda outputs, _: outputs, ["ep"])
    with pytest.raises(InvalidOptionError, match="without a gradient"):
        compare(model, data, lambda outputs, _: outputs.detach().sum(), ["ep"])
    with pytest.raises(InvalidOptionError, match="equilibrium of any DEQ"):
        compare(model, data, lambda outputs, _: model.read_out.weight.sum(), ["ep"])


def _checked(table: Comparison) -> Comparison:
    """A table in every form."""
    markdown = table.to_markdown()
    assert len(markdown.splitlines()) >= 2 + len(table.rows)
    json.dumps(table.to_dict(), allow_nan=False)
    assert table.sentence().endswith(".")
    return table


def test_a_singular_problem_is_compared_with_what_comes_closest() -> None:
    model = Linear()
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5, 0.5])))
    table = _checked(compare(model, batch(), mean_square, ["ift", "ep"], repeats=1))
    assert table.reference == "least squares"
    assert any("I - J is singular" in note for note in table.warnings)
    assert table.reference_residual > 1e-3
    assert table.spectral_radius == pytest.approx(1.0, abs=0.01)
    assert "The reference itself is not exact" in table.sentence()


def test_a_cotangent_that_is_not_finite_has_rows_that_say_so() -> None:
    table = _checked(compare(Linear(), batch(), lambda y, t: (y * torch.inf).sum(), ["ift", "ep"], repeats=1))
    assert table.reference == "none"
    assert [row.error.partition(":")[0] for row in table.rows] == ["NonFiniteError"] * 2
    assert table.sentence() == "No mode could be measured: there is no reference; ift, ep failed."
    assert table.free_residual < 1e-10
    assert table.spectral_radius < 1


def test_a_mode_is_measured_without_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no memory for that")

    monkeypatch.setattr(capture_module, "dense_jacobian", fail)
    table = _checked(compare(Linear(), batch(), mean_square, ["ep"], repeats=1))
    (row,) = table.rows
    assert row.milliseconds > 0
    assert math.isnan(row.adjoint_error)
    assert table.to_markdown().splitlines()[2].count("no reference") == 4
    assert "RuntimeError: no memory for that" in table.warnings


def test_a_cotangent_of_zero_and_a_state_of_zero_and_a_single_sample_each_end_in_a_table() -> None:
    table = _checked(compare(Linear(), batch(), lambda y, t: (0.0 * y).sum(), ["ift", "ep"], repeats=1))
    assert table.reference == "zero"
    assert "| zero |" in table.to_markdown()
    assert "the cotangent is zero" in table.sentence()

    class Homogeneous(Linear):
        def forward(self, x: Tensor) -> Tensor:
            drive = torch.zeros_like(x)
            return self.read_out(self.deq(lambda z: torch.tanh(z @ self.weight.T) + drive, drive)[0][-1])

    table = _checked(compare(Homogeneous(), batch(), mean_square, ["ift", "ep"], repeats=1))
    assert table.rows[0].adjoint_error < 1e-6
    assert table.rows[1].error == ""
    table = _checked(compare(Homogeneous(), batch(1), mean_square, ["ift", "ep"], repeats=1))
    assert table.state_entries == N
    assert all(math.isfinite(row.adjoint_error) for row in table.rows)


def test_a_reference_that_stops_early_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "LARGEST_DENSE", 4)
    monkeypatch.setattr(comparison_module, "capture_all", functools.partial(capture_module.capture_all, max_iter=2))
    table = _checked(compare(Linear(0.9), batch(), mean_square, ["ep"], repeats=1))
    assert table.reference_residual > 1e-3
    assert f"stopped at a relative residual of {table.reference_residual:.0e}" in table.sentence()
    assert "closest to the reference gradient" in table.sentence()
    assert table.to_dict()["reference_residual"] == table.reference_residual


def test_a_mode_that_raises_later_keeps_what_it_has() -> None:
    calls = []

    def tired(f: Any, z: Tensor, g: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > 3:
            raise RuntimeError("tired")
        return g

    (row,) = _checked(compare(Linear(), batch(), mean_square, [tired], repeats=1)).rows
    assert math.isfinite(row.gradient_error)
    assert math.isnan(row.milliseconds)
    assert row.notes == ("no time: RuntimeError: tired",)
    (row,) = _checked(compare(Linear(), batch(), mean_square, [lambda f, z, g: g[:1]], repeats=1)).rows
    assert row.error.startswith("InvalidOptionError: the mode returned")


def test_a_report_that_is_not_usable_is_in_the_notes_of_each_mode_it_holds_for() -> None:
    modes = ["ift:max_iter=1", "ep:max_iter=1,on_divergence=accept", "ift"]
    table = _checked(compare(Linear(0.95), batch(), mean_square, modes, repeats=1))
    for row in table.rows[:2]:
        assert row.usable is False
        assert row.notes[0].startswith("no usable estimate: a relative residual of")
        assert row.notes[1].startswith("ConvergenceWarning")  # what one mode warns of does not silence the next
    assert table.rows[2].usable is True


def test_the_conditions_are_those_of_the_model() -> None:
    model = Linear()
    table = compare(model, batch(), mean_square, ["ift"], repeats=1)
    assert table.spectral_radius == pytest.approx(
        float(torch.linalg.eigvals(model.weight.detach()).abs().max()), rel=0.05
    )
    assert table.free_residual < 1e-10
    assert table.to_markdown().splitlines()[-1] == table.conditions()
    assert table.conditions().startswith("Free phase: relative residual")
    assert table.reference_residual < 1e-12


def test_progress_goes_from_nothing_to_all_of_it() -> None:
    seen: list[tuple[str, int, int]] = []
    compare(Linear(), batch(), mean_square, ["ift", "ep"], repeats=3, on_progress=lambda *step: seen.append(step))
    names = ["the exact gradient", "the spectral radius", "ift", "ep", "times", "done"]
    assert seen == [(name, k, 5) for k, name in enumerate(names)]


@pytest.mark.slow
def test_an_ordinary_trained_model_is_compared(trained_cnn: Any) -> None:
    table = _checked(compare(*trained_cnn, nn.functional.cross_entropy, ["ift", "ep-one-sided", "ep"], repeats=1))
    assert all(math.isfinite(row.gradient_error) for row in table.rows)
    assert table.reference == "ift"
    assert table.reference_residual < 1e-3
    assert table.spectral_radius > 0.9


@pytest.mark.parametrize("name", ["auto", "plain"])
def test_the_names_of_the_own_loop_are_accepted_wherever_a_solver_is(name):
    assert [entry.solver for entry in plan(["ep"], [name])] == [name]


def test_a_solver_of_linear_equations_has_a_row_for_every_mode_and_a_reason_where_it_does_not_serve() -> None:
    table = compare(Linear(), batch(), mean_square, ["ift", "ep"], [None, "gmres"], repeats=1)
    own, by_gmres, _, refused = table.rows
    assert by_gmres.gradient_error < 1e-5
    assert own.solver == "own"
    assert "linear" in refused.error
