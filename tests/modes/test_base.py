"""What all modes have in common: error vectors against dense Jacobians, on maps of every kind."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import SOLVERS, contraction, relative_error, solve, tanh_problem

import torchdeq_ep as tep
from torchdeq_ep.errors import MapContractError, NotHolomorphicError, StochasticMapError


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


@pytest.mark.parametrize("factor", [1e-5, 1e-12, 1e8])
@pytest.mark.parametrize("name", ["ift", "ep", "aep", "ep-infinitesimal"])
@pytest.mark.parametrize("solver", [None, "fixed_point_iter", "anderson"])
def test_scale_of_the_loss_does_not_matter(factor, name, solver):
    problem = tanh_problem(dtype=torch.float32)
    mode = tep.get_backward(name, solver=solver)
    v = mode(problem.f, problem.z, problem.g)
    scaled = mode(problem.f, problem.z, factor * problem.g)
    assert relative_error(scaled / factor, v) < 1e-4


def test_zero_cotangent_gives_zeros_without_a_call():
    problem = tanh_problem()
    for name in tep.available_backwards():
        mode = tep.get_backward(name)
        v = mode(problem.f, problem.z, torch.zeros_like(problem.g))
        assert torch.equal(v, torch.zeros_like(v))


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


@pytest.mark.parametrize("name", ["ift", "ep-one-sided", "ep", "ep-richardson", "hep", "hep-online", "aep"])
def test_modes_are_values(name):
    mode = tep.get_backward(name, tol=1e-3)
    assert pickle.loads(pickle.dumps(mode)) == mode == tep.get_backward(name, tol=1e-3)
    assert mode != tep.get_backward(name, tol=1e-4)
