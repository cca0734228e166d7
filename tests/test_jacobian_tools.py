"""Measures of a Jacobian against the dense matrix, and metrics that make it symmetric."""

import math
import pickle

import pytest
import torch
from problems import AwkwardTanh, Problem, contraction, relative_error, solve, tanh_problem
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdeq_ep import EquilibriumPropagation, InfinitesimalEP, Stencil, get_backward
from torchdeq_ep.errors import ConvergenceWarning, InvalidOptionError, UnknownBackwardError
from torchdeq_ep.holomorphic.context import holomorphic_map
from torchdeq_ep.jacobian.linearization import Linearization, dense_jacobian
from torchdeq_ep.jacobian.metric import ActivityMetric, automatic_metric
from torchdeq_ep.jacobian.spectrum import field_of_values, spectral_radius
from torchdeq_ep.jacobian.symmetry import symmetry_score, weight_angle
from torchdeq_ep.nn import shifted_sigmoid


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


# --- stacked products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "batched"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), True),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), True),
        (lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.GroupNorm(2, 4), nn.Flatten()), False),  # a bug of vmap
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)), True),
    ],
)
def test_stacked_products_are_those_of_the_dense_jacobian(build, batched):
    torch.manual_seed(0)
    f = build().double()
    z, vectors = _random(5, 4), _random(3, 5, 4, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = dense_jacobian(f, z)
    local = Linearization(f, z)
    flat = vectors.flatten(1)
    torch.testing.assert_close(local.forward(vectors).flatten(1), flat @ jacobian.T)
    torch.testing.assert_close(local.adjoint(vectors).flatten(1), flat @ jacobian)
    assert not local.forward(vectors).requires_grad
    assert local.adjoint(vectors, create_graph=True).requires_grad
    assert local.batched == batched


def test_an_operation_without_vmap_and_forward_mode_is_taken_by_the_loop():
    weight = contraction(4, 0)
    local = Linearization(lambda z: AwkwardTanh.apply(z @ weight.T), _random(4))
    vectors = torch.eye(4, dtype=torch.float64)
    jacobian = dense_jacobian(lambda z: torch.tanh(z @ weight.T), _random(4))
    torch.testing.assert_close(local.forward(vectors), jacobian.T)  # the stack is along the columns here
    torch.testing.assert_close(local.adjoint(vectors), jacobian)
    assert not local.batched


def test_the_products_of_a_constant_map_are_zero():
    for value in (torch.ones(3), torch.ones(3, requires_grad=True)):
        local = Linearization(lambda z, value=value: 1 * value, torch.zeros(3))
        assert not local.forward(torch.ones(2, 3)).any()
        assert not local.adjoint(torch.ones(2, 3)).any()


# --- spectrum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 6, 80])
def test_spectral_radius_of_real_and_complex_spectra(n):
    skew = _random(n, n)
    for matrix in (contraction(n, 0), contraction(n, 1, symmetric=True), skew - skew.T):
        exact = float(torch.linalg.eigvals(matrix).abs().max())
        found = spectral_radius(lambda z, matrix=matrix: matrix @ z, _random(n), tol=1e-6, generator=_generator(3))
        assert found == pytest.approx(exact, rel=1e-5, abs=1e-12)


def test_spectral_radius_takes_few_products():
    matrix = torch.zeros(500, 500, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.6, -0.7], [0.7, 0.6]])  # a complex pair, on which power iteration never settles
    matrix[2:, 2:] = 0.5 * contraction(498, 0)
    calls = []

    def f(z):
        calls.append(1)
        return matrix @ z

    assert spectral_radius(f, _random(500), generator=_generator()) == pytest.approx(math.hypot(0.6, 0.7), rel=1e-6)
    assert len(calls) <= 40


def test_an_eigenvalue_that_is_not_found_is_said():
    ring = torch.roll(torch.eye(200, dtype=torch.float64), 1, 0)  # every eigenvalue on the unit circle
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        spectral_radius(lambda z: ring @ z, _random(200), max_iter=5, generator=_generator())


@pytest.mark.parametrize("n", [1, 6, 80])
def test_field_of_values(n):
    problem = tanh_problem(n, (1,), seed=n, gain=0.9)
    (jacobian,) = problem.jacobians
    box = field_of_values(problem.f, problem.z, tol=1e-6, generator=_generator())
    real = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)
    imag = torch.linalg.eigvals((jacobian - jacobian.T) / 2).imag
    assert box.real_min == pytest.approx(float(real.min()), rel=1e-5)
    assert box.real_max == pytest.approx(float(real.max()), rel=1e-5)
    assert box.imag_max == pytest.approx(float(imag.max()), rel=1e-5, abs=1e-12)


def test_symmetry_score():
    problem = tanh_problem(60, (2,), seed=1)
    jacobian = torch.block_diag(*problem.jacobians)
    symmetric, antisymmetric = (jacobian + jacobian.T).norm(), (jacobian - jacobian.T).norm()
    exact = float(symmetric / (symmetric + antisymmetric))
    assert symmetry_score(problem.f, problem.z, 200, generator=_generator()) == pytest.approx(exact, rel=0.02)
    weight = contraction(60, 0)
    for matrix, score in ((weight + weight.T, 1.0), (weight - weight.T, 0.0), (0 * weight, 1.0)):
        found = symmetry_score(lambda z, matrix=matrix: matrix @ z, problem.z[0], 5)
        assert found == pytest.approx(score, abs=1e-12)


def test_the_tools_take_several_tensors_and_leave_running_statistics_alone():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3).double()
    a, b = _random(4, 3), _random(4, 2)
    coupling = 0.2 * _random(2, 3)

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


def test_probes_must_be_a_number():
    for probes in (0, -1, 2.5, True):
        with pytest.raises(InvalidOptionError, match="probes must be a whole number"):
            symmetry_score(torch.tanh, torch.zeros(3), probes)


# --- angles ----------------------------------------------------------------------------------------------------------


def test_weight_angle():
    weight = _random(4, 3, 5, 5)
    assert weight_angle(weight, 3 * weight) == pytest.approx(0.0, abs=1e-6)
    assert weight_angle(weight, -weight) == pytest.approx(180.0)
    tilted = weight + 1e-6 * _random(4, 3, 5, 5, seed=1)
    assert 1e-5 < weight_angle(weight, tilted) < 1e-4
    cosine = float((weight.flatten() @ weight.flip(0).flatten()) / weight.norm() ** 2)
    assert weight_angle(weight, weight.flip(0)) == pytest.approx(math.degrees(math.acos(cosine)))
    forth, back = nn.Linear(3, 5), nn.Linear(5, 3)
    assert 0 < weight_angle(forth.weight, back.weight.T) < 180
    with pytest.raises(InvalidOptionError, match=r"backward\.weight\.T"):
        weight_angle(forth.weight, back.weight)
    with pytest.raises(InvalidOptionError, match="no direction"):
        weight_angle(weight, 0 * weight)


# --- the metric of an activation -------------------------------------------------------------------------------------


def _leaky(x):
    return torch.where(x > 0, x, 0.3 * x)


@pytest.mark.parametrize(
    ("phi", "twin"),
    [("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("shifted-sigmoid", shifted_sigmoid)],
)
def test_named_activations_have_the_slope_of_their_function(phi, twin):
    u = torch.linspace(-1.5, 2.5, 41, dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(twin))(u)
    for activation in (phi, twin):
        torch.testing.assert_close(ActivityMetric(activation, "pre")(u), 1 / slope)
        torch.testing.assert_close(ActivityMetric(activation, "post")(twin(u)), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("phi", ["tanh", "shifted-sigmoid", torch.tanh, shifted_sigmoid])
def test_at_complex_states_the_metric_is_continued_from_the_real_part(phi):
    function = {"tanh": torch.tanh, "shifted-sigmoid": shifted_sigmoid}.get(phi, phi)
    # So far from the axis that the real part of the slope changes its sign; the last two are flat at their real part.
    u = torch.linspace(-0.5, 1.5, 11, dtype=torch.float64)
    u = torch.cat([u, u.new_tensor([-9.0, 9.0])]) + (0.9j if function is torch.tanh else 0.6j)
    slope = (function(u + 1e-5) - function(u - 1e-5))[:-2] / 2e-5
    assert bool((slope.real < 0).any())
    metric = holomorphic_map(ActivityMetric(phi, "pre"), "real-part")
    torch.testing.assert_close(metric(u)[:-2], 1 / slope)
    assert metric(u)[-2:].tolist() == pytest.approx([1000, 1000])


def test_at_complex_states_the_metric_of_activities_needs_a_name():
    activity = torch.tensor([0.2 + 0.3j, 0.9 - 0.1j])
    metrics = [holomorphic_map(ActivityMetric(phi), "real-part") for phi in ("tanh", torch.tanh)]
    torch.testing.assert_close(metrics[0](activity), 1 - activity**2)
    with pytest.raises(InvalidOptionError, match="inverse"):
        metrics[1](activity)


def test_activations_with_kinks_and_plateaus():
    z = torch.tensor([-0.6, 3.0, 2000.0], dtype=torch.float64)
    torch.testing.assert_close(ActivityMetric(_leaky)(z), torch.tensor([0.3, 1.0, 1.0], dtype=torch.float64))
    assert ActivityMetric(nn.PReLU())(torch.tensor([-1.0, 1.0])).tolist() == [0.25, 1.0]
    clipped = ActivityMetric(nn.functional.hardtanh, floor=0.01)(torch.tensor([-1.0, 0.5, 1.0]))
    assert clipped.tolist() == pytest.approx([0.01, 1.0, 0.01])
    assert ActivityMetric(torch.relu, floor=0.01)(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.01, 1.0])


@pytest.mark.parametrize("state", ["pre", "post"])
@pytest.mark.parametrize("phi", ["tanh", torch.tanh])
def test_saturated_units_have_a_finite_positive_metric(phi, state):
    extreme = torch.tensor([-40.0, 40.0]) if state == "pre" else torch.tensor([-1.0, 1.0])
    bound = 1 / 0.01 if state == "pre" else 0.01
    assert ActivityMetric(phi, state, floor=0.01)(extreme).tolist() == pytest.approx([bound, bound])


def test_an_activity_metric_is_a_value():
    metric = ActivityMetric(torch.tanh, state="pre")
    assert pickle.loads(pickle.dumps(metric)) == metric
    mode = EquilibriumPropagation(metric=ActivityMetric("tanh"))
    assert pickle.loads(pickle.dumps(mode)) == mode


def test_what_an_activity_metric_refuses():
    with pytest.raises(InvalidOptionError, match="Did you mean 'tanh'"):
        ActivityMetric("tahn")
    with pytest.raises(InvalidOptionError, match="name of an activation or a function"):
        ActivityMetric(3)
    with pytest.raises(InvalidOptionError, match="there are: post, pre"):
        ActivityMetric("tanh", state="mid")
    with pytest.raises(InvalidOptionError, match="between 0 and 1"):
        ActivityMetric("tanh", floor=0.0)
    with pytest.raises(InvalidOptionError, match="increasing"):
        ActivityMetric(torch.cos)(torch.zeros(3))
    for state in ("pre", "post"):
        with pytest.raises(InvalidOptionError, match="increasing"):
            ActivityMetric(torch.neg, state)(torch.zeros(3))


def _pre_problem(n=8, batch=(3,), gain=0.6):
    weight = contraction(n, 0, gain, symmetric=True)
    x, g = _random(*batch, n, seed=1), _random(*batch, n, seed=2)

    def f(u):
        return torch.tanh(u) @ weight.T + x

    u = solve(f, torch.zeros_like(x))
    return Problem(f, u, g, weight * (1 - torch.tanh(u.reshape(-1, 1, n)) ** 2))


@pytest.mark.parametrize("phi", ["tanh", torch.tanh])
@pytest.mark.parametrize("state", ["pre", "post"])
def test_with_it_symmetric_weights_make_ep_exact_to_the_order_of_the_stencil(phi, state):
    problem = tanh_problem(symmetric=True) if state == "post" else _pre_problem()
    exact = problem.dense(transpose=True)
    metric = ActivityMetric(phi, state)
    limit = InfinitesimalEP(metric=metric)(problem.f, problem.z, problem.g)
    assert relative_error(limit, exact) < 1e-9
    assert relative_error(InfinitesimalEP()(problem.f, problem.z, problem.g), exact) > 0.05

    def error(make, beta):
        mode = EquilibriumPropagation(make(beta), metric=metric, tol=1e-13)
        return relative_error(mode(problem.f, problem.z, problem.g), exact)

    for make, order in ((Stencil.one_sided, 1), (Stencil.symmetric, 2), (lambda b: Stencil.richardson(b, order=4), 4)):
        ratio = error(make, 0.04) / error(make, 0.02)
        assert math.log2(ratio) == pytest.approx(order, abs=0.25)
    without = EquilibriumPropagation(Stencil.symmetric(0.02))(problem.f, problem.z, problem.g)
    assert relative_error(without, exact) > 0.05


# --- the fitted metric -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pre", "post"])
@pytest.mark.parametrize(("n", "batch", "gain"), [(8, (3,), 0.6), (40, (4,), 0.95), (200, (2,), 0.95)])
def test_the_automatic_metric_takes_the_bias_of_an_activation_away(state, n, batch, gain):
    if state == "post":
        problem = tanh_problem(n, batch, symmetric=True, gain=gain)
        known = 1 - problem.z**2
    else:
        problem = _pre_problem(n, batch, gain)
        known = 1 / (1 - torch.tanh(problem.z) ** 2)
    exact = problem.dense(transpose=True)
    bias = relative_error(problem.dense(), exact)
    automatic = InfinitesimalEP(metric="auto")(problem.f, problem.z, problem.g)
    assert relative_error(automatic, exact) < bias / 10
    # The samples are independent, so each has a scale of its own.
    ratio = automatic_metric(problem.f, problem.z) / known
    assert (ratio.std(dim=-1) / ratio.mean(dim=-1) < 0.1).all()


@pytest.mark.parametrize("spec", ["ep:metric=auto", "ep-infinitesimal:metric=auto", "hep:metric=auto"])
def test_automatic_is_an_option_of_the_modes(spec):
    problem = tanh_problem(symmetric=True)
    exact = problem.dense(transpose=True)
    mode = get_backward(spec)
    assert pickle.loads(pickle.dumps(mode)) == mode
    once, again = (mode(problem.f, problem.z, problem.g) for _ in range(2))
    assert relative_error(once, exact) < 1e-3
    assert torch.equal(once, again)
    with pytest.raises((InvalidOptionError, UnknownBackwardError), match="metric must be"):
        get_backward(spec.replace("auto", "automatic"))


def test_the_reports_count_what_the_fit_costs():
    from torchdeq_ep.state.equilibrium import Equilibrium

    problem = tanh_problem(symmetric=True)
    equilibrium = Equilibrium(problem.f, problem.z, problem.f(problem.z), problem.g, 1e-16)
    for spec in ("ep", "ep-infinitesimal"):
        _, with_fit = get_backward(spec, metric="auto").solve(equilibrium)
        _, without = get_backward(spec).solve(equilibrium)
        assert with_fit.calls > without.calls + 50


def test_a_jacobian_beyond_repair_is_left_as_it_is():
    problem = tanh_problem(40, (4,))  # independent entries: no diagonal makes them symmetric
    exact = problem.dense(transpose=True)
    bias = relative_error(problem.dense(), exact)
    automatic = InfinitesimalEP(metric="auto")(problem.f, problem.z, problem.g)
    assert relative_error(automatic, exact) <= bias * (1 + 1e-9)


def test_a_metric_for_small_misalignment_is_as_good_as_the_known_one():
    weight = contraction(40, 0, symmetric=True) + 0.05 * contraction(40, 3)
    x, g = _random(3, 40, seed=1), _random(3, 40, seed=2)

    def f(z):
        return torch.tanh(z @ weight.T + x)

    z = solve(f, torch.zeros_like(x))
    problem = Problem(f, z, g, (1 - z[:, :, None] ** 2) * weight)
    exact = problem.dense(transpose=True)
    known, automatic = (
        relative_error(InfinitesimalEP(metric=m)(f, z, g), exact) for m in (ActivityMetric("tanh"), "auto")
    )
    assert automatic < 1.2 * known < 0.5 * relative_error(problem.dense(), exact)


def test_dead_units_and_tiny_states():
    weight = contraction(6, 0, symmetric=True)
    alive = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for f, z in (
        (lambda z: alive * torch.tanh(weight @ z), torch.zeros(6, dtype=torch.float64)),
        (lambda z: 0 * z, torch.zeros(6)),
        (lambda z: 0.5 * z, torch.zeros(1)),
    ):
        metric = automatic_metric(f, z)
        assert torch.isfinite(metric).all()
        assert (metric > 0).all()
