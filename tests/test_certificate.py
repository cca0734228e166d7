"""Every pass reports how far its gradient is off, and no wrong one is silent: cases in which something was assumed."""

import copy
import io
import math
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchdeq
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import torchdeq_ep as tep
from torchdeq_ep.errors import (
    AsymmetryWarning,
    EPWarning,
    HiddenDerivativeWarning,
    NoGradientWarning,
    TruncationWarning,
)
from torchdeq_ep.jacobian import dense_jacobian
from torchdeq_ep.state import relative_difference

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from certificate_draws import LARGE, WELL_POSED, draws

N, BATCH = 12, 4


def weight(gain=0.8, skew=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(N, N, generator=generator, dtype=torch.float64)
    matrix = (matrix + matrix.T) / 2 + skew * (matrix - matrix.T) / 2
    return (gain * matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype)


def drive(seed=1, dtype=torch.float64):
    return torch.randn(BATCH, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def settle(f, z, steps=300):
    with torch.no_grad():
        for _ in range(steps):
            z = f(z)
    return z


def attached(f, z, mode, cotangent, **options):
    """The error vector, the report, and the classes of the warnings."""
    shift, reports = torch.zeros_like(z, requires_grad=True), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tep.attach(lambda v: f(v) + shift, z, tep.get_backward(mode, **options), writer=reports.append).backward(
            cotangent
        )
    return shift.grad, reports[0], {w.category for w in caught if issubclass(w.category, EPWarning)}


class Model(nn.Module):
    """A switched DEQ over a map that tests choose."""

    def __init__(self, act=torch.tanh, skew=1.0, dtype=torch.float64, gain=0.8, **options):
        super().__init__()
        self.weight, self.drive, self.act = nn.Parameter(weight(gain, skew, dtype=dtype)), drive(dtype=dtype), act
        self.deq = torchdeq.get_deq(**{"f_max_iter": 200, "f_tol": 1e-10, "ift": True, **options})

    def f(self, z):
        return self.act(z @ self.weight.T + self.drive)

    def forward(self, _=None):
        return self.deq(self.f, torch.zeros_like(self.drive))[0][-1]


def loss(z):
    return (z * torch.linspace(-1, 1, N, dtype=z.dtype)).sum()


# --- the adjoint residual --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ep", "ep-one-sided:beta=0.5", "aep", "ift", "hep", "ep-infinitesimal"])
@pytest.mark.parametrize("seed", range(3))
def test_the_adjoint_residual_is_that_of_the_dense_jacobian(mode, seed):
    matrix, x = weight(seed=seed), drive(seed=seed + 10)
    f = lambda z: torch.tanh(z @ matrix.T + x)  # noqa: E731
    z, g = settle(f, torch.zeros_like(x)), drive(seed=seed + 20)
    v, report, _ = attached(f, z, mode, g)
    jacobian = dense_jacobian(f, z)
    exact = torch.linalg.solve(torch.eye(len(jacobian)) - jacobian.T, g.flatten())
    expected = ((v.flatten() - exact) - jacobian.T @ (v.flatten() - exact)).norm() / g.norm()
    assert report.adjoint_residual == pytest.approx(float(expected), rel=1e-3, abs=1e-12)


def test_it_is_the_asymmetry_times_the_error_vector():
    model = Model(act=lambda u: u, gain=0.9)
    with tep.use_backward(model, "ep") as handle, pytest.warns(AsymmetryWarning, match="Three ways on"):
        loss(model()).backward()
    symmetric = Model(act=lambda u: u, skew=0.0)
    with tep.use_backward(symmetric, "ep") as other:
        loss(symmetric()).backward()
    assert handle.last["deq"].adjoint_residual > 0.5
    assert other.last["deq"].adjoint_residual < 1e-6
    assert "in the mean" in handle.summary()


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_homeostasis_in_random_directions_is_not_advised_where_it_is_at_work(weight):
    model = Model(act=lambda u: u, gain=0.9)
    tep.use_backward(model, "ep")
    homeostasis = tep.register_homeostasis(model, weight=weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(102):
            (loss(model()) + homeostasis.penalty()).backward()
    told, *_ = [str(each.message) for each in caught if each.category is AsymmetryWarning]
    assert ("Three ways on" in told) == (weight == 0)
    assert ("has not removed it in 101 passes" in told) == (weight > 0)


@pytest.mark.parametrize("mode", ["ift", "aep"])
def test_modes_that_are_exact_say_nothing_of_asymmetry(mode):
    model = Model()
    with tep.use_backward(model, mode) as handle:
        loss(model()).backward()
    assert handle.last["deq"].adjoint_residual < 1e-6


def test_where_the_backward_pass_does_not_reach_the_state_it_is_not_a_number():
    model = Model(skew=0.0)
    with tep.use_backward(model, "ep") as handle:
        torch.autograd.grad(loss(model()), model.weight)
    assert math.isnan(handle.last["deq"].adjoint_residual)
    assert handle.last["deq"].converged


def test_it_can_be_switched_off_and_changes_no_gradient():
    gradients = []
    for certificate in (True, False):
        model = Model()
        with tep.use_backward(model, "aep", certificate=certificate) as handle:
            loss(model()).backward()
        gradients.append(model.weight.grad)
        assert math.isfinite(handle.last["deq"].adjoint_residual) == certificate
    assert torch.equal(*gradients)


@pytest.mark.parametrize("packed", [tuple, list])
def test_states_of_several_tensors_have_one(packed):
    matrix, x = weight(skew=0.0), drive().requires_grad_()
    half = N // 2

    def f(a, b):
        value = torch.cat([a, b], 1) @ matrix.T + x
        return packed([value[:, :half], value[:, half:]])

    state = packed([torch.zeros(BATCH, half, dtype=torch.float64)] * 2)
    for _ in range(300):
        state = packed([t.detach() for t in f(*state)])
    reports = []
    first, second = tep.attach(f, state, "ep", writer=reports.append)
    (first.sum() + second.square().sum()).backward()
    assert reports[0].adjoint_residual < 1e-6
    assert math.isfinite(reports[0].inconsistency)


def test_a_retained_graph_has_a_certificate_in_every_pass():
    x, reports = drive().requires_grad_(), []
    matrix = weight(skew=0.0)
    z = settle(lambda z: (z @ matrix.T + x).detach(), torch.zeros_like(x))
    attached_state = tep.attach(lambda z: z @ matrix.T + x, z, "ep", writer=reports.append)
    total = attached_state.sum()
    total.backward(retain_graph=True)
    total.backward()
    assert len(reports) == 2
    assert all(report.adjoint_residual < 1e-6 for report in reports)


def test_nothing_but_the_state_requires_a_gradient():
    matrix = weight()
    z = settle(lambda z: torch.tanh(z @ matrix.T), torch.ones(BATCH, N, dtype=torch.float64))
    assert not tep.attach(lambda z: torch.tanh(z @ matrix.T), z, "ep").requires_grad


# --- maps that cannot be recorded at a state that asks for a gradient ------------------------------------------------


class NoBackward(torch.autograd.Function):
    """A function that nobody wrote a backward for."""

    @staticmethod
    def forward(ctx, z):
        return z * 0.5

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("there is no backward here")


def numpy_half(z):
    return torch.from_numpy(0.5 * z.detach().numpy()) if z.requires_grad else torch.from_numpy(0.5 * z.numpy())


def writes(z):
    return z.mul_(1.0) * 0.5


def refuses(z):
    return torch.from_numpy(0.5 * z.numpy())


@pytest.mark.parametrize("inner", [NoBackward.apply, writes, refuses])
def test_they_are_recorded_as_before(inner):
    bias = torch.ones(3, dtype=torch.float64, requires_grad=True)
    f = lambda z: inner(z) + bias  # noqa: E731
    z = torch.full((2, 3), 2.0, dtype=torch.float64)
    reports = []
    tep.attach(f, z, "ep", writer=reports.append).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert math.isnan(reports[0].adjoint_residual)

    model = Model()
    model.f = lambda z: inner(z) + model.weight[0]
    with tep.use_backward(model, "ep") as handle:
        for _ in range(2):
            loss(model()).backward()
    assert math.isnan(handle.last["deq"].adjoint_residual)
    assert torch.isfinite(model.weight.grad).all()


def test_reentrant_checkpoints_work_where_no_input_required_a_gradient():
    model = Model(skew=0.0)
    model.f = lambda z: checkpoint(lambda z: torch.tanh(z @ model.weight.T + model.drive), z, use_reentrant=True)
    with tep.use_backward(model, "ep"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss(model()).backward()
    other = Model(skew=0.0)
    with tep.use_backward(other, "ep"):
        loss(other()).backward()
    assert relative_difference(model.weight.grad, other.weight.grad) < 1e-6


# --- a derivative that is hidden from autograd -----------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """A clipping whose backward pretends that there is none."""

    @staticmethod
    def forward(ctx, u):
        return u.clamp(-0.3, 0.3)

    @staticmethod
    def backward(ctx, g):
        return g


def with_no_grad(u):
    with torch.no_grad():
        part = 0.5 * torch.tanh(u)
    return 0.5 * torch.tanh(u) + part


HIDING = {
    "detach": lambda u: 0.5 * torch.tanh(u) + 0.5 * torch.tanh(u.detach()),
    "data": lambda u: 0.5 * torch.tanh(u) + 0.5 * torch.tanh(u.data),
    "no_grad": with_no_grad,
    "custom backward": Straight.apply,
    "NumPy": lambda u: 0.5 * torch.tanh(u) + 0.5 * torch.from_numpy(torch.tanh(u).detach().numpy()),
    "one block": lambda u: torch.tanh(torch.cat([u[:, :3].detach(), u[:, 3:]], 1)),
    "all of it": lambda u: torch.tanh(u.detach()) + 0 * u,
}


@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("mode", ["ep", "ift", "aep", "ep-infinitesimal"])
def test_a_hidden_derivative_is_said_once_and_by_which_the_mode_went(mode, hiding):
    model = Model(act=lambda u: hiding(u))
    with tep.use_backward(model, mode), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss(model()).backward()
    (said,) = [str(w.message) for w in caught if w.category is HiddenDerivativeWarning]
    expected = {"ep": "derivative of the values", "aep": "mixes the two"}.get(mode, "used autograd's")
    assert expected in said


@pytest.mark.parametrize("act", [torch.tanh, torch.relu, functional.gelu, functional.silu, torch.sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["ep", "ift", "aep"])
def test_nothing_hidden_is_not_said(mode, act, dtype):
    model = Model(act=act, dtype=dtype, f_tol=1e-5)
    with tep.use_backward(model, mode) as handle, warnings.catch_warnings():
        warnings.simplefilter("error", HiddenDerivativeWarning)
        warnings.simplefilter("ignore", AsymmetryWarning)
        loss(model()).backward()
    assert handle.last["deq"].inconsistency < 1e-2


def test_diagnose_begins_with_it():
    model = Model(act=HIDING["detach"])
    diagnosis = tep.diagnose(model, None, lambda model, _: loss(model()))
    assert diagnosis.advice[0].startswith("f hides a part of its derivative")
    assert "beta=" not in diagnosis.advice[0]


# --- rounding --------------------------------------------------------------------------------------------------------


def tf32(t):
    """Rounded to ten bits, as the products of a GPU round their factors; with a derivative."""
    bits = (t.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return t + (bits.view(torch.float32) - t).detach()


def inside_bfloat16(u):
    return torch.tanh(u.bfloat16()).float()


@pytest.mark.parametrize(("mode", "largest"), [("ep", 3e-3), ("ep-one-sided", 3e-2), ("ep-richardson", 3e-3)])
@pytest.mark.parametrize("seed", range(3))
def test_products_in_tf32_are_found_and_nudged_further(mode, largest, seed):
    matrix, x = weight(seed=seed, dtype=torch.float32), drive(seed=seed + 5, dtype=torch.float32)
    f = lambda z: torch.tanh(tf32(z) @ tf32(matrix).T + x)  # noqa: E731
    z, g = settle(f, torch.zeros_like(x)), drive(seed=seed + 9, dtype=torch.float32)
    v, report, _ = attached(f, z, mode, g)
    jacobian = dense_jacobian(lambda z: torch.tanh(z @ matrix.double().T + x.double()), z.double())
    limit = torch.linalg.solve(torch.eye(len(jacobian)) - jacobian, g.double().flatten())
    assert 1e-5 < report.rounding < 1e-3
    assert relative_difference(v.double().flatten(), limit) < largest


def test_a_map_that_computes_in_bfloat16_inside_is_found():
    model = Model(act=inside_bfloat16, dtype=torch.float32, f_tol=1e-3)
    with tep.use_backward(model, "ep") as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", EPWarning)
        loss(model()).backward()
    assert 3e-4 < handle.last["deq"].rounding < 1e-2


def test_rounding_is_measured_once_for_each_precision():
    model, calls = Model(dtype=torch.float32, f_tol=1e-5, skew=0.0), []
    with tep.use_backward(model, "ep") as handle:
        for precision in ("highest", "highest", "high", "high"):
            torch.set_float32_matmul_precision(precision)
            loss(model()).backward()
            calls.append(handle.last["deq"].calls)
        torch.set_float32_matmul_precision("highest")
        assert len(handle.state_dict()["deq"]["rounding"]) == 2
    assert calls[1] < calls[0]


# --- amplitudes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_points", [4, 6, 8])
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_contour_beyond_its_radius_is_said_or_right(n_points, beta, dtype):
    matrix, x = weight(gain=0.9, dtype=dtype), drive(dtype=dtype)
    f = lambda z: torch.sigmoid(4 * (z @ matrix.T + x))  # noqa: E731
    z, g = settle(f, torch.zeros_like(x)), drive(seed=3, dtype=dtype)
    v, report, said = attached(f, z, f"hep:n_points={n_points}", g, beta=beta)
    jacobian = dense_jacobian(f, z)
    limit = torch.linalg.solve(torch.eye(len(jacobian), dtype=dtype) - jacobian, g.flatten())
    error = relative_difference(v.flatten(), limit)
    assert report.nudge_error == pytest.approx(error, rel=1.0, abs=1e-4)
    assert TruncationWarning in said or error < 0.05


def test_the_automatic_amplitude_of_a_contour_is_as_good_as_any():
    norm, gain = nn.GroupNorm(2, 8), torch.randn(8, 8) * 0.25
    x = torch.randn(2, 8, 3)
    f = lambda z: norm(functional.silu(torch.einsum("ij,bjk->bik", gain, z)) + x)  # noqa: E731
    z, g = settle(f, torch.zeros_like(x)), torch.randn_like(x)
    jacobian = dense_jacobian(f, z).double()
    limit = torch.linalg.solve(torch.eye(len(jacobian)) - jacobian, g.double().flatten())
    errors = {
        beta: relative_difference(attached(f, z, "hep:n_points=6", g, beta=beta)[0].double().flatten(), limit)
        for beta in ("auto", 0.1, 0.05, 0.02)
    }
    assert errors["auto"] < max(3 * min(errors.values()), 2e-5)


@pytest.mark.parametrize("mode", ["ep", "aep", "ep-one-sided"])
@pytest.mark.parametrize("seed", range(4))
def test_kinks_are_measured(mode, seed):
    """Four hundred units next to their kinks, which any nudge crosses: even then the number is within a factor of 6."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(400, N, generator=generator, dtype=torch.float64)
    down = torch.randn(N, 400, generator=generator, dtype=torch.float64)
    scale = 0.7 / torch.linalg.matrix_norm(down @ up, 2)
    x = drive(seed=seed)
    near = 1e-3 * torch.randn(400, generator=generator, dtype=torch.float64)
    pivot = torch.zeros_like(x)
    f = lambda z: x + scale * torch.relu((z - pivot) @ up.T + near) @ down.T  # noqa: E731
    pivot = settle(f, pivot, 1)
    z = settle(f, torch.zeros_like(x), 500)
    g = drive(seed=seed + 7)
    low = lambda t: t.float()  # noqa: E731
    f32 = lambda z: low(x) + float(scale) * torch.relu((z - low(pivot)) @ low(up).T + low(near)) @ low(down).T  # noqa: E731
    v, report, _ = attached(f32, low(z), mode, low(g))
    jacobian = dense_jacobian(f, z)
    system = torch.eye(len(jacobian)) - (jacobian.T if mode == "aep" else jacobian)
    left = float((system @ v.double().flatten() - g.flatten()).norm() / g.norm())
    assert left < 6 * math.hypot(report.nudge_error, report.residual)


def test_an_amplitude_that_was_too_large_is_remembered():
    # A corner that the default nudge of float32 crosses, next to the equilibrium.
    def f(z):
        return 0.5 * z + 0.3 * torch.relu(z - 1e-3) + bias

    bias = torch.tensor([0.0, 1.0], requires_grad=True)
    model = Model(dtype=torch.float32)
    model.f = lambda z: f(z) + 0 * model.weight[:BATCH].sum()
    model.drive = torch.zeros(BATCH, 2)
    with tep.use_backward(model, "ep") as handle:
        for _ in range(3):
            (model() * torch.tensor([1.0, 0.5])).sum().backward()
    assert handle.state_dict()["deq"]["refinement"] > 1
    assert handle.last["deq"].nudge_error < 0.01


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_the_memory_of_a_handle_is_plain_and_makes_a_resumed_run_the_same():
    def run(steps, state=None, weights=None):
        model = Model(dtype=torch.float32, f_tol=1e-5)
        if weights is not None:
            model.load_state_dict(weights)
        reports = []
        with tep.use_backward(model, "ep") as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore", AsymmetryWarning)
            if state is not None:
                handle.load_state_dict(state)
            for _ in range(steps):
                model.weight.grad = None
                loss(model()).backward()
                with torch.no_grad():
                    model.weight -= 0.01 * model.weight.grad
                reports.append(handle.last["deq"].calls)
            return reports, handle.state_dict(), model.state_dict()

    whole, _, end = run(6)
    first, state, weights = run(3)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    second, _, other_end = run(3, torch.load(buffer, weights_only=True), weights)
    assert first + second == whole
    assert torch.equal(end["weight"], other_end["weight"])


def test_a_state_of_another_model_is_refused():
    model = Model()
    handle = tep.use_backward(model, "ep")
    with pytest.raises(tep.errors.InvalidOptionError, match="DEQs"):
        handle.load_state_dict({"other": {}})
    with pytest.raises(tep.errors.InvalidOptionError, match="remembers"):
        handle.load_state_dict({"deq": {"passes": 1}})


def test_switched_models_survive_with_their_hook():
    model = Model(skew=0.0)
    handle = tep.use_backward(model, "ep")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        loss(twin()).backward()
    handle.remove()
    assert not model.deq._forward_hooks


# --- evaluation, and samples that are lost ---------------------------------------------------------------------------


def test_evaluation_with_autograd_on_trains_nothing_and_says_so_once():
    model = Model()
    with tep.use_backward(model, "ep"):
        model.eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model()
        assert [w.category for w in caught] == [NoGradientWarning]
        with torch.no_grad():
            model()
    quiet = Model().requires_grad_(False).eval()
    with tep.use_backward(quiet, "ep"):
        quiet()


def test_samples_whose_cotangents_are_lost_beside_the_others_are_counted():
    matrix, x = weight(skew=0.0, dtype=torch.float32), drive(dtype=torch.float32)
    f = lambda z: torch.tanh(z @ matrix.T + x)  # noqa: E731
    z, g = settle(f, torch.zeros_like(x)), drive(seed=2, dtype=torch.float32)
    sizes = torch.tensor([1.0, 1e-1, 1e-6, 1e-7]).unsqueeze(1)
    assert attached(f, z, "ep", g)[1].rows_lost == 0
    assert attached(f, z, "ep", g * sizes)[1].rows_lost == 2


# --- over random maps ------------------------------------------------------------------------------------------------


def test_no_wrong_error_vector_is_silent_and_few_right_ones_are_warned_about():
    """`make certificate` draws more, and has the figures."""
    found = [draw for draw in draws(150, seed=11) if draw.smallest >= WELL_POSED]
    assert not [draw for draw in found if draw.is_silent]
    assert sum(draw.is_false_alarm for draw in found) <= 3
    assert sum(draw.error < 0.01 for draw in found) > 50
    assert any(draw.error > LARGE for draw in found)  # or the first could not fail
