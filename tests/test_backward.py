"""Error vectors against dense Jacobians: exactness, orders of convergence, bias, and honesty about failure."""

import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, contraction, relative_error, solve, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import (
    ConvergenceWarning,
    EPError,
    FallbackWarning,
    InvalidOptionError,
    LossMismatchWarning,
    MapContractError,
    NonFiniteError,
    NotHolomorphicError,
    NudgeDivergedError,
    PrecisionWarning,
    StochasticMapError,
    TruncationWarning,
)
from torchdeq_ep.modes import schedules
from torchdeq_ep.state.equilibrium import Equilibrium

SOLVERS = [None, "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]


def report_of(mode, problem: Problem, loss_of_state=None):
    eps = torch.finfo(problem.z.dtype).eps
    return mode.solve(
        Equilibrium(problem.f, problem.z, problem.f(problem.z), problem.g, eps, loss_of_state=loss_of_state)
    )


# --- exactness -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    seed=st.integers(0, 10_000),
    gain=st.floats(0.05, 0.9),
)
def test_limits_equal_dense_solves(n, batch, seed, gain):
    problem = tanh_problem(n, batch, seed, gain=gain)
    exact, limit = problem.dense(transpose=True), problem.dense()
    for name, reference in {"ift": exact, "aep": exact, "ep-infinitesimal": limit, "ep-richardson": limit}.items():
        assert relative_error(tep.get_backward(name)(problem.f, problem.z, problem.g), reference) < 1e-8, name
    corrected = tep.InfinitesimalEP(correction="asymmetric")
    assert relative_error(corrected(problem.f, problem.z, problem.g), exact) < 1e-8


@pytest.mark.parametrize(
    ("stencil", "order"),
    [
        (tep.Stencil.one_sided, 1),
        (tep.Stencil.symmetric, 2),
        (lambda beta: tep.Stencil.richardson(beta, 4), 4),
        (lambda beta: tep.Stencil.richardson(beta, 6), 6),
        (lambda beta: tep.Stencil.contour(beta, 4), 4),
        (lambda beta: tep.Stencil.contour(beta, 6), 6),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_convergence(stencil, order, seed):
    problem = tanh_problem(seed=seed)
    limit = problem.dense()
    errors = [
        relative_error(tep.EquilibriumPropagation(stencil(beta), tol=1e-14)(problem.f, problem.z, problem.g), limit)
        for beta in ((0.4, 0.2) if order == 6 else (0.2, 0.1))
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] > 1e-13  # else the slope would be one of rounding errors


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["ift", "ep", "ep-one-sided", "aep", "hep"])
def test_every_torchdeq_solver_drives_every_mode(solver, name):
    problem = tanh_problem(seed=3)
    v = tep.get_backward(name, solver=solver)(problem.f, problem.z, problem.g)
    reference = problem.dense(transpose=name in ("ift", "aep"))
    assert relative_error(v, reference) < (1e-6 if name == "ep-one-sided" else 1e-9)


def test_a_callable_of_torchdeqs_signature_is_a_solver():
    from torchdeq.solver.broyden import broyden_solver

    problem = tanh_problem()
    v = tep.EquilibriumPropagation(solver=broyden_solver)(problem.f, problem.z, problem.g)
    assert relative_error(v, problem.dense()) < 1e-9


# --- bias ------------------------------------------------------------------------------------------------------------


def test_symmetric_weights_are_biased_until_the_metric_is_right():
    problem = tanh_problem(symmetric=True, gain=0.9)
    exact = problem.dense(transpose=True)
    plain = tep.EquilibriumPropagation()(problem.f, problem.z, problem.g)
    assert relative_error(plain, exact) > 0.02  # J = D W is not symmetric though W is
    right = tep.EquilibriumPropagation(metric=lambda z: 1 - z**2)(problem.f, problem.z, problem.g)
    assert relative_error(right, exact) < 1e-9
    errors = [
        relative_error(
            tep.EquilibriumPropagation(tep.Stencil.symmetric(beta), metric=lambda z: 1 - z**2, tol=1e-13)(
                problem.f, problem.z, problem.g
            ),
            exact,
        )
        for beta in (0.2, 0.1)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("mode", [tep.EquilibriumPropagation, tep.InfinitesimalEP])
def test_metric_conjugates_the_dense_solve(mode):
    problem = tanh_problem(seed=5)
    metric = torch.rand_like(problem.z) + 0.5
    v = mode(metric=lambda _: metric)(problem.f, problem.z, problem.g)
    assert relative_error(v, problem.dense(metric)) < 1e-9


@pytest.mark.parametrize("mode", [tep.EquilibriumPropagation, tep.InfinitesimalEP])
def test_asymmetric_correction_is_exact_under_any_metric(mode):
    problem = tanh_problem(seed=6)
    metric = torch.rand_like(problem.z) + 0.5
    v = mode(metric=lambda _: metric, correction="asymmetric")(problem.f, problem.z, problem.g)
    assert relative_error(v, problem.dense(transpose=True)) < 1e-9


def test_a_map_that_descends_an_energy_is_unbiased():
    weight = contraction(6, 0, 0.4, symmetric=True)

    def energy(z):
        return 0.5 * (z**2).sum() - torch.log(torch.cosh(z @ weight)).sum()

    def f(z):
        z = z if z.requires_grad else z.detach().requires_grad_()
        with torch.enable_grad():
            return z - 0.5 * torch.autograd.grad(energy(z), z, create_graph=True)[0] + 0.1

    z = torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(200):
        z = f(z).detach()
    g = torch.randn_like(z)
    v = tep.EquilibriumPropagation(batching="loop")(f, z, g)
    assert relative_error(v, tep.ImplicitDifferentiation()(f, z, g)) < 1e-8


# --- scale, free-phase accuracy, precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-5, 1e-12, 1e8])
@pytest.mark.parametrize("name", ["ift", "ep", "aep", "ep-infinitesimal"])
@pytest.mark.parametrize("solver", [None, "fixed_point_iter", "anderson"])
def test_scale_of_the_loss_does_not_matter(factor, name, solver):
    problem = tanh_problem(dtype=torch.float32)
    mode = tep.get_backward(name, solver=solver)
    v = mode(problem.f, problem.z, problem.g)
    scaled = mode(problem.f, problem.z, factor * problem.g)
    assert relative_error(scaled / factor, v) < 1e-4


def test_absolute_amplitude_is_taken_as_it_is():
    problem = tanh_problem()
    mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(1e-3), scale="absolute", tol=1e-13)
    _, report = report_of(mode, problem)
    assert report.nudge == 1e-3
    assert report.beta == pytest.approx(1e-3 * float(problem.g.norm() / problem.z.norm()))
    v = mode(problem.f, problem.z, problem.g)
    nudged = solve(lambda z: problem.f(z) - 1e-3 * problem.g, problem.z)
    assert relative_error(v, (problem.z - nudged) / 1e-3) < 1e-8


@pytest.mark.parametrize("seed", range(5))
def test_an_inexact_free_phase_costs_ep_no_more_than_it_costs_ift(seed):
    problem = tanh_problem(20, (4,), seed, dtype=torch.float32)
    loose = problem.z
    direction = torch.randn_like(loose)
    loose = loose + 1e-3 * loose.norm() * direction / direction.norm()
    moved = {
        name: relative_error(
            tep.get_backward(name, tol=1e-6)(problem.f, loose, problem.g),
            tep.get_backward(name, tol=1e-6)(problem.f, problem.z, problem.g),
        )
        for name in ("ift", "ep")
    }
    assert 0 < moved["ep"] <= moved["ift"]


@pytest.mark.parametrize("name", ["ep-one-sided", "ep", "ep-richardson"])
def test_float32_error_is_what_the_stencil_promises(name):
    problem = tanh_problem(dtype=torch.float32)
    mode = tep.get_backward(name)
    v, report = report_of(mode, problem)
    promised = mode.stencil.resolve(torch.finfo(torch.float32).eps).expected_error(torch.finfo(torch.float32).eps)
    assert relative_error(v, problem.dense()) < 5 * promised
    assert report.converged
    assert report.beta == pytest.approx(mode.stencil.resolve(torch.finfo(torch.float32).eps).beta)


def test_bfloat16_states_are_warned_about():
    problem = tanh_problem(dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        v = tep.EquilibriumPropagation()(problem.f, problem.z, problem.g)
    assert PrecisionWarning in {warning.category for warning in caught}
    assert v.dtype == torch.bfloat16
    assert relative_error(v, problem.dense()) < 0.2


def test_zero_cotangent_gives_zeros_without_a_call():
    problem = tanh_problem()
    for name in tep.available_backwards():
        mode = tep.get_backward(name)
        v = mode(problem.f, problem.z, torch.zeros_like(problem.g))
        assert torch.equal(v, torch.zeros_like(v))


def test_a_fixed_point_at_zero_has_a_usable_scale():
    weight = contraction(5, 0)
    g = torch.randn(5, dtype=torch.float64)
    v = tep.EquilibriumPropagation()(lambda z: torch.tanh(weight @ z), torch.zeros(5, dtype=torch.float64), g)
    assert relative_error(v, torch.linalg.solve(torch.eye(5, dtype=torch.float64) - weight, g)) < 1e-8


# --- opaque maps -----------------------------------------------------------------------------------------------------


def test_rows_may_be_coupled():
    mixing = contraction(6, 1, 0.7)

    def f(z):  # dim 0 holds nodes of one graph
        return torch.tanh(mixing.to_sparse() @ z + 0.3)

    z = solve(f, torch.zeros(6, 4, dtype=torch.float64))
    g = torch.randn_like(z)
    jacobian = torch.func.jacrev(lambda z: torch.tanh(mixing @ z + 0.3))(z).reshape(24, 24)
    limit = torch.linalg.solve(torch.eye(24, dtype=torch.float64) - jacobian, g.flatten()).reshape(6, 4)
    exact = torch.linalg.solve(torch.eye(24, dtype=torch.float64) - jacobian.T, g.flatten()).reshape(6, 4)
    for solver in SOLVERS:
        assert relative_error(tep.EquilibriumPropagation(solver=solver)(f, z, g), limit) < 1e-8
        assert relative_error(tep.ImplicitDifferentiation(solver=solver)(f, z, g), exact) < 1e-8
    assert relative_error(tep.get_backward("aep")(f, z, g), exact) < 1e-8  # no forward mode for sparse products


@pytest.mark.parametrize("stencil", ["symmetric", "richardson", "contour"])
def test_stacked_nodes_and_one_after_the_other_agree(stencil):
    problem = tanh_problem()
    results = {b: report_of(tep.EquilibriumPropagation(stencil, batching=b), problem) for b in ("auto", "loop", "vmap")}
    assert {name: report.batching for name, (_, report) in results.items()} == {
        "auto": "loop",
        "loop": "loop",
        "vmap": "vmap",
    }
    assert relative_error(results["vmap"][0], results["loop"][0]) < 1e-9
    assert results["loop"][1].calls < results["vmap"][1].calls  # later nodes start close to where they end


def test_a_stack_is_a_new_dimension():
    norm = torch.nn.BatchNorm1d(3).double()

    drive = torch.randn(5, 3, dtype=torch.float64)

    def f(z):  # joined to the batch, the nodes would share its statistics
        return norm(drive + 0.3 * torch.tanh(z))

    z = solve(f, torch.zeros(5, 3, dtype=torch.float64))
    g = torch.randn_like(z)
    loop, vmap = (tep.EquilibriumPropagation(batching=b)(f, z, g) for b in ("loop", "vmap"))
    assert relative_error(vmap, loop) < 1e-9


def test_a_map_that_vmap_cannot_take():
    problem = tanh_problem()

    def data_dependent(z):
        return problem.f(z) if float(z.sum()) < 1e9 else z

    assert relative_error(tep.EquilibriumPropagation()(data_dependent, problem.z, problem.g), problem.dense()) < 1e-9
    with pytest.raises(RuntimeError, match="vmap"):
        tep.EquilibriumPropagation(batching="vmap")(data_dependent, problem.z, problem.g)


def test_several_tensors_of_different_shapes():
    weight = contraction(10, 2)

    def joint(vector):
        return torch.tanh(weight @ vector + 0.2)

    def f(a, b):
        out = joint(torch.cat([a.flatten(), b.flatten()]))
        return [out[:6].reshape(2, 3), out[6:]]  # a list where a tuple went in

    vector = solve(joint, torch.zeros(10, dtype=torch.float64))
    g = torch.randn_like(vector)
    exact = torch.linalg.solve(torch.eye(10, dtype=torch.float64) - torch.func.jacrev(joint)(vector).T, g)
    state, cotangent = (vector[:6].reshape(2, 3), vector[6:]), (g[:6].reshape(2, 3), g[6:])
    for spelling in (f, lambda pair: f(*pair)):
        v = tep.get_backward("aep")(spelling, state, cotangent)
        assert isinstance(v, tuple)
        assert relative_error(torch.cat([part.flatten() for part in v]), exact) < 1e-9


def test_complex_states_are_pairs_of_reals():
    weight = torch.complex(contraction(4, 3), contraction(4, 4)) / 2

    def f(z):
        z = weight @ z + 0.3
        return torch.fft.ifft(torch.fft.fft(z)) / (1 + z.abs())  # not holomorphic, and need not be

    z = solve(f, torch.zeros(4, dtype=torch.complex128))
    g = torch.randn(4, dtype=torch.complex128)
    assert (
        relative_error(
            torch.view_as_real(tep.get_backward("aep")(f, z, g)),
            torch.view_as_real(tep.ImplicitDifferentiation(tol=1e-14)(f, z, g)),
        )
        < 1e-8
    )
    with pytest.raises(NotHolomorphicError):
        tep.get_backward("hep")(f, z, g)


def test_non_contiguous_values_and_in_place_code():
    weight = contraction(5, 0, 0.5)
    bias = torch.randn(5, dtype=torch.float64)

    def f(z):
        out = (weight @ z.T).T + bias
        return out.mul_(0.9).tanh_().T.contiguous().T

    z = solve(f, torch.zeros(3, 5, dtype=torch.float64))
    g = torch.randn_like(z)
    v = tep.get_backward("aep")(f, z, g)
    assert relative_error(v, tep.ImplicitDifferentiation()(f, z, g)) < 1e-8


# --- loss nudging ----------------------------------------------------------------------------------------------------


def _quartic_problem():
    problem = tanh_problem()
    target = torch.randn_like(problem.z)

    def loss(z):
        return ((z - target) ** 2).sum() + 0.3 * (z**4).sum()

    g = torch.func.grad(loss)(problem.z)
    return Problem(problem.f, problem.z, g, problem.jacobians), loss


@pytest.mark.parametrize(("stencil", "order"), [(tep.Stencil.one_sided, 1), (tep.Stencil.symmetric, 2)])
def test_loss_nudging_has_the_same_limit_and_order(stencil, order):
    problem, loss = _quartic_problem()
    limit = problem.dense()
    errors = [
        relative_error(
            report_of(tep.EquilibriumPropagation(stencil(beta), tol=1e-14), problem, loss)[0],
            limit,
        )
        for beta in (0.05, 0.025)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_loss_nudging_on_a_contour_uses_the_holomorphic_derivative():
    problem, loss = _quartic_problem()
    errors = [
        relative_error(
            report_of(tep.EquilibriumPropagation(tep.Stencil.contour(beta, 4), tol=1e-14), problem, loss)[0],
            problem.dense(),
        )
        for beta in (0.05, 0.025)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)


def test_loss_nudging_ignores_a_factor_and_notices_another_loss():
    problem, loss = _quartic_problem()
    v, _ = report_of(tep.EquilibriumPropagation(), problem, loss)
    scaled, _ = report_of(tep.EquilibriumPropagation(), problem, lambda z: 7 * loss(z))
    assert relative_error(scaled, v) < 1e-9
    with pytest.warns(LossMismatchWarning, match="another gradient"):
        report_of(tep.EquilibriumPropagation(), problem, lambda z: (z**2).sum())


# --- honesty ---------------------------------------------------------------------------------------------------------


def _expanding(gain=1.5):
    return tanh_problem(gain=gain, seed=1)


def test_a_linear_map_without_a_gradient_is_refused():
    # f(z + c) = f(z) + c, so I - J is singular and no error vector exists.
    centring = torch.eye(4, dtype=torch.float64) * 0.5 + 0.125

    def f(z):
        return z @ centring

    z = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(NudgeDivergedError, match=r"diverged.*solver='broyden'"):
        tep.EquilibriumPropagation()(f, z, torch.ones_like(z))


def test_divergence_shrinks_then_raises_or_falls_back():
    # Beyond z = -1.2 the map explodes; a large nudge gets there, a small one does not.
    def f(z):
        return 0.5 * z + 1e3 * torch.relu(z.abs() - 1.2).square() * z - 0.25

    z = torch.full((3,), -0.5, dtype=torch.float64)
    g = torch.ones_like(z)
    stencil = tep.Stencil.one_sided(0.9)
    problem = Problem(f, z, g, torch.full((1, 1, 1), 0.5))
    v, report = report_of(tep.EquilibriumPropagation(stencil), problem)
    assert report.retries >= 1
    assert report.beta == 0.9 / 2**report.retries
    assert relative_error(v, 2 * g) < 1e-9
    with pytest.raises(NudgeDivergedError, match="one-sided"):
        report_of(tep.EquilibriumPropagation(stencil, on_divergence="raise"), problem)
    with pytest.warns(FallbackWarning, match="implicit differentiation took over"):
        v, _ = report_of(tep.EquilibriumPropagation(stencil, on_divergence="ift"), problem)
    assert relative_error(v, 2 * g) < 1e-9


def test_a_metric_that_overflows_is_said():
    problem = tanh_problem(dtype=torch.float32)
    mode = tep.EquilibriumPropagation(metric=lambda z: torch.full_like(z, 1e30))
    with pytest.raises(NonFiniteError, match="times the metric"):
        mode(problem.f, problem.z, problem.g * 1e20)


def test_a_failed_nudge_may_be_accepted_as_it_is():
    problem = tanh_problem(gain=0.99)
    with pytest.raises(NudgeDivergedError):
        report_of(tep.EquilibriumPropagation("one-sided", max_iter=1, on_divergence="raise"), problem)
    with pytest.warns(ConvergenceWarning, match="accepted, although the one-sided nudge"):
        v, report = report_of(tep.EquilibriumPropagation("one-sided", max_iter=1, on_divergence="accept"), problem)
    assert report.residual > 0.1
    assert not report.converged
    one_step = tep.jacobian.jvp(problem.f, problem.z)(problem.g) + problem.g
    assert relative_error(v, one_step) < 1e-6


def test_running_out_of_steps_is_said():
    problem = tanh_problem(gain=0.99)
    with pytest.warns(ConvergenceWarning, match="Raise max_iter"):
        _, report = report_of(tep.EquilibriumPropagation(max_iter=4), problem)
    assert not report.converged
    assert report.residual > report.tol


@pytest.mark.parametrize("name", ["ift", "ep"])
def test_a_free_phase_that_never_converged_is_said(name):
    problem = tanh_problem()
    with pytest.warns(ConvergenceWarning, match="not an equilibrium"):
        tep.get_backward(name)(problem.f, problem.z + 0.1, problem.g)


def test_reported_residual_is_the_true_one():
    problem = tanh_problem()
    for solver in SOLVERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mode = tep.EquilibriumPropagation(tep.Stencil.one_sided(1e-4), solver=solver, max_iter=6)
            v, report = report_of(mode, problem)
        nudge = report.nudge
        step = (problem.f(problem.z + nudge * v) - problem.f(problem.z)) / nudge + problem.g
        true = float((step - v).norm() / problem.g.norm())
        assert true <= report.residual * (1 + 1e-6), solver  # the value is one step past the point it was judged at


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cotangents_that_are_not_finite(bad):
    problem = tanh_problem()
    g = problem.g.clone()
    g[0, 0] = bad
    for name in ("ift", "ep", "aep"):
        with pytest.raises(NonFiniteError, match="1 of 24 entries"):
            tep.get_backward(name)(problem.f, problem.z, g)
    with pytest.warns(FallbackWarning):
        v = tep.get_backward("ep", on_divergence="ift")(problem.f, problem.z, g)
    assert v.isnan().all()


def test_random_maps_are_refused():
    problem = tanh_problem()

    def noisy(z):
        return problem.f(z) + 1e-3 * torch.randn_like(z)

    for name in ("ep", "ep-one-sided"):
        with pytest.raises(StochasticMapError, match="VariationalDropout"):
            tep.get_backward(name)(noisy, problem.z, problem.g)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z: z[:1], "shape"),
        (lambda z: z.float(), "float32"),
        (lambda z: (z, z), "2 tensors"),
        (lambda z: None, "NoneType"),
    ],
)
def test_maps_that_do_not_return_a_state(f, message):
    problem = tanh_problem()
    with pytest.raises(MapContractError, match=message):
        tep.EquilibriumPropagation()(f, problem.z, problem.g)


def test_states_must_be_floating():
    with pytest.raises(MapContractError, match="int64"):
        tep.EquilibriumPropagation()(lambda z: z, torch.zeros(3, dtype=torch.int64), torch.zeros(3))


def test_maps_without_complex_arithmetic_are_refused():
    problem = tanh_problem()
    for f in (lambda z: torch.relu(z) * 0.5, lambda z: 0.5 * z.abs()):
        with pytest.raises(NotHolomorphicError, match="ep-richardson"):
            tep.get_backward("hep")(f, problem.z * 0, problem.g)


@pytest.mark.parametrize(
    "options",
    [
        {"tol": 0.0},
        {"tol": 2},
        {"max_iter": 0},
        {"max_iter": 2.5},
        {"solver": "andersen"},
        {"scale": "relativ"},
        {"schedule": "on-line"},
        {"batching": "stack"},
        {"on_divergence": "ignore"},
        {"metric": 3.0},
        {"correction": "symmetric"},
        {"stencil": "central"},
        {"stencil": 0.1},
    ],
)
def test_options_are_checked_at_construction(options):
    with pytest.raises(InvalidOptionError) as error:
        tep.EquilibriumPropagation(**options)
    assert isinstance(error.value, (EPError, ValueError))
    assert len(str(error.value)) > 20


def test_misspelt_choices_name_the_nearest():
    with pytest.raises(InvalidOptionError, match="Did you mean 'anderson'"):
        tep.EquilibriumPropagation(solver="andersen")
    with pytest.raises(InvalidOptionError, match="Did you mean 'relative'"):
        tep.EquilibriumPropagation(scale="relativ")


@pytest.mark.parametrize("metric", [lambda z: z * 0, lambda z: -z.abs() - 1, lambda z: z[0], lambda z: 1.0])
def test_metrics_must_be_positive_and_of_the_states_shape(metric):
    problem = tanh_problem()
    with pytest.raises(InvalidOptionError, match="metric"):
        tep.EquilibriumPropagation(metric=metric)(problem.f, problem.z, problem.g)


# --- modes as values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ift", "ep-one-sided", "ep", "ep-richardson", "hep", "hep-online", "aep"])
def test_modes_are_values(name):
    mode = tep.get_backward(name, tol=1e-3)
    assert pickle.loads(pickle.dumps(mode)) == mode == tep.get_backward(name, tol=1e-3)
    assert mode != tep.get_backward(name, tol=1e-4)


def test_online_averages_to_the_same_limit():
    problem = tanh_problem()
    v = tep.get_backward("hep-online", beta=0.05, schedule=tep.Online(steps=30, periods=3))(
        problem.f, problem.z, problem.g
    )
    assert relative_error(v, problem.dense()) < 1e-6


@pytest.mark.parametrize("n_points", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("beta", [0.1, 0.3, 0.6])
def test_contours_estimate_their_own_error(n_points, beta):
    problem = tanh_problem(gain=0.8)
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(beta, n_points), tol=1e-13)
    v, report = report_of(mode, problem)
    error = relative_error(v, problem.dense())
    assert error / 10 < report.truncation < 10 * error
    assert report.radius > 1


def test_contours_that_are_too_large_are_warned_about():
    problem = tanh_problem(gain=0.9)
    with pytest.warns(TruncationWarning, match="Use beta="):
        tep.get_backward("hep:beta=1.2")(problem.f, problem.z, problem.g)


# --- extreme sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ift", "ep-infinitesimal"])
@pytest.mark.parametrize("size", [1e3, 1.0, 1e-3])
def test_linear_modes_in_half_precision_do_not_depend_on_the_size_of_the_cotangent(name, size):
    problem = tanh_problem(16, (4,), seed=0, gain=0.5, dtype=torch.float16)
    unit = problem.g.double().norm()
    v = tep.get_backward(name)(problem.f, problem.z, (size * problem.g.double() / unit).half())
    reference = problem.dense(transpose=name == "ift") * (size / unit)
    assert relative_error(v.double(), reference) < 1e-2


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_a_nudge_below_the_rounding_of_the_state_is_refused(scale):
    z = torch.ones(3)
    mode = tep.EquilibriumPropagation(tep.Stencil.symmetric(1e-12), scale=scale)
    with pytest.raises(InvalidOptionError, match="lost in the rounding"):
        mode(lambda z: 0.5 * z + 0.5, z, torch.ones(3))


def test_the_message_of_a_retried_divergence_has_its_pointer_at_the_end():
    with pytest.raises(NudgeDivergedError) as caught:
        tep.EquilibriumPropagation(solver="plain")(lambda z: -3 * z + 0.1 * z**2, torch.zeros(4), torch.ones(4))
    assert "were tried." in caught.value.args[0]
    assert "More:" not in caught.value.args[0]


def test_the_map_may_return_a_buffer_that_it_overwrites():
    problem = tanh_problem(8, (2,), seed=3)
    buffer = torch.empty_like(problem.z)

    def into_the_buffer(z):
        return buffer.copy_(problem.f(z)) if not z.requires_grad else problem.f(z)

    for name in ("ep-one-sided", "ep", "ep-richardson"):
        v = tep.get_backward(name)(into_the_buffer, problem.z, problem.g)
        assert torch.equal(v, tep.get_backward(name)(problem.f, problem.z, problem.g))


def test_a_stack_of_nodes_solves_the_exact_limit_once(monkeypatch):
    problem = tanh_problem(8, (2,), seed=3)
    solves = []
    solve_limit = schedules.relax_linear
    monkeypatch.setattr(schedules, "relax_linear", lambda *args: solves.append(args) or solve_limit(*args))
    mode = tep.EquilibriumPropagation(tep.Stencil.richardson(), correction="asymmetric", batching="vmap")
    assert relative_error(mode(problem.f, problem.z, problem.g), problem.dense(transpose=True)) < 1e-8
    assert len(solves) == 1
