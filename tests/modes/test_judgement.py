"""What counts as converged, what rows are left, and what is said of the causes."""

import math

import pytest
import torch
from problems import contraction

import torchdeq_ep as tep
from torchdeq_ep.errors import ConvergenceWarning
from torchdeq_ep.modes.judgement import FreeLimit, accepted_residual, default_tolerance
from torchdeq_ep.state import Equilibrium, Packing


@pytest.mark.parametrize("rounding", [1e-12, 1e-3, 0.5, 30.0])
def test_what_rounding_leaves_never_claims_much(rounding):
    assert default_tolerance(rounding, 0.0) <= 3e-3
    assert accepted_residual(None, rounding, 10 * rounding) <= 3e-3
    assert accepted_residual(0.9, 0.9, rounding) <= 0.1


def test_the_tolerance_is_a_tenth_of_the_residual_of_the_free_phase():
    assert default_tolerance(1e-9, 1e-3) == pytest.approx(1e-4)


def batch(errors, n=6, seed=0):
    """A linear map of samples with spectra of their own, at states that are off by `errors`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.stack([contraction(n, seed + k, gain) for k, gain in enumerate((0.5, 0.9, 0.999))])
    off = torch.randn(3, n, generator=generator, dtype=torch.float64) * torch.tensor(errors)[:, None]
    exact = torch.randn(3, n, generator=generator, dtype=torch.float64)

    def f(z):
        return exact + torch.einsum("rij,rj->ri", weights, z - exact)

    z = exact + off
    g = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return Equilibrium(f, z, f(z), g, 2e-16, rows=Packing.of(z).rows)


def test_rows_are_left_by_the_residual_of_their_own_free_phase():
    equilibrium = batch((0.0, 1e-2, 1e-2))
    limit = FreeLimit(equilibrium, equilibrium.cotangent)
    sizes = equilibrium.cotangent.norm(dim=1)
    points = equilibrium.cotangent * torch.tensor([50.0, 50.0, 1.0])[:, None]
    # Only the second is both amplified and off its equilibrium.
    assert limit(points, 0.1 * sizes).tolist() == [False, True, False]


def test_nothing_is_left_at_a_free_phase_that_converged():
    equilibrium = batch((0.0, 0.0, 0.0))
    _, report = tep.get_backward("ift").solve(equilibrium)
    assert report.rows_left == 0
    assert report.converged


def test_a_tolerance_of_the_user_is_kept_whatever_the_free_phase():
    equilibrium = batch((0.0, 0.03, 0.1))
    with pytest.warns(ConvergenceWarning, match="the free phase"):
        _, report = tep.get_backward("ift", tol=1e-6, max_iter=300).solve(equilibrium)
    assert report.residual <= 1e-6
    assert report.rows_left == 0


def test_a_cycle_is_told_from_slowness():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    z = torch.ones(1, 2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning) as caught:
        tep.get_backward("ift")(lambda z: z @ turn, z, torch.ones_like(z))
    assert any("a cycle of 4 states" in str(warning.message) for warning in caught)
    with pytest.warns(ConvergenceWarning) as caught:
        tep.get_backward("ift")(lambda z: 0.97 * z + 1, z, torch.ones_like(z))
    assert any("Raise f_max_iter" in str(warning.message) for warning in caught)


def test_samples_that_hold_the_vector_are_named():
    scale = torch.full((20, 1), 0.3, dtype=torch.float64)
    scale[[3, 11]] = 1.0 - 1e-9

    def f(z):
        return scale * z

    z = torch.zeros(20, 4, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=r"Samples .*3, .*11.* of the batch hold most"):
        tep.get_backward("ift", max_iter=40, solver="plain")(f, z, torch.ones_like(z))


def test_the_fallback_never_raises_for_what_it_was_to_mend():
    def f(z):
        return z + 0.0 * z

    z = torch.ones(3, 4, dtype=torch.float64)
    for spec in ("ep", "ep-infinitesimal", "ift", "aep", "ep-one-sided"):
        with pytest.warns(tep.errors.EPWarning):
            vector = tep.get_backward(spec, on_divergence="ift", max_iter=10)(f, z, torch.ones_like(z))
        assert vector.isfinite().all()
        assert not math.isnan(float(vector.sum()))
