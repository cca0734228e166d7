"""Weights at an angle to each other."""

from __future__ import annotations

import math

import pytest
import torch
from problems import normal
from torch import nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.nn.weights import rounded_angle, weight_angle, weight_at_angle


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 30.0, 60.0, 90.0])
def test_weights_are_at_the_angle_asked_for_and_have_equal_norms(degrees: float) -> None:
    weight = torch.randn(20, 30)
    other = weight_at_angle(weight, degrees)
    cosine = float((weight * other).sum() / weight.norm() ** 2)
    assert cosine == pytest.approx(math.cos(math.radians(degrees)), abs=1e-12)
    assert float(other.norm()) == pytest.approx(float(weight.norm()), rel=1e-12)
    assert weight_angle(weight, other) == pytest.approx(degrees, abs=1e-3)


@pytest.mark.parametrize(("nominal", "actual"), [(0.0, 0.0), (30.0, 71.0), (90.0, 90.0)])
def test_noise_of_another_norm_makes_the_angle_nominal(nominal: float, actual: float) -> None:
    weight = torch.randn(10, 30)
    other = weight_at_angle(weight, nominal, noise_norm=5.03 * float(weight.norm()))
    assert weight_angle(weight, other) == pytest.approx(actual, abs=0.05)
    assert float((other - math.cos(math.radians(nominal)) * weight).norm()) == pytest.approx(
        5.03 * math.sin(math.radians(nominal)) * float(weight.norm()), abs=1e-9
    )


def test_a_network_reports_no_angle_to_a_weight_that_is_zero() -> None:
    weight = torch.randn(4, 3)
    assert rounded_angle(weight, weight_at_angle(weight, 30.0)) == 30.0
    assert math.isnan(rounded_angle(weight, 0 * weight))


@pytest.mark.parametrize("weight", [torch.ones(1, 1), torch.ones(()), torch.zeros(3, 2), torch.zeros(0, 2)])
def test_an_angle_that_no_weight_has_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(InvalidOptionError, match="angle"):
        weight_at_angle(weight, 30.0)
    assert torch.equal(weight_at_angle(weight, 0.0), weight)
    assert torch.equal(weight_at_angle(weight, 180.0), -weight)


def test_weight_angle():
    weight = normal(4, 3, 5, 5)
    assert weight_angle(weight, 3 * weight) == pytest.approx(0.0, abs=1e-6)
    assert weight_angle(weight, -weight) == pytest.approx(180.0)
    tilted = weight + 1e-6 * normal(4, 3, 5, 5, seed=1)
    assert 1e-5 < weight_angle(weight, tilted) < 1e-4
    cosine = float((weight.flatten() @ weight.flip(0).flatten()) / weight.norm() ** 2)
    assert weight_angle(weight, weight.flip(0)) == pytest.approx(math.degrees(math.acos(cosine)))
    forth, back = nn.Linear(3, 5), nn.Linear(5, 3)
    assert 0 < weight_angle(forth.weight, back.weight.T) < 180
    with pytest.raises(InvalidOptionError, match=r"backward\.weight\.T"):
        weight_angle(forth.weight, back.weight)
    with pytest.raises(InvalidOptionError, match="no direction"):
        weight_angle(weight, 0 * weight)
