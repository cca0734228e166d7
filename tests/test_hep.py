"""Complex nudges on maps and models that were written for real numbers."""

import copy
import math
import warnings

import pytest
import torch
import torchdeq
from problems import contraction, relative_error, solve
from torch import nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning, NotHolomorphicError, NudgeDivergedError
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.state.equilibrium import Equilibrium

WEIGHT = contraction(12, 0, 0.5)
X = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _attention(z):
    heads = (z @ WEIGHT.T + X).reshape(2, 3, 4)
    return 0.5 * functional.scaled_dot_product_attention(heads, 2 * heads, heads).reshape(2, 12) + 0.1 * X


MAPS = {
    "sigmoid": lambda z: torch.sigmoid(2 * (z @ WEIGHT.T) + X),
    "tanh": lambda z: torch.tanh(functional.linear(z, WEIGHT) + X),
    "gelu": lambda z: 0.8 * functional.gelu(functional.linear(z, WEIGHT) + X),
    "gelu-tanh": lambda z: 0.8 * functional.gelu(functional.linear(z, WEIGHT) + X, approximate="tanh"),
    "softmax": lambda z: 2 * torch.softmax(z @ WEIGHT.T + X, dim=-1),
    "group-norm": lambda z: 0.6 * torch.tanh(functional.group_norm(z @ WEIGHT.T + X, 3)),
    "attention": _attention,
}


def _problem(name):
    f = MAPS[name]
    z = solve(f, torch.zeros(2, 12, dtype=torch.float64))
    g = torch.randn(2, 12, dtype=torch.float64)
    matrix = torch.eye(24, dtype=torch.float64) - dense_jacobian(f, z)
    return f, z, g, torch.linalg.solve(matrix, g.flatten()).reshape(2, 12)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n_points", [2, 4, 6, 8])
def test_error_falls_as_beta_to_the_number_of_points(name, n_points):
    f, z, g, limit = _problem(name)

    def error(beta):
        mode = tep.EquilibriumPropagation(tep.Stencil.contour(beta, n_points), tol=1e-14, on_divergence="raise")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EPWarning)
            try:
                return relative_error(mode(f, z, g), limit)
            except NudgeDivergedError:
                return math.inf

    # Start far out, where nudges may diverge, and come in to the asymptotic range.
    beta = next(beta for beta in (6.4, 3.2, 1.6, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025) if error(beta) < 1e-3)
    errors = [error(beta), error(beta / 2)]
    assert errors[1] > 1e-11  # else the slope would be one of rounding errors
    assert math.log2(errors[0] / errors[1]) == pytest.approx(n_points, abs=0.3)


@pytest.mark.parametrize("name", MAPS)
def test_eight_points_at_a_finite_amplitude_are_exact(name):
    f, z, g, limit = _problem(name)
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(0.05, 8), tol=1e-13)
    assert relative_error(mode(f, z, g), limit) < 1e-9


@pytest.mark.parametrize("solver", [None, "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_complex_nodes_reach_every_solver(solver):
    f, z, g, limit = _problem("tanh")
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(0.05, 6), solver=solver)
    assert relative_error(mode(f, z, g), limit) < 1e-7


def test_real_nodes_stay_in_real_arithmetic():
    f, z, g, _ = _problem("tanh")
    dtypes = []

    def watched(z):
        dtypes.append(z.dtype)
        return f(z)

    tep.EquilibriumPropagation(tep.Stencil.contour(0.05, 4), batching="loop")(watched, z, g)
    value_at_rest, *nudged = dtypes
    assert value_at_rest == torch.float64
    assert nudged[0] == torch.float64
    assert nudged[-1] == torch.complex128


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


def test_several_tensors_and_loss_nudging_with_cross_entropy():
    readout = nn.Linear(6, 3).double()
    targets = torch.tensor([0, 2])

    def f(a, b):
        joint = torch.tanh(torch.cat([a, b], 1) @ WEIGHT.T + X)
        return joint[:, :6], joint[:, 6:]

    deq = torchdeq.get_deq(f_max_iter=300, f_tol=1e-12)
    x = nn.Parameter(X.clone())

    def gradient(backward):
        def f(a, b):
            joint = torch.tanh(torch.cat([a, b], 1) @ WEIGHT.T + x)
            return joint[:, :6], joint[:, 6:]

        def loss_of_state(state):
            return functional.cross_entropy(readout(state[0]), targets)

        zeros = (torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))
        with tep.use_backward(deq, backward):
            (state,), _ = deq(f, zeros)
            with tep.nudge_loss(deq, loss_of_state):
                (gradient,) = torch.autograd.grad(loss_of_state(state), x)
        return gradient

    reference = gradient("ep-infinitesimal")
    assert relative_error(gradient("hep:n_points=8,beta=0.05"), reference) < 1e-8
    assert relative_error(gradient("ep:beta=0.3"), reference) > 1e-6  # the nudge is not small


def test_loss_nudging_takes_the_metric_of_the_nudged_state():
    """The papers' dynamics: potentials are nudged by `dL/dphi`, here written out and iterated by hand."""
    torch.manual_seed(1)
    weight, x = WEIGHT[:6, :6] + WEIGHT[:6, :6].T, torch.randn(2, 6, dtype=torch.float64)
    readout, targets = nn.Linear(6, 3).double(), torch.tensor([0, 2])
    sigmoid, beta = tep.nn.shifted_sigmoid, 0.4

    def slope(u):
        return 4 * sigmoid(u) * (1 - sigmoid(u))

    def f(u):
        return 0.5 * sigmoid(u) @ weight + x

    def loss_of_state(u):
        return functional.cross_entropy(readout(sigmoid(u)), targets)

    def nudged(b):
        u = free
        for _ in range(500):
            activity = sigmoid(u).detach().requires_grad_()
            (force,) = torch.autograd.grad(functional.cross_entropy(readout(activity), targets), activity)
            u = f(u) + b * force
        return u

    free = torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(500):
        free = f(free)
    expected = (nudged(beta) - nudged(-beta)) / (2 * beta) * slope(free)

    deq = torchdeq.get_deq(f_max_iter=300, f_tol=1e-13)
    drive = x.clone().requires_grad_()
    options = {"metric": lambda u: 1 / slope(u), "tol": 1e-10, "max_iter": 500}

    def gradient(mode):
        with tep.use_backward(deq, mode):
            (u,), _ = deq(lambda u: 0.5 * sigmoid(u) @ weight + drive, torch.zeros_like(free))
            with tep.nudge_loss(deq, loss_of_state):
                return torch.autograd.grad(loss_of_state(u), drive)[0]

    def nudge(stencil):
        return tep.EquilibriumPropagation(stencil, scale="absolute", **options)

    assert relative_error(gradient(nudge(tep.Stencil.symmetric(beta))), expected) < 1e-8
    limit = gradient(tep.InfinitesimalEP(**options))
    assert relative_error(expected, limit) > 1e-4  # the nudge is not small
    assert relative_error(gradient(nudge(tep.Stencil.contour(0.1, n_points=8))), limit) < 1e-8


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
    assert "test_hep.py:" in str(error.value)
    assert "ep-richardson" in str(error.value)
    assert calls <= 1
    for key, value in module.state_dict().items():
        if name != "buffer" or key != "store":  # the map's own real evaluations write there
            assert torch.equal(value, before[key])


def test_piecewise_maps_can_be_allowed_and_are_watched():
    weight = contraction(12, 3, 0.5)

    def f(z):
        return functional.leaky_relu(z @ weight.T + X, 0.1)

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


def test_the_online_schedule_reports_each_crossing_once():
    weight = contraction(12, 3, 0.5)

    def f(z):
        return functional.leaky_relu(z @ weight.T + X, 0.1)

    z = solve(f, torch.zeros(2, 12, dtype=torch.float64))
    stencil = tep.Stencil.contour(1e-3, n_points=4)
    reports = [
        tep.EquilibriumPropagation(
            stencil, schedule=tep.Online(steps=20, periods=periods), piecewise="real-part"
        ).solve(Equilibrium(f, z, f(z), torch.ones_like(z), 2.2e-16))[1]
        for periods in (1, 3)
    ]
    once, thrice = (sum(crossing.units for crossing in report.crossings) for report in reports)
    assert thrice == 3 * once > 0


# --- the online schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "gelu", "attention"])
def test_online_reaches_the_limit_of_parallel(name):
    f, z, g, limit = _problem(name)
    schedule = tep.Online(steps=25, periods=4)
    v = tep.get_backward("hep-online:beta=0.05,n_points=6", schedule=schedule)(f, z, g)
    parallel = tep.get_backward("hep:beta=0.05,n_points=6")(f, z, g)
    assert relative_error(v, limit) < 1e-4
    assert relative_error(v, parallel) < 1e-4


def test_online_error_falls_with_the_steps_it_takes():
    f, z, g, limit = _problem("sigmoid")
    errors = [
        relative_error(
            tep.get_backward("hep-online:beta=0.05,tol=0.5", schedule=tep.Online(steps=steps, periods=3))(f, z, g),
            limit,
        )
        for steps in (3, 6, 12)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
