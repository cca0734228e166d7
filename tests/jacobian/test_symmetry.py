"""The symmetry and the homeostatic penalty against the dense Jacobian."""

import itertools
import math

import pytest
import torch
from problems import (
    AwkwardTanh,
    OnceDifferentiableSine,
    contraction,
    dense_penalty,
    misaligned,
    normal,
    seeded,
    tanh_problem,
)
from torch import nn

from torchdeq_ep.errors import DoubleBackwardError, InvalidOptionError, JacobianProductError, MapContractError
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.jacobian.metric import ActivityMetric
from torchdeq_ep.jacobian.spectrum import field_of_values
from torchdeq_ep.jacobian.symmetry import measure_symmetry, symmetry_penalty, symmetry_score
from torchdeq_ep.measuring.comparison import peak_memory


def test_symmetry_score():
    problem = tanh_problem(60, (2,), seed=1)
    jacobian = torch.block_diag(*problem.jacobians)
    symmetric, antisymmetric = (jacobian + jacobian.T).norm(), (jacobian - jacobian.T).norm()
    exact = float(symmetric / (symmetric + antisymmetric))
    assert symmetry_score(problem.f, problem.z, 200, generator=seeded()) == pytest.approx(exact, rel=0.02)
    weight = contraction(60, 0)
    for matrix, score in ((weight + weight.T, 1.0), (weight - weight.T, 0.0), (0 * weight, 1.0)):
        found = symmetry_score(lambda z, matrix=matrix: matrix @ z, problem.z[0], 5)
        assert found == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_do_not_overflow(dtype):
    weight = 5 * torch.randn(50, 50, generator=seeded())
    z = torch.zeros(100, 50)
    exact = symmetry_score(lambda z: torch.tanh(z @ weight), z, generator=seeded())
    found = symmetry_score(lambda z: torch.tanh(z @ weight.to(dtype)), z.to(dtype), generator=seeded())
    assert found == pytest.approx(exact, abs=1e-2)


def test_probes_must_be_a_number():
    for probes in (0, -1, 2.5, True):
        with pytest.raises(InvalidOptionError, match="probes must be a whole number"):
            symmetry_score(torch.tanh, torch.zeros(3), probes)


ESTIMATORS = ["antisymmetric", "paper"]


def _differentiable_jacobian(f, z):
    """The dense Jacobian as a function of the parameters of `f`, row by row."""
    point = z.detach().requires_grad_()
    value = f(point).flatten()
    rows = [torch.autograd.grad(entry, point, create_graph=True)[0].flatten() for entry in value]
    return torch.stack(rows)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, z):
        return self.attend(z, z, z, need_weights=False)[0]


def _convolution():
    return nn.Conv2d(4, 4, 3, padding=1)


MAPS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()), (2, 6)),
    "conv": (lambda: nn.Sequential(_convolution(), nn.Softplus()), (2, 4, 3, 3)),
    "group norm": (lambda: nn.Sequential(_convolution(), nn.GroupNorm(2, 4), nn.Tanh()), (2, 4, 3, 3)),
    "batch norm": (lambda: nn.Sequential(_convolution(), nn.BatchNorm2d(4), nn.Tanh()), (2, 4, 3, 3)),
    "instance norm": (lambda: nn.Sequential(_convolution(), nn.InstanceNorm2d(4, affine=True)), (2, 4, 3, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), (2, 6)),
    "attention": (Attention, (2, 3, 4)),
}


def _map(name):
    torch.manual_seed(0)
    build, shape = MAPS[name]
    f = build().double()
    for parameter in f.parameters():  # affine parameters off their symmetric defaults
        parameter.data += 0.1 * torch.randn_like(parameter)
    return f, normal(*shape, seed=2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("asymmetry", [0.01, 0.1, 0.7])
def test_unbiased(estimator, weighed, asymmetry):
    weight, x = misaligned(30, asymmetry), normal(2, 30, seed=3)

    def f(z):
        return torch.tanh(z @ weight.T + x)

    z = normal(2, 30, seed=4)
    metric = ActivityMetric("tanh", "pre") if weighed else None  # any positive diagonal will do
    exact = float(dense_penalty(dense_jacobian(f, z), metric(z) if metric else None))
    generator = seeded(5)
    with torch.no_grad():
        draws = torch.stack([symmetry_penalty(f, z, 4, estimator, metric, generator) for _ in range(500)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / math.sqrt(500)
    if estimator == "antisymmetric":
        assert float(draws.min()) >= 0


def test_the_paper_s_estimator_is_its_formula():
    weight = misaligned(5, 0.5)
    f, z = (lambda z: torch.tanh(z @ weight.T)), normal(5)
    jacobian, e = dense_jacobian(f, z), torch.randn(1, 5, generator=seeded(), dtype=torch.float64)[0]
    formula = (jacobian @ e).square().sum() - e @ jacobian @ jacobian @ e
    estimate = symmetry_penalty(f, z, 1, "paper", generator=seeded())
    torch.testing.assert_close(estimate, formula / 5)


def test_ours_has_far_less_noise_where_it_matters():
    weight = misaligned(300, 0.01).requires_grad_()
    z = torch.zeros(300, dtype=torch.float64)
    values, gradients = {}, {}
    for estimator in ESTIMATORS:
        generator = seeded()
        draws = [symmetry_penalty(lambda z: z @ weight.T, z, 1, estimator, generator=generator) for _ in range(100)]
        values[estimator] = float(torch.stack(draws).detach().std())
        (mean,) = torch.autograd.grad(dense_penalty(weight), weight)
        noise = [(torch.autograd.grad(draw, weight)[0] - mean).square().sum() for draw in draws[:20]]
        gradients[estimator] = float(torch.stack(noise).mean().sqrt())
    assert values["paper"] > 20 * values["antisymmetric"]
    assert gradients["paper"] > 20 * gradients["antisymmetric"]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_is_that_of_the_dense_penalty(name, estimator):
    f, z = _map(name)
    parameters = list(f.parameters())
    # Attention in its fused form has no second derivative, not even for the reference.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        penalty = dense_penalty(_differentiable_jacobian(f, z))
        exact = torch.autograd.grad(penalty, parameters, materialize_grads=True)
    # Along a few fixed directions: each is a number with a standard error.
    directions = [[normal(*p.shape, seed=10 * k + i) for i, p in enumerate(parameters)] for k in range(3)]
    generator, rows = seeded(6), []
    for _ in range(30):
        estimate = symmetry_penalty(f, z, 6, estimator, generator=generator)
        gradient = torch.autograd.grad(estimate, parameters, materialize_grads=True)
        rows.append([float(sum((g * d).sum() for g, d in zip(gradient, way, strict=True))) for way in directions])
    draws = torch.tensor(rows, dtype=torch.float64)
    for column, way in zip(draws.T, directions, strict=True):
        expected = float(sum((g * d).sum() for g, d in zip(exact, way, strict=True)))
        assert abs(float(column.mean()) - expected) < 4 * float(column.std()) / math.sqrt(len(column))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("metric", [None, ActivityMetric("tanh", "pre")])
def test_the_gradient_is_that_of_the_value_returned(name, estimator, metric):
    """Not only in expectation: the derivative of the very estimate, by differences."""
    f, z = _map(name)
    parameters = list(f.parameters())
    before = {key: value.clone() for key, value in f.state_dict().items()}

    def estimate():
        return symmetry_penalty(f, z, 3, estimator, metric, seeded(7))

    gradient = torch.autograd.grad(estimate(), parameters, materialize_grads=True)
    assert all(torch.equal(value, before[key]) for key, value in f.state_dict().items())
    way = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    slope = float(sum((g * d).sum() for g, d in zip(gradient, way, strict=True)))
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, way, strict=True):
                p += sign * step * d
            values.append(float(estimate()))
            for p, d in zip(parameters, way, strict=True):
                p -= sign * step * d
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_probes_in_chunks_are_the_same(name, estimator, chunk):
    f, z = _map(name)
    values, gradients = [], []
    for some in (None, chunk):
        penalty = symmetry_penalty(f, z, 5, estimator, ActivityMetric("tanh", "pre"), seeded(7), chunk=some)
        values.append(float(penalty.detach()))
        gradients.append(torch.autograd.grad(penalty, list(f.parameters()), materialize_grads=True))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    size = max(float(g.norm()) for g in gradients[0])
    assert all(float((g - other).norm()) < 1e-12 * size for g, other in zip(*gradients, strict=True))
    whole, parts = (measure_symmetry(f, z, 5, generator=seeded(7), chunk=some) for some in (None, chunk))
    assert vars(whole) == pytest.approx(vars(parts))


def test_a_chunk_holds_the_graph_of_its_own_probes_alone():
    net = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())))
    z = torch.randn(8, 4, 32, 32)

    def peak(probes, chunk):
        def run():
            symmetry_penalty(net, z, probes, chunk=chunk).backward()

        return peak_memory(run, torch.device("cpu")) / (4 * z.numel())

    whole = peak(16, None) - peak(8, None)
    parts = peak(16, 1) - peak(8, 1)
    assert parts / 8 < 3  # a probe, and what its product is weighed with
    assert parts < whole / 3


@pytest.mark.parametrize("call", range(1, 13))
def test_a_chunk_for_which_vmap_is_too_large(call, monkeypatch):
    f, z = _map("linear")
    calls, grad = itertools.count(1), torch.autograd.grad

    def measured(fails):
        def limited(*args, **options):
            if options.get("is_grads_batched") and next(calls) == fails:
                raise torch.OutOfMemoryError("too large")
            return grad(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", limited)
            return symmetry_penalty(f, z, 6, generator=seeded(7), chunk=2)

    penalty, expected = measured(call), measured(None)
    ours, theirs = (torch.autograd.grad(p, list(f.parameters()), materialize_grads=True) for p in (penalty, expected))
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(g, other, rtol=1e-10) for g, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_an_operation_without_vmap_or_forward_mode(chunk):
    weight, z = misaligned(5, 0.5).requires_grad_(), normal(5)
    results = []
    for phi in (torch.tanh, AwkwardTanh.apply):
        penalty = symmetry_penalty(lambda z, phi=phi: phi(z @ weight.T), z, 3, generator=seeded(), chunk=chunk)
        results.append((penalty, *torch.autograd.grad(penalty, weight)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "f",
    [
        OnceDifferentiableSine.apply,
        lambda z: z + OnceDifferentiableSine.apply(z),
        lambda z: torch.tanh(z) + 0.3 * OnceDifferentiableSine.apply(z),
    ],
)
@pytest.mark.parametrize(
    "measure", [symmetry_penalty, symmetry_score, field_of_values, lambda f, z: symmetry_penalty(f, z, metric="auto")]
)
def test_an_operation_that_can_be_differentiated_only_once_is_noticed(f, measure):
    with pytest.raises(JacobianProductError, match="differentiated only once"):
        measure(f, torch.ones(50))


def test_the_state_is_held_fixed_and_nothing_else_is():
    weight = misaligned(4, 0.5).requires_grad_()
    z, x = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    symmetry_penalty(lambda z: torch.tanh(z @ weight.T + x), z).backward()
    assert z.grad is None
    assert x.grad.any()
    assert weight.grad.any()
    with torch.no_grad():
        assert not symmetry_penalty(lambda z: torch.tanh(z @ weight.T + x), z).requires_grad


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_second_derivative_is_refused(chunk):
    weight = misaligned(4, 0.5).requires_grad_()
    penalty = symmetry_penalty(lambda z: torch.tanh(z @ weight.T), normal(4), chunk=chunk)
    (gradient,) = torch.autograd.grad(penalty, weight, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="homeostatic penalty"):
        torch.autograd.grad(gradient.sum(), weight)


def test_several_tensors_one_of_them_complex():
    weight = 0.4 * torch.view_as_complex(normal(4, 4, 2))
    real = weight.real.clone()

    def f(a, b):
        return torch.tanh(b.real @ real.T), (a.to(torch.complex128) @ weight) * (1 + 0.2j)

    def flat(z):
        one, two = f(z[:4], torch.complex(z[4::2], z[5::2]))
        return torch.cat([one, torch.stack([two.real, two.imag], 1).flatten()])

    a, b = normal(4), torch.view_as_complex(normal(4, 2, seed=1))
    exact = float(dense_penalty(dense_jacobian(flat, torch.cat([a, torch.view_as_real(b).flatten()]))))
    with torch.no_grad():
        estimate = symmetry_penalty(f, (a, b), 4000, generator=seeded())
    assert float(estimate) == pytest.approx(exact, rel=0.05)


def test_what_the_function_refuses():
    with pytest.raises(InvalidOptionError, match="Did you mean 'antisymmetric'"):
        symmetry_penalty(torch.tanh, torch.zeros(2), estimator="antisymetric")
    with pytest.raises(InvalidOptionError, match="probes"):
        symmetry_penalty(torch.tanh, torch.zeros(2), 0)
    with pytest.raises(InvalidOptionError, match="chunk"):
        symmetry_penalty(torch.tanh, torch.zeros(2), chunk=0)
    with pytest.raises(InvalidOptionError, match="positive and finite"):
        symmetry_penalty(torch.tanh, torch.zeros(2), metric=lambda z: -torch.ones_like(z))
    with pytest.raises(MapContractError, match="keep the shape"):
        symmetry_penalty(torch.sum, torch.zeros(2))
