"""What a report claims is so: no error vector that is off by a tenth is called converged in silence."""

import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import relative_error

import torchdeq_ep as tep

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SPECS = [
    *(name for name in tep.available_backwards() if tep.get_backward(name).derivative is not None),
    "ep:beta=1e-6",
    "ep-one-sided:beta=1e-6",
    "ep:batching=vmap",
    "ep-richardson:order=6",
]
SPECS += [f"{spec}:max_iter=1" for spec in ("ift", "ep", "aep", "ep-infinitesimal")] + [
    "ep:solver=plain",
    "ift:solver=anderson",
]
EXACT = ("ift", "aep", "gmres")


def settled(radius, seed, dtype, n=8, batch=3):
    """`f(z) = z* + A tanh(z - z*)`, whose Jacobian at its fixed point is `A`; and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix = matrix * (radius / float(torch.linalg.eigvals(matrix).abs().max()))
    low = matrix.to(dtype)
    z, g = (torch.randn(batch, n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))

    def f(state):
        return z + torch.tanh(state - z) @ low.T.to(state.dtype)

    return f, z, g, low.double()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SPECS), st.sampled_from(DTYPES), st.floats(0.5, 1.5), st.integers(0, 10_000), st.floats(-4, 4))
@example("ep:beta=1e-6", torch.float32, 1.5, 0, 0.0)
@example("ep", torch.float16, 0.95, 0, 0.0)
@example("ep:max_iter=1", torch.float16, 0.95, 1, 0.0)
@example("ift:max_iter=1", torch.bfloat16, 0.9, 0, 0.0)
@example("ep", torch.bfloat16, 0.78125, 8910, 0.0)
def test_an_error_above_a_tenth_is_never_silent(spec, dtype, radius, seed, exponent):
    f, z, g, jacobian = settled(radius, seed, dtype)
    g = (g.double() * 10.0**exponent).to(dtype)
    singular = torch.eye(len(jacobian), dtype=torch.float64) - jacobian
    if float(torch.linalg.svdvals(singular).min()) < 0.05 or not bool(torch.isfinite(g).all() & (g != 0).any()):
        return
    limit = singular.T if spec.startswith(EXACT) else singular
    expected = torch.linalg.solve(limit, g.double().T).T
    if float(expected.abs().max()) > torch.finfo(dtype).max:
        return
    reports = []
    theta = torch.zeros((), dtype=dtype, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state = tep.attach(lambda s: f(s) + theta, z, spec, writer=reports.append)
            vector = []
            (state * 1).backward(g)
            vector = tep.get_backward(spec)(f, z, g)
        except (tep.errors.NudgeDivergedError, tep.errors.InvalidOptionError):
            return
    said = any(issubclass(warning.category, tep.errors.EPWarning) for warning in caught)
    error = relative_error(vector, expected)
    assert error <= 0.1 or said or not reports[0].converged, (error, reports[0])


@pytest.mark.parametrize("spec", ["ift", "ep", "ep-one-sided", "aep", "ep-infinitesimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ordinary_solve_is_converged_and_silent(spec, dtype):
    f, z, g, jacobian = settled(0.8, 3, dtype)
    limit = torch.eye(len(jacobian), dtype=torch.float64) - jacobian
    with warnings.catch_warnings():
        warnings.simplefilter("error", tep.errors.EPWarning)
        vector = tep.get_backward(spec)(f, z, g)
    expected = torch.linalg.solve(limit.T if spec.startswith(EXACT) else limit, g.double().T).T
    assert relative_error(vector, expected) < 1e-2
