"""Relaxations stop where they should, say where they stopped, and keep the best point they saw."""

import math
from functools import partial

import pytest
import torch
from problems import Affine, contraction

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.relaxation.solvers import relax, relax_linear

NAMES = [None, "plain", "relaxation", "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]


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


@pytest.mark.parametrize("solver", NAMES)
def test_complex_states_are_solved_as_pairs(solver):
    matrix = torch.complex(contraction(6, 0, 0.5), contraction(6, 1, 0.3))
    offset = torch.randn(2, 6, dtype=torch.complex128)
    result = relax(
        lambda d: d @ matrix.T + offset, torch.zeros_like(offset), scale=1.0, tol=1e-10, max_iter=300, solver=solver
    )
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.complex128) - matrix, offset.T).T
    assert float((result.value - exact).abs().max()) < 1e-9


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


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1.0, 1e20, 1e36])
def test_a_linear_map_is_solved_as_well_for_a_force_of_any_size(size):
    matrix = contraction(40, 0, 0.98, symmetric=True).float()
    force = torch.randn(40)
    run = partial(relax, tol=1e-6, max_iter=200, floor=1e-7)
    asked = []

    def enough(points, norms):
        asked.append((float(points.abs().max()), float(norms.max())))
        return torch.zeros_like(norms, dtype=torch.bool)

    result = relax_linear(run, lambda v: matrix @ v, size * force, enough)
    exact = torch.linalg.solve(torch.eye(40) - matrix, force)
    assert not result.diverged
    assert result.residual <= 1e-6
    assert torch.allclose(result.value[0] / size, exact, rtol=1e-3, atol=1e-3)
    assert asked
    assert 0.01 * size < asked[-1][0] < 100 * size
