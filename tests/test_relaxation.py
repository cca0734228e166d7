"""Relaxations stop where they should, say where they stopped, and keep the best point they saw."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import contraction

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.host.solver import relaxation_solver
from torchdeq_ep.measuring.comparison import peak_memory, plan
from torchdeq_ep.relaxation.phases import affine_weights
from torchdeq_ep.relaxation.loop import MEMORY, iterate
from torchdeq_ep.relaxation.solvers import relax

NAMES = [None, "plain", "relaxation", "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]


class Affine:
    """`d -> A d + c` on a stack of nodes, counting its calls."""

    def __init__(self, gain, n=20, nodes=2, seed=0):
        self.matrix = contraction(n, seed, gain)
        self.offset = torch.randn(nodes, n, dtype=torch.float64)
        self.calls = 0

    def __call__(self, d):
        self.calls += 1
        return d @ self.matrix.T + self.offset

    @property
    def scale(self):
        return float(self.offset.norm(dim=1).min())

    def residual(self, d):
        return float((d @ self.matrix.T + self.offset - d).norm(dim=1).max()) / self.scale


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("gain", [0.3, 0.9])
@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-11])
def test_reaches_the_tolerance_and_counts_truthfully(solver, gain, tol):
    step = Affine(gain)
    result = relax(
        step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=tol, max_iter=500, solver=solver
    )
    assert result.residual <= tol
    assert step.residual(result.value) <= tol
    assert result.steps == step.calls
    assert not result.diverged


def test_plain_iteration_is_never_accelerated():
    step, start = Affine(0.0, nodes=1), torch.zeros(1, 20, dtype=torch.float64)
    step.matrix = torch.diag(torch.linspace(-0.95, 0.95, 20, dtype=torch.float64))
    plain = relax(step, start, scale=step.scale, tol=1e-2, max_iter=500, solver="plain")
    expected = start
    for _ in range(plain.steps):
        expected = step(expected)
    assert torch.equal(plain.value, expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_the_mixed_residual_is_the_smallest_of_all_affine_combinations(n, seed):
    residuals = torch.randn(n, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = torch.tensor(affine_weights((residuals @ residuals.T).tolist(), 0.0), dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1)
    mixed = weights @ residuals
    for other in residuals[1:] - residuals[0]:  # no direction within the affine hull leads further down
        assert abs(float(mixed @ other)) < 1e-9


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 0.999).filter(lambda w: abs(w) > 1e-3), st.integers(0, 1000))
def test_one_eigenvalue_is_extrapolated_to_the_fixed_point(eigenvalue, seed):
    offset = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    calls = 0

    def step(z):
        nonlocal calls
        calls += 1
        return eigenvalue * z + offset

    result = iterate(step, torch.zeros_like(offset), scale=float(offset.norm()), tol=1e-9, max_iter=9)
    assert calls == 3
    torch.testing.assert_close(result.value, offset / (1 - eigenvalue), rtol=1e-7, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000))
def test_the_extrapolated_residual_is_the_smallest_along_its_line(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = contraction(9, seed, 0.8)
    offset = torch.randn(1, 9, dtype=torch.float64, generator=generator)
    points = []

    def step(z):
        points.append(z)
        return z @ matrix.T + offset

    iterate(step, torch.zeros_like(offset), tol=1e-12, max_iter=3)
    first, second, third = (z @ matrix.T + offset - z for z in points)
    # What the step after the two did to the residual of their combination: one multiplication by the matrix.
    along = second - first
    combined = torch.linalg.solve(matrix, third[0])
    assert abs(float(combined @ along[0])) < 1e-6 * float(combined.norm() * along.norm())


def test_points_that_the_map_was_given_are_not_written_over():
    step, given = Affine(0.95), []

    def watched(z):
        given.append((z, z.clone()))
        return step(z)

    iterate(watched, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-8, max_iter=200)
    assert all(torch.equal(z, copy) for z, copy in given)


@pytest.mark.parametrize(("gain", "tol", "history"), [(0.5, 1e-3, False), (0.99, 1e-6, True)])
def test_a_history_is_kept_only_where_the_fixed_point_is_far(gain, tol, history):
    diagonal, offset = gain * torch.linspace(-1, 1, 4000), torch.randn(1, 4000)

    def states(memory):
        def run():
            scale = float(offset.norm())
            iterate(lambda z: diagonal * z + offset, torch.zeros_like(offset), scale=scale, tol=tol, memory=memory)

        return peak_memory(run, torch.device("cpu")) / (4 * offset.numel())

    assert (states(MEMORY) - states(1) > 2 * MEMORY - 3) == history


def test_acceleration_pays_when_plain_iteration_is_slow():
    step = Affine(0.0)
    step.matrix = torch.diag(torch.linspace(-0.95, 0.95, 20, dtype=torch.float64))
    fast = iterate(step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-8, max_iter=5000)
    assert fast.residual <= 1e-8
    assert len(fast.trace) < 0.5 * math.log(1e-8) / math.log(0.95)


def test_acceleration_reaches_fixed_points_of_expanding_maps():
    step = Affine(0.0)
    step.matrix = torch.diag(torch.linspace(-1.5, 0.5, 20, dtype=torch.float64))
    result = iterate(step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-8, max_iter=200)
    assert result.residual <= 1e-8


@pytest.mark.parametrize("solver", NAMES)
def test_divergence_is_reported(solver):
    result = relax(
        lambda d: d**2 + 5, torch.ones(1, 1, dtype=torch.float64), scale=1.0, tol=1e-6, max_iter=50, solver=solver
    )
    assert result.diverged or result.residual > 0.5


@pytest.mark.parametrize("solver", NAMES)
def test_the_best_point_survives_a_bad_end(solver):
    calls = 0
    step = Affine(0.5)

    def spoiled(d):
        nonlocal calls
        calls += 1
        return step(d) if calls < 8 else torch.full_like(d, torch.nan)

    result = relax(
        spoiled, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-12, max_iter=50, solver=solver
    )
    assert result.diverged
    assert torch.isfinite(result.value).all()
    assert step.residual(result.value) < 0.1


@pytest.mark.parametrize("solver", NAMES)
def test_the_number_of_steps_is_bounded(solver):
    step = Affine(0.999)
    result = relax(
        step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-14, max_iter=7, solver=solver
    )
    assert step.calls <= 7
    assert result.residual > 1e-14


@pytest.mark.parametrize("seed", [2, 3, 5, 7, 8, 11])
def test_where_acceleration_stalls_the_map_itself_goes_on(seed):
    # Symmetric weights of norm 1.6: plain damped iteration descends, past states that are almost fixed points. There
    # mixing alone stays for ever.
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    weight = weight + weight.T
    weight *= 1.6 / torch.linalg.matrix_norm(weight, 2)
    drive = 0.5 * torch.randn(8, 64, generator=generator, dtype=torch.float64)

    def step(z):
        return 0.5 * z + 0.5 * torch.tanh(z @ weight.T + drive)

    plain, accelerated = (
        iterate(step, torch.zeros_like(drive), scale=10.0, tol=1e-6, max_iter=2000, memory=memory)
        for memory in (1, MEMORY)
    )
    assert plain.residual <= 1e-6
    assert accelerated.residual <= 1e-6
    assert accelerated.steps <= 2 * plain.steps


def test_stalling_at_the_rounding_floor_ends_the_loop():
    step = Affine(0.3)
    result = iterate(
        step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-40, floor=1e-12, max_iter=10_000
    )
    assert len(result.trace) < 100
    assert result.residual < 1e-14


@pytest.mark.parametrize("solver", NAMES)
def test_complex_states_are_solved_as_pairs(solver):
    matrix = torch.complex(contraction(6, 0, 0.5), contraction(6, 1, 0.3))
    offset = torch.randn(2, 6, dtype=torch.complex128)
    result = relax(
        lambda d: d @ matrix.T + offset, torch.zeros_like(offset), scale=1.0, tol=1e-10, max_iter=300, solver=solver
    )
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.complex128) - matrix, offset.T).T
    assert float((result.value - exact).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["auto", "plain"])
def test_the_names_of_the_own_loop_are_accepted_wherever_a_solver_is(name):
    assert [entry.solver for entry in plan(["ep"], [name])] == [name]


def test_unknown_solvers_are_named():
    with pytest.raises(InvalidOptionError, match="anderson, auto, broyden"):
        relax(lambda d: d, torch.zeros(1, 1), scale=1.0, tol=0.1, max_iter=5, solver="newton")


def test_solvers_registered_with_torchdeq_are_found(monkeypatch):
    from torchdeq import solver

    monkeypatch.setattr(solver, "_solvers", dict(solver._solvers))
    solver.register_solver("twice", lambda f, x0, max_iter=50, tol=1e-3, **_: (f(f(x0)), [], {}))
    step = Affine(0.1)
    result = relax(
        step, torch.zeros(2, 20, dtype=torch.float64), scale=step.scale, tol=1e-6, max_iter=50, solver="twice"
    )
    assert result.residual <= 1e-6


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 6, 5)])
def test_the_residual_is_that_of_the_whole_state_whatever_its_shape(solver, shape):
    size = math.prod(shape)
    matrix, offset = contraction(size, 0, 0.5), torch.randn(size, dtype=torch.float64)

    def step(z):
        return (z.reshape(1, size) @ matrix.T + offset).reshape(1, *shape)

    start = torch.zeros(1, *shape, dtype=torch.float64)
    result = relax(step, start, scale=float(offset.norm()), tol=1e-3, max_iter=200, solver=solver)
    assert float((step(result.value) - result.value).norm()) <= 1e-3 * float(offset.norm())


def test_no_steps_at_all_are_refused():
    with pytest.raises(InvalidOptionError, match="max_iter"):
        relaxation_solver(torch.cos, torch.zeros(1, 1), max_iter=0)


@pytest.mark.parametrize("memory", [1, 6])
def test_the_map_may_return_a_buffer_that_it_overwrites(memory):
    step, buffer = Affine(0.5, nodes=1), torch.empty(1, 20, dtype=torch.float64)

    def into_the_buffer(z):
        buffer.copy_(step(z))
        return buffer

    z, _, _ = relaxation_solver(into_the_buffer, torch.zeros_like(buffer), tol=1e-8, max_iter=200, memory=memory)
    assert step.residual(z) < 1e-6
