"""The nudged map, at real and complex nodes, of maps and models that were written for real numbers."""

import copy
import re

import pytest
import torch
import torchdeq
from problems import DRIVE, WEIGHT, analytic_problem, contraction, relative_error, solve, tanh_problem
from torch import nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep import holomorphic
from torchdeq_ep.errors import NotHolomorphicError
from torchdeq_ep.state.equilibrium import Equilibrium


@pytest.mark.parametrize("mode", [tep.EquilibriumPropagation, tep.InfinitesimalEP])
def test_asymmetric_correction_is_exact_under_any_metric(mode):
    problem = tanh_problem(seed=6)
    metric = torch.rand_like(problem.z) + 0.5
    v = mode(metric=lambda _: metric, correction="asymmetric")(problem.f, problem.z, problem.g)
    assert relative_error(v, problem.dense(transpose=True)) < 1e-9


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


def test_maps_without_complex_arithmetic_are_refused():
    problem = tanh_problem()
    for f in (lambda z: torch.relu(z) * 0.5, lambda z: 0.5 * z.abs()):
        with pytest.raises(NotHolomorphicError, match="ep-richardson"):
            tep.get_backward("hep")(f, problem.z * 0, problem.g)


def test_the_map_may_return_a_buffer_that_it_overwrites():
    problem = tanh_problem(8, (2,), seed=3)
    buffer = torch.empty_like(problem.z)

    def into_the_buffer(z):
        return buffer.copy_(problem.f(z)) if not z.requires_grad else problem.f(z)

    for name in ("ep-one-sided", "ep", "ep-richardson"):
        v = tep.get_backward(name)(into_the_buffer, problem.z, problem.g)
        assert torch.equal(v, tep.get_backward(name)(problem.f, problem.z, problem.g))


@pytest.mark.parametrize("solver", [None, "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_complex_nodes_reach_every_solver(solver):
    f, z, g, limit = analytic_problem("tanh")
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(0.05, 6), solver=solver)
    assert relative_error(mode(f, z, g), limit) < 1e-7


def test_real_nodes_stay_in_real_arithmetic():
    f, z, g, _ = analytic_problem("tanh")
    dtypes = []

    def watched(z):
        dtypes.append(z.dtype)
        return f(z)

    tep.EquilibriumPropagation(tep.Stencil.contour(0.05, 4), batching="loop")(watched, z, g)
    value_at_rest, *nudged = dtypes
    assert value_at_rest == torch.float64
    assert nudged[0] == torch.float64
    assert torch.complex128 in nudged
    assert nudged[-1] == torch.float64  # at which the estimate is checked


# --- a model that has never heard of this package --------------------------------------------------------------------


class Block(nn.Module):
    """Convolution, group norm, attention and a feed-forward part, out of `torch.nn`."""

    def __init__(self, norm_first):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        self.linear = nn.Linear(8, 8)

    def forward(self, z, x):
        h = functional.silu(self.norm(self.conv(z)) + x)
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = self.linear(self.layer(tokens))
        return 0.15 * torch.tanh(tokens).transpose(1, 2).reshape(z.shape) + 0.3 * x


class Model(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(1, 8, 3, padding=1), Block(norm_first), nn.Linear(8, 4)
        self.deq = torchdeq.get_deq(f_max_iter=60, f_tol=1e-6)

    def forward(self, inputs):
        x = self.stem(inputs)
        (z,), _ = self.deq(lambda z: self.block(z, x), torch.zeros_like(x))
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_unmodified_model_trains_with_complex_nudges(norm_first):
    torch.manual_seed(0)
    model, inputs, targets = Model(norm_first), torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradient(backward, **options):
        with tep.use_backward(model, backward, **options):
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    before = copy.deepcopy(model.state_dict())
    loss, got = gradient("hep:n_points=6")
    _, reference = gradient("ep-infinitesimal")
    assert relative_error(got, reference) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gradient("hep")
    optimiser.step()
    assert gradient("hep")[0] < loss


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_keeps_its_statistics(training):
    norm = nn.BatchNorm1d(12).double().train(training)
    x = torch.randn(8, 12, dtype=torch.float64)

    def f(z):
        return 0.3 * torch.tanh(norm(z @ WEIGHT.T + x)) + x

    z = solve(f, torch.zeros(8, 12, dtype=torch.float64))
    before = copy.deepcopy(norm.state_dict())
    g = torch.randn_like(z)
    v = tep.get_backward("hep:n_points=6")(f, z, g)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert relative_error(v, tep.InfinitesimalEP()(f, z, g)) < 1e-8


# --- refusals --------------------------------------------------------------------------------------------------------


class Refused(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.linear, self.operation = nn.Linear(6, 6), operation
        self.register_buffer("store", torch.zeros(2, 6))

    def forward(self, z):
        return 0.3 * self.operation(self, self.linear(z))


def _into_a_buffer(module, h):
    module.store[:] = h
    return module.store * 0.5


REFUSALS = {
    "relu": (lambda module, h: torch.relu(h), "relu"),
    "max_pool1d": (lambda module, h: functional.max_pool1d(h, 3, stride=1, padding=1), "max_pool1d"),
    "abs": (lambda module, h: h.abs(), "abs"),
    "real": (lambda module, h: h.real + 0 * h, "real"),
    "buffer": (_into_a_buffer, "real tensor"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_analytic_is_refused_by_name_module_and_line(name):
    operation, word = REFUSALS[name]
    torch.manual_seed(0)
    module = Refused(operation)
    z = solve(module, torch.zeros(2, 6))
    before = copy.deepcopy(module.state_dict())
    calls = 0

    def f(state):
        nonlocal calls
        calls += state.is_complex()
        return module(state)

    with pytest.raises(NotHolomorphicError) as error:
        tep.get_backward("hep:batching=loop")(f, z, torch.ones_like(z))
    assert word in str(error.value)
    assert "Refused" in str(error.value)
    assert "test_nudged_map.py:" in str(error.value)
    assert "ep-richardson" in str(error.value)
    assert calls <= 1
    for key, value in module.state_dict().items():
        if name != "buffer" or key != "store":  # the map's own real evaluations write there
            assert torch.equal(value, before[key])


def test_piecewise_maps_can_be_allowed_and_are_watched():
    weight = contraction(12, 3, 0.5)

    def f(z):
        return functional.leaky_relu(z @ weight.T + DRIVE, 0.1)

    z = solve(f, torch.zeros(2, 12, dtype=torch.float64))
    g = torch.randn_like(z)
    limit = tep.InfinitesimalEP()(f, z, g)
    with pytest.raises(NotHolomorphicError, match="piecewise"):
        tep.get_backward("hep")(f, z, g)
    mode = tep.get_backward("hep:beta=0.001,piecewise=real-part")
    v, report = mode.solve(Equilibrium(f, z, f(z), g, 2.2e-16))
    (crossing,) = {crossing.operation: crossing for crossing in report.crossings}.values()
    assert crossing.operation == "leaky_relu"
    assert crossing.units > 0
    assert crossing.crossed == 0
    assert relative_error(v, limit) < 1e-9  # piecewise linear, and no unit crosses: exact at any amplitude
    wide = tep.get_backward("hep:beta=1,piecewise=real-part").solve(Equilibrium(f, z, f(z), g, 2.2e-16))
    assert sum(crossing.crossed for crossing in wide[1].crossings) > 0


def test_error_comes_within_one_call_of_the_backward_mode():
    calls = 0

    def f(z):
        nonlocal calls
        calls += z.is_complex()
        return 0.5 * torch.relu(z) + 0.5

    mode = tep.EquilibriumPropagation(tep.Stencil.contour(0.1, 4), batching="loop")
    with pytest.raises(NotHolomorphicError, match="relu"):
        mode(holomorphic.holomorphic_map(f), torch.ones(3), torch.ones(3))
    assert calls == 1


# --- code for real states, at complex ones ---------------------------------------------------------------------------


_ADVICE = "the state must be real. Convert it: z.to(torch.float64)."


def _asserting(z):
    assert z.dtype == torch.float64
    return 0.5 * z


def _looking_up(z):
    return {torch.float64: 0.5}[z.dtype] * z


def _checking(z):
    if z.dtype != torch.float64:
        raise ValueError(_ADVICE)
    return 0.5 * z


_RECURRENT = {name: getattr(torch.nn, name)(4, 4, batch_first=True).double() for name in ("LSTM", "GRU", "RNN")}
REAL_ONLY = {"assertion": _asserting, "look-up": _looking_up, "check": _checking} | {
    name: (lambda z, cell=cell: 0.3 * cell(z.reshape(1, 1, 4))[0].reshape(4)) for name, cell in _RECURRENT.items()
}


@pytest.mark.parametrize("name", REAL_ONLY)
def test_what_code_for_real_states_raises_has_a_name_and_a_place(name):
    f = REAL_ONLY[name]
    z = solve(f, torch.zeros(4, dtype=torch.float64))
    with pytest.raises(NotHolomorphicError, match=r"test_nudged_map\.py:\d+") as caught:
        tep.get_backward("hep")(f, z, torch.ones_like(z))
    message = str(caught.value)
    assert not re.search(r"\.to\(|\.real\b|\.float\(|convert", message, re.IGNORECASE), message
