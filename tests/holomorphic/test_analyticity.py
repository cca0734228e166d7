"""The Cauchy-Riemann test and the estimate of the radius."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as fn

from torchdeq_ep import holomorphic
from torchdeq_ep.errors import InvalidOptionError

Z = torch.linspace(-1, 1, 7, dtype=torch.float64)


class LeakyReal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z


holomorphic.register_rule(LeakyReal, lambda z: z + 0.01 * z.conj())


@pytest.mark.parametrize(
    "f", [torch.tanh, lambda z: fn.softmax(z, 0), lambda z: z**3, lambda z: fn.layer_norm(z, (7,))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_analytic_map_passes(f, dtype):
    report = holomorphic.check(f, Z.to(dtype))
    assert report
    assert report.analytic
    assert report.defect < (1e-7 if dtype == torch.float64 else 5e-3)
    assert report.radius > 0.1
    assert report.reason == ""


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda z: z.real + 0 * z, "Tensor.real"),
        (lambda z: z * z.abs(), "Tensor.abs"),
        (lambda z: torch.relu(z), "relu"),
        (lambda z: torch.ones(3), "real tensor"),
        (LeakyReal.apply, "disagree"),
    ],
)
def test_map_that_is_not_analytic_fails(f, reason):
    report = holomorphic.check(f, Z)
    assert not report
    assert reason in report.reason
    assert report.radius == 0
    assert report.defect > 1e-3


def test_rule_that_is_slightly_wrong_is_seen_in_single_precision():
    assert not holomorphic.check(LeakyReal.apply, Z.float(), tol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("amplitude", [0.02, 0.1, 0.3])
def test_radius_is_the_distance_to_the_nearest_pole(scale, amplitude):
    z = torch.zeros(1, dtype=torch.float64)
    # One unit, of norm 1 by convention at zero: the nearest poles of tanh(s z) are at i pi / (2 s).
    report = holomorphic.check(lambda z: torch.tanh(scale * z), z, amplitude=amplitude, directions=1)
    assert 0.75 < report.radius / (math.pi / (2 * scale)) < 1.35


def test_radius_of_an_entire_function_is_large():
    assert holomorphic.check(lambda z: z**2 + 1, Z).radius == math.inf
    assert holomorphic.check(torch.exp, Z).radius > 1


def test_radius_of_a_branch_point():
    z = torch.ones(1, dtype=torch.float64)
    report = holomorphic.check(lambda z: torch.log(z) * torch.sqrt(z), z, amplitude=0.1, directions=1)
    assert 0.7 < report.radius < 1.4


def test_random_state_and_state_are_left_alone():
    before = torch.random.get_rng_state()
    holomorphic.check(torch.tanh, Z)
    assert torch.equal(before, torch.random.get_rng_state())
    assert holomorphic.check(torch.tanh, Z) == holomorphic.check(torch.tanh, Z)


def test_piecewise_map_can_be_allowed():
    f = fn.leaky_relu
    assert not holomorphic.check(f, Z + 0.01)
    assert holomorphic.check(f, Z + 0.01, amplitude=1e-4, piecewise="real-part")


def test_report_is_frozen():
    report = holomorphic.check(torch.tanh, Z)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.analytic = False


@pytest.mark.parametrize("options", [{"amplitude": 0}, {"directions": 0}])
def test_bad_options(options):
    with pytest.raises(InvalidOptionError):
        holomorphic.check(torch.tanh, Z, **options)


def test_complex_state_is_refused():
    with pytest.raises(InvalidOptionError, match="real"):
        holomorphic.check(torch.tanh, Z + 0j)
