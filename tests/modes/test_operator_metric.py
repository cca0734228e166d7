"""Metrics that are operators: equilibrium propagation through a proximal gradient map."""

import pytest
import torch
from problems import contraction, normal, relative_error, solve

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.jacobian import OperatorMetric, dense_jacobian

N = 6
OPERATOR = normal(9, N, seed=3)
INVERSE = torch.eye(N, dtype=torch.float64) + OPERATOR.T @ OPERATOR
PROX = torch.linalg.inv(INVERSE)  # (I + A^T A)^-1
PROXIMAL = OperatorMetric(lambda v: v @ PROX, lambda v: v @ INVERSE)


def proximal_gradient(weight, drive):
    """`f(z) = P (z - grad h(z) + x)` with a potential `h`: `J P` is symmetric, `J` is not."""
    return lambda z: (z - torch.tanh(z @ weight.T) @ weight + drive) @ PROX


@pytest.fixture
def problem():
    weight, drive = contraction(N, 0, 0.9), normal(3, N, seed=1)
    f = proximal_gradient(weight, drive)
    z, g = solve(f, torch.zeros_like(drive), 800), normal(3, N, seed=2)
    matrix = torch.eye(3 * N, dtype=torch.float64) - dense_jacobian(f, z).T
    return f, z, g, torch.linalg.solve(matrix, g.flatten()).reshape(3, N)


@pytest.mark.parametrize("mode", [tep.InfinitesimalEP, tep.EquilibriumPropagation])
def test_with_its_metric_the_proximal_map_has_its_exact_error_vector(problem, mode):
    f, z, g, exact = problem
    tolerance = 1e-10 if mode is tep.InfinitesimalEP else 1e-6
    assert relative_error(mode(metric=PROXIMAL, tol=1e-12)(f, z, g), exact) < tolerance
    assert relative_error(mode(tol=1e-12)(f, z, g), exact) > 1e-2


def test_the_certificate_knows_of_it(problem):
    f, z, g, _ = problem
    weight, reports = contraction(N, 0, 0.9).requires_grad_(), []
    f = proximal_gradient(weight, normal(3, N, seed=1))
    for metric in (PROXIMAL, None):
        mode = tep.EquilibriumPropagation(metric=metric)
        (tep.attach(f, z, mode, writer=reports.append) * g).sum().backward()
    assert reports[0].adjoint_residual < 1e-4
    assert reports[0].inconsistency < 1e-6
    assert reports[1].adjoint_residual > 1e-2


def test_what_an_operator_cannot_do():
    with pytest.raises(InvalidOptionError, match="leave out one"):
        tep.EquilibriumPropagation(metric=PROXIMAL, correction="asymmetric")
    with pytest.raises(InvalidOptionError, match="OperatorMetric"):
        tep.EquilibriumPropagation(metric="proximal")
