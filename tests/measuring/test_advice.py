"""What `diagnose` advises: the likeliest cause first, and nothing about what is not known."""

import math

import pytest
import torch

from torchdeq_ep.measuring import Part, Parts
from torchdeq_ep.measuring.advice import Findings, advise
from torchdeq_ep.measuring.capture import Adjoint

EXACT = Adjoint(torch.ones(2), "dense", 0.0)
SMALL, LARGE, MISSING = Part(1e-4, 1.0), Part(0.2, 0.98), Part(math.nan, math.nan, "no limit")


def _advice(parts, exact=EXACT, free=1e-6, settled=1e-7, radius=0.5, kinks="", best_error=1e-4, unsettled=()):
    return advise(Findings(parts, exact, free, settled, radius, kinks, 1e-2, 1e-3, best_error, unsettled))


def test_an_early_stop_is_named_with_its_residual():
    advice = _advice(Parts(SMALL, SMALL, LARGE, LARGE), free=0.05)
    assert "stopped early (20%; the free phase at a relative residual of 5e-02)" in advice
    assert advice.startswith("The free phase stopped at a relative residual of 5e-02 (1e-07 when solved further)")


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"free": 0.05, "radius": 0.99}, ["The free phase", "The spectral radius", "Most of the error"]),
        ({"radius": 0.99}, ["The spectral radius of the Jacobian is 0.990", "Most of the error is the asymmetry"]),
        ({}, ["Most of the error is the asymmetry"]),
    ],
)
def test_causes_come_in_the_order_of_what_they_spoil(options, order):
    advice = _advice(Parts(SMALL, LARGE, SMALL, LARGE), **options)
    places = [advice.index(words) for words in order]
    assert places == sorted(places)
    assert places[0] == 0


def test_an_amplitude_is_named_where_it_helps_and_kinks_where_none_does():
    parts = Parts(LARGE, SMALL, SMALL, LARGE)
    assert "use beta=1e-03 instead of 1e-02" in _advice(parts, kinks="relu")
    assert "f has kinks (relu)" in _advice(parts, kinks="relu", best_error=0.15)
    assert "no amplitude leaves less than 15%: use a stencil of higher order" in _advice(parts, best_error=0.15)


def test_what_is_not_known_is_not_advised_on():
    unknown = _advice(Parts(LARGE, LARGE, LARGE, LARGE), Adjoint(torch.ones(2), "ift", 0.02))
    assert unknown.startswith("The exact adjoint is itself not known: it stopped at a relative residual of 2e-02.")
    assert "Most of the error" not in unknown
    part = _advice(Parts(MISSING, MISSING, SMALL, LARGE))
    assert part == "What the rest is due to is not known: no limit. The notes say why."
    unsettled = _advice(Parts(LARGE, SMALL, SMALL, LARGE), unsettled=("tight solve",))
    assert unsettled.startswith("The largest part is the finite nudge (20%), but the tight solve that it is read from")
    assert "Most of the error" in _advice(Parts(SMALL, LARGE, SMALL, LARGE), unsettled=("tight solve",))
    within = _advice(Parts(MISSING, MISSING, SMALL, SMALL))
    assert "nothing to mend" in within
