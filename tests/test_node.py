"""`attach`: the gradient of any implicit layer, and the ways in which a layer can break its promise."""

import copy
import math
import threading
from typing import NamedTuple

import pytest
import torch
from problems import contraction, relative_error, solve
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import (
    DoubleBackwardError,
    MapChangedError,
    MapContractError,
    NonFiniteError,
    StochasticMapError,
    UnknownBackwardError,
)


def _layer(weight, x, backward):
    """`z = tanh(W z + x)`, solved to rounding error and attached."""

    def f(z):
        return torch.tanh(z @ weight.T + x)

    return tep.attach(f, solve(f, torch.zeros_like(x)), backward=backward)


def _parameters(n=4, batch=3, **options):
    weight = contraction(n, 0, 0.5, **options).requires_grad_()
    x = torch.randn(batch, n, dtype=torch.float64, requires_grad=True)
    return weight, x


# --- right gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["aep", "ift", tep.InfinitesimalEP(correction="asymmetric")])
def test_gradcheck_of_exact_modes(backward):
    assert torch.autograd.gradcheck(lambda w, x: _layer(w, x, backward), _parameters())


def _energy_layer(root, x, backward):
    """Descent on `|z|^2 / 2 - log cosh(W z) - x z` with symmetric `W`: the Jacobian is symmetric."""
    weight = 0.5 * (root + root.T)

    def f(z):
        return 0.5 * z + 0.5 * (torch.tanh(z @ weight) @ weight + x)

    return tep.attach(f, solve(f, torch.zeros_like(x)), backward=backward)


@pytest.mark.parametrize("backward", ["ep", "ep-richardson", "ep-infinitesimal"])
def test_gradcheck_of_ep_on_an_energy_based_map(backward):
    assert torch.autograd.gradcheck(lambda w, x: _energy_layer(w, x, backward), _parameters())


def test_gradcheck_of_ep_with_the_metric_of_the_activation():
    def layer(root, x):
        weight = 0.5 * (root + root.T)
        mode = tep.EquilibriumPropagation(metric=lambda z: 1 - z**2)
        return _layer(weight, x, mode)

    assert torch.autograd.gradcheck(layer, _parameters(symmetric=True))


def test_ep_on_an_asymmetric_map_is_biased():
    weight, x = _parameters()
    with pytest.raises(torch.autograd.gradcheck.__globals__["GradcheckError"]):
        torch.autograd.gradcheck(lambda w, x: _layer(w, x, "ep"), (weight, x))


def test_two_coupled_tensors_of_different_shapes():
    weight, x = contraction(7, 0, 0.5).requires_grad_(), torch.randn(7, dtype=torch.float64, requires_grad=True)

    def f(a, b):
        out = torch.tanh(weight @ torch.cat([a.flatten(), b]) + x)
        return out[:4].reshape(2, 2), out[4:]

    def layer(weight_, x_):
        vector = solve(lambda v: torch.tanh(weight_ @ v + x_), torch.zeros(7, dtype=torch.float64))

        def f(a, b):
            out = torch.tanh(weight_ @ torch.cat([a.flatten(), b]) + x_)
            return out[:4].reshape(2, 2), out[4:]

        return tep.attach(f, (vector[:4].reshape(2, 2), vector[4:]), backward="aep")

    assert torch.autograd.gradcheck(layer, (weight, x))
    state = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    attached = tep.attach(f, state)
    assert isinstance(attached, list)
    assert [t.shape for t in attached] == [t.shape for t in state]


def test_complex_states():
    weight = (torch.randn(3, 3, dtype=torch.complex128) / 5).requires_grad_()
    x = torch.randn(3, dtype=torch.complex128, requires_grad=True)

    def layer(weight, x):
        def f(z):
            return torch.fft.ifft(torch.fft.fft(weight @ z) / (1 + 0.1 * x.abs())) + x

        return tep.attach(f, solve(f, torch.zeros(3, dtype=torch.complex128)), backward="aep")

    assert torch.autograd.gradcheck(layer, (weight, x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize(("backward", "transpose"), [("ift", True), ("aep", True), ("ep-infinitesimal", False)])
def test_a_complex_tensor_behind_an_odd_number_of_real_entries(dtype, tolerance, backward, transpose):
    slope = torch.tensor([0.4], dtype=dtype, requires_grad=True)
    weight = (torch.randn(2, 2, dtype=dtype.to_complex()) / 4).requires_grad_()

    def f(a, b):
        return torch.tanh(slope * a + 0.1 * b.real.sum()) + 0.5, (0.5 * b @ weight + a).conj()

    def of_vector(v):
        a, b = f(v[:1], torch.complex(v[1::2], v[2::2]))
        return torch.cat([a, b[0].real[None], b[0].imag[None], b[1].real[None], b[1].imag[None]])

    vector = solve(of_vector, torch.zeros(5, dtype=dtype))
    a, b = tep.attach(f, [vector[:1], torch.complex(vector[1::2], vector[2::2])], backward=backward)
    found = torch.autograd.grad(2 * a.sum() + b.abs().square().sum(), (slope, weight))

    jacobian = torch.autograd.functional.jacobian(of_vector, vector)
    cotangent = torch.cat([torch.full((1,), 2.0, dtype=dtype), 2 * vector[1:]])
    adjoint = torch.linalg.solve(torch.eye(5, dtype=dtype) - (jacobian.T if transpose else jacobian), cotangent)
    expected = torch.autograd.grad(of_vector(vector), (slope, weight), adjoint)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance


def test_batch_of_one_number():
    slope, x = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z = solve(lambda z: slope * torch.sin(z) + x, torch.tensor(0.0, dtype=torch.float64))
    tep.attach(lambda z: slope * torch.sin(z) + x, z).backward()
    assert float(x.grad) == pytest.approx(1 / (1 - 0.3 * math.cos(float(z))), rel=1e-8)


def test_values_are_those_of_the_fixed_point_bit_for_bit():
    z = torch.randn(3, 4)
    weight = torch.randn(4, 4, requires_grad=True)
    attached = tep.attach(lambda z: torch.tanh(z @ weight) * 0.3, z)
    assert torch.equal(attached, z)
    attached.detach().add_(1.0)
    assert not torch.equal(attached, z)  # a copy: writing into it leaves the solver's state alone


def test_without_autograd_it_returns_the_state():
    z = torch.randn(3)
    with torch.no_grad():
        assert tep.attach(lambda z: z, z) is z
    assert not tep.attach(lambda z: z * 0.5, z).requires_grad


@pytest.mark.parametrize("backward", ["ift", "ep", "hep", "ep-infinitesimal", "aep"])
@pytest.mark.parametrize("size", [1e-18, 1e20, 1e30])
def test_the_gradient_is_proportional_to_the_loss_whatever_its_size(backward, size):
    weight = contraction(6, 0, 0.8).float()
    x = torch.randn(3, 6, requires_grad=True)
    gradients = []
    for factor in (1.0, size):
        loss = factor * _layer(weight, x, backward).square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0] / factor)
    assert relative_error(gradients[1], gradients[0]) < 2e-5


@pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.PrecisionWarning")
@pytest.mark.parametrize("backward", ["ift", "ep", "ep-infinitesimal"])
def test_a_state_in_half_precision_whose_norm_is_beyond_it(backward):
    x = torch.linspace(1e4, 2e4, 64).half().requires_grad_()

    def f(z):
        return 0.5 * z + x

    z = tep.attach(f, 2 * x.detach(), backward=backward)
    (gradient,) = torch.autograd.grad(z, x, torch.ones_like(z))
    assert gradient.float().tolist() == pytest.approx([2.0] * 64, rel=2e-2)


def test_accumulation_and_retain_graph():
    weight, x = _parameters()
    z = _layer(weight, x, "ep")
    loss = (z**2).sum()
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert torch.allclose(weight.grad, 2 * once, rtol=1e-12)


def test_the_state_may_be_used_several_times():
    weight, x = _parameters()
    z = _layer(weight, x, "aep")
    regulariser = (
        z.pow(4).mean()
        + torch.autograd.grad(torch.tanh(z @ weight.detach().T).sum(), z, create_graph=True)[0].pow(2).sum()
    )
    (z.sum() + regulariser).backward()
    got = weight.grad.clone()
    weight.grad = None
    z = _layer(weight, x, "ift")
    regulariser = (
        z.pow(4).mean()
        + torch.autograd.grad(torch.tanh(z @ weight.detach().T).sum(), z, create_graph=True)[0].pow(2).sum()
    )
    (z.sum() + regulariser).backward()
    assert relative_error(got, weight.grad) < 1e-8


def test_a_callable_is_a_backward():
    weight, x = _parameters()

    def jacobian_free(f, z, g):
        return g

    z = _layer(weight, x, jacobian_free)
    z.sum().backward()
    slope = 1 - z.detach() ** 2
    assert torch.allclose(x.grad, slope)


def test_a_callable_that_returns_nonsense_is_refused():
    weight, x = _parameters()
    with pytest.raises(MapContractError, match="must return a tensor of shape"):
        _layer(weight, x, lambda f, z, g: g[0]).sum().backward()
    assert weight.grad is None


def test_writer_receives_the_report():
    weight, x = _parameters()
    reports = []

    def f(z):
        return torch.tanh(z @ weight.T + x)

    tep.attach(f, solve(f, torch.zeros_like(x)), "ep:beta=0.01", writer=reports.append).sum().backward()
    assert [report.beta for report in reports] == [0.01]
    assert reports[0].converged


# --- modes of evaluation ---------------------------------------------------------------------------------------------


def test_batch_norm_in_train_mode():
    norm, linear = nn.BatchNorm1d(6).double(), nn.Linear(6, 6).double()
    x = torch.randn(16, 6, dtype=torch.float64)

    def f(z):
        return torch.tanh(0.3 * norm(linear(z)) + x)

    z = solve(f, torch.zeros(16, 6, dtype=torch.float64), steps=60)
    gradients = {}
    for backward in ("aep", "ift", "ep-infinitesimal"):
        attached = tep.attach(f, z, backward)
        before = copy.deepcopy(dict(norm.named_buffers()))
        attached.pow(2).sum().backward()
        assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
        gradients[backward] = linear.weight.grad.clone()
        linear.weight.grad = None
    assert relative_error(gradients["aep"], gradients["ift"]) < 1e-7
    assert relative_error(gradients["ep-infinitesimal"], gradients["ift"]) > 1e-6


@pytest.mark.parametrize("inject_in_autocast", [True, False])
def test_autocast(inject_in_autocast):
    torch.manual_seed(1)
    linear, inject = nn.Linear(16, 16), nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight.copy_(contraction(16, 0, 0.5))
    x = torch.randn(8, 16)

    def gradient(dtype, backward):
        linear.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            injected = inject(x) if inject_in_autocast else x

            def f(z):
                return torch.tanh(linear(z) + injected)

            z = solve(f, torch.zeros(8, 16), steps=40).float()
            attached = tep.attach(f, z, backward)
            loss = attached.float().pow(2).sum()
        loss.backward()
        return linear.weight.grad.clone()

    reference = gradient(torch.float32, "ift")
    assert relative_error(gradient(torch.bfloat16, "aep"), reference) < 0.02
    assert relative_error(gradient(torch.bfloat16, "ift"), reference) < 0.02


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
def test_compiled_map():
    linear = nn.Linear(5, 5).double()
    with torch.no_grad():
        linear.weight.mul_(0.3)
    compiled = torch.compile(nn.Sequential(linear, nn.Tanh()), backend="eager")
    z = solve(compiled, torch.zeros(3, 5, dtype=torch.float64), steps=60)
    tep.attach(compiled, z, "aep").pow(2).sum().backward()
    got = linear.weight.grad.clone()
    linear.weight.grad = None
    tep.attach(nn.Sequential(linear, nn.Tanh()), z, "ift").pow(2).sum().backward()
    assert relative_error(got, linear.weight.grad) < 1e-8


def test_two_threads_do_not_disturb_each_other():
    expected, got = {}, {}

    def train(seed, store):
        weight, x = contraction(6, seed, 0.6).requires_grad_(), torch.ones(4, 6, dtype=torch.float64)
        for _ in range(20):
            z = _layer(weight, x, "ep" if seed else "aep")
            (gradient,) = torch.autograd.grad(z.pow(2).sum(), weight)
            weight = (weight - 0.01 * gradient).detach().requires_grad_()
        store[seed] = weight.detach()

    for seed in (0, 1):
        train(seed, expected)
    threads = [threading.Thread(target=train, args=(seed, got)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], expected[seed]) for seed in (0, 1))


# --- broken promises -------------------------------------------------------------------------------------------------


def test_a_map_that_changed_is_refused():
    weight, x = _parameters()
    z = _layer(weight, x, "ep")
    with torch.no_grad():
        x.data.add_(0.01)  # behind autograd's back, as an optimiser's foreach step or a reset does
    with pytest.raises(MapChangedError, match="Call backward"):
        z.sum().backward()
    assert weight.grad is None


def test_a_random_map_is_refused():
    weight, _ = _parameters()
    with pytest.raises(StochasticMapError, match="different answers"):
        tep.attach(
            lambda z: torch.tanh(z @ weight.T) * 0.1 + 0.01 * torch.randn_like(z),
            torch.zeros(3, 4, dtype=torch.float64),
        ).sum().backward()
    assert weight.grad is None


def test_not_a_number_never_reaches_a_parameter():
    weight, x = _parameters()
    z = _layer(weight, x, "ep")
    with pytest.raises(NonFiniteError, match="cotangent"):
        (z.sum() * math.nan).backward()
    assert weight.grad is None


def test_second_derivatives_are_refused():
    weight, x = _parameters()
    z = _layer(weight, x, "ep")
    (gradient,) = torch.autograd.grad(z.pow(2).sum(), weight, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="first one only"):
        gradient.pow(2).sum().backward()


def test_first_derivatives_with_create_graph_are_fine():
    weight, x = _parameters()
    (with_graph,) = torch.autograd.grad(_layer(weight, x, "ep").pow(2).sum(), weight, create_graph=True)
    (without,) = torch.autograd.grad(_layer(weight, x, "ep").pow(2).sum(), weight)
    assert torch.equal(with_graph.detach(), without)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z, w: (z @ w)[:, :2], "shape"),
        (lambda z, w: (z @ w).float(), "float32"),
        (lambda z, w: [z @ w, z], "2 tensors"),
    ],
)
def test_maps_that_break_the_contract_fail_in_the_forward_pass(f, message):
    weight, x = _parameters()
    with pytest.raises(MapContractError, match=message):
        tep.attach(lambda z: f(z, weight), x.detach())


def test_unknown_mode_fails_in_the_forward_pass():
    with pytest.raises(UnknownBackwardError, match="Did you mean 'ep-richardson'"):
        tep.attach(lambda z: z, torch.zeros(2), backward="ep-richardsen")


class _Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize("by_one_argument", [False, True])
def test_a_namedtuple_comes_back_as_one(by_one_argument):
    weight = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)

    def f(a, b):
        return _Pair(0.5 * torch.tanh(b) + weight, 0.5 * torch.tanh(a))

    state = _Pair(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    with torch.no_grad():
        for _ in range(100):
            state = f(*state)
    attached = tep.attach((lambda pair: f(*pair)) if by_one_argument else f, state, "ift")
    assert type(attached) is _Pair
    attached.a.sum().backward()
    assert weight.grad.norm() > 0


@pytest.mark.parametrize("state", [None, 1.0, (t for t in [torch.zeros(2)]), {"z": torch.zeros(2)}, {}, "z"])
def test_what_is_no_state_is_refused_by_name(state):
    with pytest.raises(MapContractError, match="a state is a tensor, or a tuple or list of tensors"):
        tep.attach(lambda z: z, state)
