"""The measured reciprocity is the error of the error vector, up to the chance of one direction."""

import math
import statistics

import pytest
import torch
from problems import relative_error

import torchdeq_ep as tep
from torchdeq_ep.errors import AsymmetryWarning


class Linear:
    """`F = x - K z`, with any invertible `K`."""

    def __init__(self, matrix, noise=0.0):
        self.theta = matrix.requires_grad_()
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(len(matrix), generator=self.generator, dtype=torch.float64)

    def solve(self, current):
        z = torch.linalg.solve(self.theta.detach(), self.x + current)
        return z + self.noise * torch.randn(z.shape, generator=self.generator, dtype=z.dtype)

    def report(self, cotangent, **options):
        reports = []
        z = tep.attach_equilibrium(
            self.solve,
            lambda z, theta, x: x - theta @ z,
            self.theta,
            self.x,
            check="reciprocity",
            writer=reports.append,
            **options,
        )
        (cotangent * z).sum().backward()
        return reports[0]


def matrix(asymmetry, n=12):
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    return 2 * torch.eye(n, dtype=torch.float64) + 0.3 * (random + random.T) + asymmetry * (random - random.T)


def cotangents(count, n=12):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("stencil", ["one-sided", "symmetric", "richardson"])
@pytest.mark.parametrize("scale", ["relative", "response"])
def test_a_reciprocal_system_shows_none(stencil, scale):
    for cotangent in cotangents(10):
        assert Linear(matrix(0)).report(cotangent, stencil=stencil, scale=scale).reciprocity < 1e-4


@pytest.mark.parametrize("asymmetry", [0.02, 0.1])
def test_the_mean_square_is_the_error_of_the_error_vector(asymmetry):
    k, measured, errors = matrix(asymmetry), [], []
    for cotangent in cotangents(200):
        measured.append(Linear(k.clone()).report(cotangent).reciprocity ** 2)
        v, exact = torch.linalg.solve(k, cotangent), torch.linalg.solve(k.T, cotangent)
        errors.append(relative_error(exact, v) ** 2)
    # 200 squares of a normal variable: a standard error of 10 %
    assert statistics.mean(measured) == pytest.approx(statistics.mean(errors), rel=0.3)


def passes(k, count=20):
    for cotangent in cotangents(count):
        Linear(k.clone()).report(cotangent)


def test_one_way_elements_are_warned_of():
    with pytest.warns(AsymmetryWarning, match="not reciprocal") as warned:
        passes(matrix(1.0))
    assert 5 < len(warned) < 20  # a single direction sees it or not


def test_the_metric_is_taken_into_account():
    rate = torch.logspace(-1, 1, 12, dtype=torch.float64)
    stiffness = rate.unsqueeze(1) * matrix(0)  # times diag(rate) on the right it is symmetric
    found = [Linear(stiffness.clone()).report(g, metric=rate).reciprocity for g in cotangents(10)]
    assert max(found) < 1e-4
    with pytest.warns(AsymmetryWarning):
        passes(stiffness)


@pytest.mark.parametrize("noise", [1e-5, 1e-2])
def test_noise_is_no_asymmetry(noise):
    for cotangent in cotangents(40):
        report = Linear(matrix(0), noise).report(cotangent, repeats=2)  # a warning would be raised
        assert report.calls == 2 * 5
        assert not math.isnan(report.reciprocity)


def test_the_gradient_is_that_without_the_check(network):
    plain = network.gradients()[0]
    assert torch.equal(network.gradients(check="reciprocity")[0], plain)
