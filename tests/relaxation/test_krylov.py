"""GMRES with a space for each row: against dense solves, how good it is, and what it does without a solution."""

import math

import pytest
import torch

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.relaxation import gmres
from torchdeq_ep.state import Rows, relative_difference

ROWS, WIDTH = 6, 40
RADII = (0.3, 0.5, 0.7, 0.9, 0.95, 1.2)


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) * r / WIDTH**0.5 for r in RADII]
    stack = torch.stack(matrices).to(dtype)
    force = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    exact = torch.linalg.solve(torch.eye(WIDTH, dtype=torch.float64) - stack.double(), force.double())
    return stack, force, exact


def rows():
    return Rows(ROWS, (WIDTH,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_it_solves_what_a_dense_solver_does(dtype, own, size):
    stack, force, exact = problem(dtype)
    force, exact = force * size, exact * size
    product = lambda v: torch.einsum("bij,bj->bi", stack, v)  # noqa: E731
    result = gmres(product, force, tol=1e-5, max_iter=400, rows=rows if own else None)
    assert result.residual <= 1e-5
    assert not result.diverged
    assert relative_difference(result.value[0].double(), exact) < 1e-4
    left = force + product(result.value[0]) - result.value[0]
    assert result.residual == pytest.approx(float(left.double().norm() / force.double().norm()), rel=1e-2)


def test_each_row_has_the_least_residual_that_a_polynomial_can_leave_it():
    stack, force, _ = problem()
    product = lambda v: torch.einsum("bij,bj->bi", stack, v)  # noqa: E731
    result = gmres(product, force, tol=1e-12, max_iter=9, rows=rows)
    vectors = [force]
    for _ in range(7):
        vectors.append(product(vectors[-1]))
    space = torch.stack(vectors, dim=2)
    images = space - torch.einsum("bij,bjk->bik", stack, space)
    least = images @ torch.linalg.lstsq(images, force.unsqueeze(2)).solution - force.unsqueeze(2)
    assert result.steps == 9
    assert result.residual == pytest.approx(float(least.norm() / force.norm()), rel=1e-6)


def test_rows_of_their_own_take_fewer_products_than_a_space_for_all():
    stack, force, _ = problem()
    product = lambda v: torch.einsum("bij,bj->bi", stack, v)  # noqa: E731
    own, joint = (gmres(product, force, tol=1e-6, max_iter=400, rows=r) for r in (rows, None))
    assert own.steps < 0.6 * joint.steps


def test_rows_that_are_done_or_empty_do_no_harm():
    stack, force, exact = problem()
    force[2], exact[2] = 0.0, 0.0
    stack[0] = 0.0
    exact[0] = force[0]
    result = gmres(lambda v: torch.einsum("bij,bj->bi", stack, v), force, tol=1e-9, max_iter=200, rows=rows)
    assert relative_difference(result.value[0], exact) < 1e-8


@pytest.mark.parametrize("max_iter", [1, 2, 5])
def test_without_a_solution_it_says_so(max_iter):
    result = gmres(lambda v: v, torch.ones(4), tol=1e-6, max_iter=max_iter)
    assert result.residual == pytest.approx(1.0)
    assert result.steps <= max(max_iter, 2)
    assert gmres(lambda v: v * math.inf, torch.ones(4), tol=1e-6, max_iter=max_iter).diverged


def test_rows_are_left_where_that_is_warranted():
    stack, force, exact = problem()
    last = torch.arange(ROWS) == ROWS - 1
    result = gmres(
        lambda v: torch.einsum("bij,bj->bi", stack, v),
        force,
        tol=1e-9,
        max_iter=200,
        rows=rows,
        enough=lambda points, norms: last & (norms < 0.1),
    )
    assert result.left == 1
    assert result.solved <= 1e-9 < result.residual < 0.1
    assert relative_difference(result.value[0][:-1], exact[:-1]) < 1e-8


@pytest.mark.parametrize("mode", ["ift", "ep-infinitesimal"])
def test_the_linear_modes_take_it_by_name(mode):
    weight = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 4
    f = lambda z: torch.tanh(z @ weight + 0.3)  # noqa: E731
    z = torch.zeros(3, 8, dtype=torch.float64)
    for _ in range(200):
        z = f(z)
    own, plain = (
        tep.get_backward(mode, solver=solver, tol=1e-10)(f, z, torch.ones_like(z)) for solver in ("gmres", None)
    )
    assert relative_difference(own, plain) < 1e-8


@pytest.mark.parametrize("mode", ["ep", "aep", "hep"])
def test_finite_nudges_refuse_it(mode):
    with pytest.raises(InvalidOptionError, match="linear"):
        tep.get_backward(mode, solver="gmres")


def test_a_solution_so_long_that_its_residual_is_lost_counts_for_nothing():
    gain = torch.tensor([1 - 1e-9, 0.5], dtype=torch.float64)
    result = gmres(lambda v: gain * v, torch.ones(2, dtype=torch.float64), tol=1e-3, max_iter=20)
    assert result.value.norm() > 1e8
    assert result.diverged
