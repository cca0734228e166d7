"""Spectral radius and field of values against the dense Jacobian."""

import math

import pytest
import torch
from problems import contraction, normal, seeded, tanh_problem
from torch import nn

from torchdeq_ep.errors import ConvergenceWarning
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.jacobian.metric import automatic_metric
from torchdeq_ep.jacobian.spectrum import field_of_values, spectral_radius
from torchdeq_ep.jacobian.symmetry import symmetry_score


@pytest.mark.parametrize("n", [1, 6, 80])
def test_spectral_radius_of_real_and_complex_spectra(n):
    skew = normal(n, n)
    for matrix in (contraction(n, 0), contraction(n, 1, symmetric=True), skew - skew.T):
        exact = float(torch.linalg.eigvals(matrix).abs().max())
        found = spectral_radius(lambda z, matrix=matrix: matrix @ z, normal(n), tol=1e-6, generator=seeded(3))
        assert found == pytest.approx(exact, rel=1e-5, abs=1e-12)


def test_spectral_radius_takes_few_products():
    matrix = torch.zeros(500, 500, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.6, -0.7], [0.7, 0.6]])  # a complex pair, on which power iteration never settles
    matrix[2:, 2:] = 0.5 * contraction(498, 0)
    calls = []

    def f(z):
        calls.append(1)
        return matrix @ z

    assert spectral_radius(f, normal(500), generator=seeded()) == pytest.approx(math.hypot(0.6, 0.7), rel=1e-6)
    assert len(calls) <= 40


def test_an_eigenvalue_that_is_not_found_is_said():
    ring = torch.roll(torch.eye(200, dtype=torch.float64), 1, 0)  # every eigenvalue on the unit circle
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        spectral_radius(lambda z: ring @ z, normal(200), max_iter=5, generator=seeded())


@pytest.mark.parametrize("n", [1, 6, 80])
def test_field_of_values(n):
    problem = tanh_problem(n, (1,), seed=n, gain=0.9)
    (jacobian,) = problem.jacobians
    box = field_of_values(problem.f, problem.z, tol=1e-6, generator=seeded())
    real = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)
    imag = torch.linalg.eigvals((jacobian - jacobian.T) / 2).imag
    assert box.real_min == pytest.approx(float(real.min()), rel=1e-5)
    assert box.real_max == pytest.approx(float(real.max()), rel=1e-5)
    assert box.imag_max == pytest.approx(float(imag.max()), rel=1e-5, abs=1e-12)


def test_the_tools_take_several_tensors_and_leave_running_statistics_alone():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3).double()
    a, b = normal(4, 3), normal(4, 2)
    coupling = 0.2 * normal(2, 3)

    def f(a, b):
        return norm(b @ coupling + 0.1 * a), torch.tanh(a @ coupling.T)

    def flat(z):
        parts = f(z[:12].reshape(4, 3), z[12:].reshape(4, 2))
        return torch.cat([part.flatten() for part in parts])

    before = {name: value.clone() for name, value in norm.state_dict().items()}
    jacobian = dense_jacobian(flat, torch.cat([a.flatten(), b.flatten()]))
    norm.load_state_dict(before)
    exact = float(torch.linalg.eigvals(jacobian).abs().max())
    assert spectral_radius(f, (a, b), tol=1e-8) == pytest.approx(exact, rel=1e-6)
    symmetry_score(f, (a, b))
    field_of_values(f, [a, b])
    assert automatic_metric(f, (a, b)).shape == (20,)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
