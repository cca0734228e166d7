"""Truncated and unrolled gradients, each against its definition written out by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import contraction, normal, relative_error, solve
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MissingHistoryError, NudgeDivergedError


def dense():
    """`f(z) = tanh(W z + U x)`: parameters, the input, a state and the map of it."""
    weight, drive = contraction(6, 0, 0.8).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    x = normal(4, 3, seed=2).requires_grad_()
    return (
        (weight, drive, x),
        (torch.zeros(4, 6, dtype=torch.float64),),
        lambda z: torch.tanh(z @ weight.T + x @ drive.T),
    )


def convolutional():
    kernel, x = (0.15 * normal(2, 2, 3, 3, seed=1)).requires_grad_(), normal(3, 2, 5, 5, seed=2).requires_grad_()
    return (kernel, x), (torch.zeros_like(x),), lambda z: torch.tanh(functional.conv2d(z, kernel, padding=1) + x)


def two_states():
    """Two tensors of different shapes, each of which depends on both."""
    weight, x = contraction(7, 3, 0.8).requires_grad_(), normal(5, 7, seed=2).requires_grad_()

    def f(a, b):
        both = torch.tanh(torch.cat([a.flatten(1), b], 1) @ weight.T + x)
        return both[:, :4].reshape(5, 2, 2), both[:, 4:]

    return (weight, x), (torch.zeros(5, 2, 2, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)), f


pytestmark = pytest.mark.filterwarnings("ignore:the free phase stopped:torchdeq_ep.errors.ConvergenceWarning")
MAPS = [dense, convolutional, two_states]


class Layer:
    """A map with its state after some steps, and what its gradients are by definition."""

    def __init__(self, make, steps):
        self.leaves, start, self.f = make()
        self.spread = len(start) > 1
        with torch.no_grad():
            self.z = start
            for _ in range(steps):
                self.z = self.step(self.z)
        self.weights = [normal(*t.shape, seed=9 + k) for k, t in enumerate(self.z)]

    def step(self, z):
        value = self.f(*z)
        return tuple(value) if self.spread else (value,)

    def loss(self, z):
        return sum((w * t).sum() + 0.5 * (t**2).sum() for w, t in zip(self.weights, z, strict=True))

    def cotangents(self, z):
        z = tuple(t.detach().requires_grad_() for t in z)
        return torch.autograd.grad(self.loss(z), z)

    def gradient_by(self, backward):
        state = tep.attach(self.f, self.z if self.spread else self.z[0], backward)
        return torch.autograd.grad(self.loss(state if self.spread else (state,)), self.leaves)

    def gradient_of(self, z):
        """Of a state with its graph, with the cotangent that the layer has at `z*`."""
        return torch.autograd.grad(z, self.leaves, self.cotangents(self.z))

    def pulled(self, v):
        z = tuple(t.detach().requires_grad_() for t in self.z)
        return torch.autograd.grad(self.step(z), z, v)


def assert_same(found, expected, tolerance=1e-13):
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.fixture(params=MAPS, ids=lambda make: make.__name__)
def layer(request):
    return Layer(request.param, 3)  # far from its equilibrium: what is differentiated where is not the same


def test_one_step_is_the_cotangent(layer):
    expected = layer.gradient_of(layer.step(layer.z))
    assert_same(layer.gradient_by("one-step"), expected)
    assert_same(layer.gradient_by("jfb"), expected)
    assert_same(layer.gradient_by("neumann:k=1"), expected)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_neumann_is_its_series(layer, k, tau):
    g = layer.cotangents(layer.z)
    term, total = g, g
    for _ in range(k - 1):
        term = tuple(tau * p + (1 - tau) * t for p, t in zip(layer.pulled(term), term, strict=True))
        total = tuple(a + b for a, b in zip(total, term, strict=True))
    expected = torch.autograd.grad(layer.step(layer.z), layer.leaves, tuple(tau * t for t in total))
    assert_same(layer.gradient_by(f"neumann:k={k},tau={tau}"), expected)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_phantom_is_autograd_through_damped_steps(layer, k, tau):
    z = layer.z
    for _ in range(k):
        z = tuple(tau * new + (1 - tau) * old for new, old in zip(layer.step(z), z, strict=True))
    assert_same(layer.gradient_by(f"phantom:k={k},tau={tau}"), layer.gradient_of(z))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_unrolled_is_autograd_through_steps(layer, k):
    z = layer.z
    for _ in range(k):
        z = layer.step(z)
    assert_same(layer.gradient_by(f"unrolled:k={k}"), layer.gradient_of(z))


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("name", ["neumann", "phantom:tau=0.7", "unrolled"])
def test_with_many_terms_all_tend_to_implicit_differentiation(make, name):
    layer = Layer(make, 300)
    exact = layer.gradient_by("ift:tol=1e-14")
    errors = []
    for k in (4, 8, 200):
        mode = tep.get_backward(name, k=k)
        errors.append(max(relative_error(a, b) for a, b in zip(layer.gradient_by(mode), exact, strict=True)))
    assert errors[0] > 2 * errors[1] > 1e-6
    assert errors[2] < 1e-11


@pytest.mark.parametrize("make", MAPS)
def test_gmres_solves_the_equation_of_implicit_differentiation(make):
    layer = Layer(make, 400)
    joined = torch.cat([t.flatten() for t in layer.cotangents(layer.z)])

    def flat(z):
        parts = torch.split(z, [t.numel() for t in layer.z])
        return torch.cat(
            [t.flatten() for t in layer.step([p.reshape(t.shape) for p, t in zip(parts, layer.z, strict=True)])]
        )

    jacobian = torch.func.jacrev(flat)(torch.cat([t.flatten() for t in layer.z]).detach())
    v = torch.linalg.solve(torch.eye(len(joined), dtype=joined.dtype) - jacobian.detach().T, joined)
    parts = torch.split(v, [t.numel() for t in layer.z])
    shaped = tuple(part.reshape(t.shape) for part, t in zip(parts, layer.z, strict=True))
    expected = torch.autograd.grad(layer.step(layer.z), layer.leaves, shaped)
    assert_same(layer.gradient_by("gmres:tol=1e-13"), expected, 1e-11)


@pytest.mark.parametrize("spec", ["one-step", "neumann:k=3,tau=0.7", "phantom:k=3,tau=0.7", "unrolled:k=3"])
def test_a_mode_called_by_itself_returns_the_error_vector_in_effect(spec):
    """At an equilibrium, `(df/dtheta)^T v` is the gradient of the layer."""
    layer = Layer(dense, 400)
    v = tep.get_backward(spec)(layer.f, layer.z[0], layer.cotangents(layer.z)[0])
    expected = torch.autograd.grad(layer.step(layer.z), layer.leaves, (v,))
    assert_same(layer.gradient_by(spec), expected, 1e-12)


@pytest.mark.parametrize("spec", ["one-step", "neumann:k=3,tau=0.7", "phantom:k=3,tau=0.7", "unrolled:k=3", "phantom"])
@pytest.mark.parametrize("make", MAPS)
def test_the_certificate_is_the_residual_in_the_exact_equation(make, spec):
    """`v = sum_(i < k) B^i g` leaves `B^k g`."""
    layer, reports = Layer(make, 400), []
    state = tep.attach(layer.f, layer.z if layer.spread else layer.z[0], spec, writer=reports.append)
    layer.loss(state if layer.spread else (state,)).backward()
    packed = tep.get_backward(spec)
    g = layer.cotangents(layer.z)
    v = packed(layer.f, layer.z if layer.spread else layer.z[0], g if layer.spread else g[0])
    v = v if layer.spread else (v,)
    left = [a - b - c for a, b, c in zip(v, layer.pulled(v), g, strict=True)]
    residual = torch.cat([t.flatten() for t in left]).norm() / torch.cat([t.flatten() for t in g]).norm()
    assert len(reports) == 1
    assert reports[0].adjoint_residual == pytest.approx(float(residual), rel=1e-9)


def test_the_value_of_the_layer_stays():
    layer = Layer(dense, 2)
    for spec in ("one-step", "neumann", "phantom", "unrolled:k=4"):
        assert torch.equal(tep.attach(layer.f, layer.z[0], spec), layer.z[0])


def test_statistics_are_not_recorded_by_further_steps():
    norm, weight = torch.nn.BatchNorm1d(4), contraction(4, 0, 0.5).float().requires_grad_()
    z = torch.randn(8, 4)

    def recorded(spec):
        norm.reset_running_stats()
        tep.attach(lambda z: torch.tanh(norm(z @ weight)), z, spec).sum().backward()
        return norm.running_mean.clone(), int(norm.num_batches_tracked)

    expected = recorded("one-step")
    for spec in ("neumann", "phantom", "unrolled:k=3"):
        mean, count = recorded(spec)
        assert torch.equal(mean, expected[0])
        assert count == expected[1]


def test_a_second_derivative_through_steps_is_that_of_autograd():
    weight = contraction(3, 0, 0.5).requires_grad_()
    z = normal(2, 3)

    def gradient(state):
        (first,) = torch.autograd.grad((state**2).sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    def f(z):
        return torch.tanh(z @ weight)

    class SameValue(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, end):
            return value.clone()

        @staticmethod
        def backward(ctx, g):
            return None, g

    expected = gradient(SameValue.apply(z, f(f(z))))
    assert relative_error(gradient(tep.attach(f, z, "unrolled:k=2", certificate=False)), expected) < 1e-13


def test_unrolled_without_a_number_of_steps_needs_the_steps_made():
    with pytest.raises(MissingHistoryError, match="unrolled:k=10"):
        tep.attach(lambda z: z * torch.ones(2, requires_grad=True), torch.zeros(2), "unrolled")


def test_a_series_that_overflows_is_an_error():
    z = torch.zeros(2)
    with pytest.raises(NudgeDivergedError, match="fewer terms"):
        tep.get_backward("neumann:k=100")(lambda z: 1e10 * z, z, torch.ones(2))


@pytest.mark.parametrize("spec", ["neumann:k=0", "phantom:k=1.5", "phantom:tau=0", "neumann:tau=1.2", "unrolled:k=-1"])
def test_impossible_options(spec):
    with pytest.raises(InvalidOptionError):
        tep.get_backward(spec)


@pytest.mark.parametrize("spec", ["one-step", "neumann:k=3", "phantom:tau=0.7", "unrolled", "unrolled:k=3"])
def test_modes_are_values(spec):
    mode = tep.get_backward(spec)
    assert pickle.loads(pickle.dumps(mode)) == mode == copy.deepcopy(mode) == tep.get_backward(spec)


def test_the_fixed_point_of_problems_is_one():
    layer = Layer(dense, 400)
    assert relative_error(solve(layer.f, layer.z[0], 1), layer.z[0]) < 1e-14
