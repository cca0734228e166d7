"""Forward derivatives of a black box: `sensitivities`, and the transforms that reach it."""

import numpy as np
import pytest
import torch
from problems import contraction, normal, relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

import torchdeq_ep as tep
from torchdeq_ep.errors import DoubleBackwardError, InvalidOptionError, LawMismatchError, TransformError

N = 4
X = normal(N, seed=1)
ONE_WAY = 0.8 * contraction(N, 0, 1.0)
MUTUAL = contraction(N, 0, 0.8, symmetric=True)


def _force(z, theta, x):
    return x + theta @ torch.tanh(z) - z


def _numbers(theta, x):
    """The equilibrium, by NumPy."""
    weight, load = theta.detach().numpy(), x.detach().numpy()

    def solve(current):
        z = np.zeros(N)
        for _ in range(300):
            z = load + weight @ np.tanh(z) + np.asarray(current)
        return z

    return solve


def _measured(weight, x=X, **options):
    solve = _numbers(weight if weight.dim() == 2 else MUTUAL, X)
    return lambda theta: tep.attach_equilibrium(solve, _force, theta, x, noise=1e-15, **options)


def _dense(theta):
    """`dz*/dtheta`, by the implicit function theorem."""
    z = torch.from_numpy(_numbers(theta, X)(np.zeros(N)))
    by_z = jacrev(lambda z: _force(z, theta, X))(z)
    return -torch.linalg.solve(by_z, jacrev(lambda t: _force(z, t, X))(theta).flatten(1)).reshape(N, N, N)


@pytest.mark.parametrize(("stencil", "tolerance"), [("symmetric", 1e-8), ("one-sided", 1e-5), ("richardson", 1e-9)])
@pytest.mark.parametrize("theta", [ONE_WAY, MUTUAL], ids=["one-way", "mutual"])
def test_columns_are_those_of_the_implicit_function_theorem(theta, stencil, tolerance):
    found = tep.sensitivities(_numbers(theta, X), _force, theta, X, stencil=stencil, noise=1e-15)
    assert relative_error(found.columns.T.reshape(N, N, N), _dense(theta)) < tolerance
    assert found.standard_error is None


def test_columns_asked_for():
    whole = tep.sensitivities(_numbers(ONE_WAY, X), _force, ONE_WAY, X, noise=1e-15)
    change = normal(N, N, seed=3)
    some = tep.sensitivities(_numbers(ONE_WAY, X), _force, ONE_WAY, X, columns=[5, change, 0], noise=1e-15)
    assert torch.allclose(some.columns[[0, 2]], whole.columns[[5, 0]], atol=1e-9)
    assert torch.allclose(some.columns[1], change.flatten() @ whole.columns, atol=1e-9)
    assert some.calls == 1 + 3 * 2


def test_a_column_that_moves_nothing():
    theta = {"weight": ONE_WAY, "unused": torch.ones(2, dtype=torch.float64)}
    found = tep.sensitivities(
        _numbers(ONE_WAY, X), lambda z, t, x: _force(z, t["weight"], x), theta, X, columns=[16, 0]
    )
    assert torch.equal(found.columns[0], torch.zeros(N, dtype=torch.float64))
    assert found.columns[1].norm() > 0


@pytest.mark.parametrize("columns", [[16], [-1], [torch.ones(3)], [], ["a"]])
def test_impossible_columns(columns):
    with pytest.raises(InvalidOptionError):
        tep.sensitivities(_numbers(ONE_WAY, X), _force, ONE_WAY, X, columns=columns)


@pytest.mark.parametrize("executor", [None, "thread", "process"])
def test_standard_errors_cover_the_truth(executor):
    generator = np.random.default_rng(0)

    def noisy(current):
        seed = int(abs(float(np.asarray(current).sum())) * 1e12) % 2**31  # processes do not share a generator
        noise = np.random.default_rng(seed + (0 if executor == "process" else generator.integers(2**31)))
        return _numbers(ONE_WAY, X)(current) + 1e-4 * noise.standard_normal(N)

    repeats = 2 if executor == "process" else 8
    found = tep.sensitivities(
        noisy, _force, ONE_WAY, X, columns=range(6), repeats=repeats, executor=executor, noise=1e-4, workers=4
    )
    assert found.columns.shape == found.standard_error.shape == (6, N)
    if executor != "process":
        misses = (found.columns - _dense(ONE_WAY).reshape(N, -1).T[:6]).abs() / found.interval(0.95)
        assert float((misses < 1).double().mean()) > 0.7
        assert float(misses.max()) < 4


def test_a_wrong_law_is_refused():
    with pytest.raises(LawMismatchError, match="wrong sign"):
        tep.sensitivities(_numbers(ONE_WAY, X), lambda z, t, x: -_force(z, t, x), ONE_WAY, X, noise=1e-15)


def test_parameters_of_a_module():
    module = nn.Linear(N, N).double()
    with torch.no_grad():
        module.weight.copy_(ONE_WAY)
        module.bias.copy_(X)
    expected = tep.sensitivities(_numbers(ONE_WAY, X), _force, ONE_WAY, X, noise=1e-15)
    found = tep.sensitivities(
        _numbers(ONE_WAY, X), lambda z, m, x: m(torch.tanh(z)) - z, module, noise=1e-15, columns=range(N * N)
    )
    assert torch.allclose(found.columns, expected.columns, atol=1e-8)
    assert module.weight.grad is None


# --- transforms ------------------------------------------------------------------------------------------------------


def _directional(function, x, along):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, along))).tangent


def _functional(function, x, strategy):
    return torch.autograd.functional.jacobian(function, x, vectorize=True, strategy=strategy)


FORWARD = {
    "jacfwd": jacfwd,
    "functional.jacobian": lambda f: lambda t: _functional(f, t, "forward-mode"),
    "jvp": lambda f: (
        lambda t: torch.stack([jvp(f, (t,), (e,))[1] for e in torch.eye(16).double().reshape(16, N, N)], -1)
    ),
    "forward_ad": lambda f: (
        lambda t: torch.stack([_directional(f, t, e) for e in torch.eye(16).double().reshape(16, N, N)], -1)
    ),
}
REVERSE = {"jacrev": jacrev, "functional.jacobian": lambda f: lambda t: _functional(f, t, "reverse-mode")}


@pytest.mark.parametrize("transform", FORWARD)
def test_forward_transforms(transform):
    found = FORWARD[transform](_measured(ONE_WAY))(ONE_WAY)
    assert relative_error(found.reshape(N, N, N), _dense(ONE_WAY)) < 1e-8


@pytest.mark.parametrize("transform", REVERSE)
def test_reverse_transforms_of_a_reciprocal_system(transform):
    def force(z, theta, x):  # dF/dz is symmetric
        return x + theta.T @ torch.tanh(theta @ z) - z

    def solve(current):
        z = torch.zeros_like(X)
        for _ in range(300):
            z = X + MUTUAL.T @ torch.tanh(MUTUAL @ z) + current
        return z

    def layer(theta):
        return tep.attach_equilibrium(solve, force, theta, X, noise=1e-15)

    z = solve(torch.zeros(()).double())
    by_z = jacrev(lambda z: force(z, MUTUAL, X))(z)
    expected = -torch.linalg.solve(by_z, jacrev(lambda t: force(z, t, X))(MUTUAL).flatten(1)).reshape(N, N, N)
    assert relative_error(REVERSE[transform](layer)(MUTUAL), expected) < 1e-8
    assert relative_error(grad(lambda t: layer(t).sum())(MUTUAL), expected.sum(0)) < 1e-8


REFUSED = {
    "vmap": (TransformError, lambda f, t: vmap(f)(t.expand(2, N, N))),
    "vmap(grad)": (TransformError, lambda f, t: vmap(grad(lambda t: f(t).sum()))(t.expand(2, N, N))),
    "hessian": (TransformError, lambda f, t: hessian(lambda t: f(t).sum())(t)),
    "jacfwd(jacfwd)": (TransformError, lambda f, t: jacfwd(jacfwd(f))(t)),
    "linearize": (TransformError, lambda f, t: linearize(f, t)[1](t)),
    "create_graph": (DoubleBackwardError, lambda f, t: torch.autograd.functional.hessian(lambda t: f(t).sum(), t)),
    "forward over backward": (
        DoubleBackwardError,
        lambda f, t: torch.autograd.functional.hessian(
            lambda t: f(t).sum(), t, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ),
}


@pytest.mark.parametrize("transform", REFUSED)
def test_the_rest_is_refused_by_name(transform):
    kind, function = REFUSED[transform]
    with pytest.raises(kind):
        function(_measured(ONE_WAY), ONE_WAY)
