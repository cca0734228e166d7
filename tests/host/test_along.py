"""Homeostasis along the error vector: its gradient, its value, its weight, and what a training loop does with it."""

import copy
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torchdeq
from torch import nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.asymmetry import AsymmetryPenalty
from torchdeq_ep.errors import EPWarning, InvalidOptionError, NoDEQError
from torchdeq_ep.host.along import WeightController
from torchdeq_ep.host.homeostasis import register_homeostasis
from torchdeq_ep.jacobian import OperatorMetric, dense_jacobian
from torchdeq_ep.state import Autocast, Equilibrium, Rows, relative_difference

B, N = 3, 6
TIGHT = {"f_max_iter": 300, "f_tol": 1e-12, "ift": True}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 9), nn.Linear(3, 3)

    def forward(self, z):
        q, k, v = self.qkv(z.reshape(-1, 2, 3)).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v).reshape(-1, 6)


MAPS = {
    "dense": lambda: nn.Sequential(nn.Linear(N, N), nn.Tanh()),
    "relu": lambda: nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N)),
    "batch norm": lambda: nn.Sequential(nn.Linear(N, N), nn.BatchNorm1d(N), nn.Tanh()),
    "layer norm": lambda: nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N), nn.GELU()),
    "group norm": lambda: nn.Sequential(nn.Linear(N, N), nn.GroupNorm(2, N), nn.SiLU()),
    "instance norm": lambda: nn.Sequential(
        nn.Linear(N, N), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Tanh()
    ),
    "attention": Attention,
}


class Model(nn.Module):
    def __init__(self, kind="dense", several=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer, self.several = nn.Linear(4, N), MAPS[kind](), several
        for part in self.layer.modules():  # small enough for the map to contract
            if isinstance(part, (nn.BatchNorm1d, nn.GroupNorm, nn.InstanceNorm1d)):
                nn.init.constant_(part.weight, 0.1 if isinstance(part, nn.InstanceNorm1d) else 0.4)
        self.deq = torchdeq.get_deq(**{**TIGHT, **options})
        self.double()

    def f(self, z, x):
        return 0.4 * self.layer(z) + x

    def forward(self, inputs):
        x = self.stem(inputs)
        if not self.several:
            return self.deq(lambda z: self.f(z, x), torch.zeros_like(x))[0][-1]

        def step(a, b):
            value = self.f(torch.cat([a, b], 1), x)
            return value[:, :2], value[:, 2:]

        return torch.cat(self.deq(step, (torch.zeros_like(x[:, :2]), torch.zeros_like(x[:, 2:])))[0][-1], 1)


def inputs():
    return torch.randn(B, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def readout():
    return torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def pieces(model, mode):
    """The state, the error vector, and `a` for each sample, from dense Jacobians, with `u` and `a` held fixed."""
    with torch.no_grad():
        x = model.stem(inputs())
        z = torch.zeros_like(x)
        for _ in range(400):
            z = model.f(z, x)
    jacobian = dense_jacobian(lambda z: model.f(z, x.detach()), z).detach()
    g = readout().expand(B, N).reshape(-1)
    system = torch.eye(B * N, dtype=torch.float64) - (jacobian if mode.startswith(("ep", "hep")) else jacobian.T)
    v = torch.linalg.solve(system, g)
    return z, jacobian, v


def penalty_of(model, z, u, count):
    """Half the mean over the samples of `|(J - J^T) u|^2` as a function of the parameters, by a dense Jacobian."""
    x = model.stem(inputs())
    point = z.detach().requires_grad_()
    value = model.f(point, x)
    rows = [
        torch.autograd.grad(value.flatten()[k], point, create_graph=True)[0].flatten() for k in range(value.numel())
    ]
    jacobian = torch.stack(rows)
    return ((jacobian - jacobian.T) @ u).square().sum() / (2 * count)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("mode", ["ep", "ift", "aep"])
def test_its_gradient_is_that_of_the_dense_jacobian(kind, mode):
    added = {}
    for weight in (0.0, 2.0):
        model = Model(kind)
        with (
            tep.use_backward(model, mode, tol=1e-11),
            register_homeostasis(model, weight=weight, estimator="error-vector") as homeostasis,
        ):
            loss = (model(inputs()) @ readout()).sum()
            (loss + homeostasis.penalty()).backward()
        added[weight] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        value = homeostasis.last.penalty
    model = Model(kind)
    z, jacobian, v = pieces(model, mode)
    count = 1 if kind == "batch norm" else B
    u = v.reshape(count, -1) / v.reshape(count, -1).norm(dim=1, keepdim=True)
    u = u.flatten()
    a = (jacobian - jacobian.T) @ u
    assert value == pytest.approx(float(a.square().sum()) / count, rel=1e-6)
    scalar = 2.0 * penalty_of(model, z, u, count)
    names = [name for name, p in model.named_parameters()]
    expected = torch.autograd.grad(scalar, list(model.parameters()), allow_unused=True)
    whole = torch.cat([gradient.flatten() for gradient in expected if gradient is not None]).norm()
    for name, gradient in zip(names, expected, strict=True):
        if gradient is None or name not in added[2.0]:
            continue
        found = added[2.0][name] - added[0.0][name]
        assert (found - gradient).norm() < 1e-5 * whole


def test_it_lowers_the_number_that_every_pass_reports():
    torch.manual_seed(0)
    model = Model(f_tol=1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    residuals = []
    with (
        tep.use_backward(model, "ep") as handle,
        register_homeostasis(model, weight=30.0, estimator="error-vector") as homeostasis,
    ):
        for _ in range(40):
            optimizer.zero_grad()
            (functional.mse_loss(model(inputs()), torch.ones(B, N).double()) + homeostasis.penalty()).backward()
            optimizer.step()
            residuals.append(homeostasis.last.penalty)
    assert residuals[-1] < residuals[0] / 3
    assert handle.last["deq"].adjoint_residual < 0.5


def test_several_tensors_are_as_one():
    gradients = []
    for several in (False, True):
        model = Model(several=several)
        with (
            tep.use_backward(model, "ep", tol=1e-11),
            register_homeostasis(model, weight=3.0, estimator="error-vector") as homeostasis,
        ):
            ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_difference(*gradients) < 1e-8


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_loss_scale_reaches_it_and_does_not_change_it(scale):
    model = Model()
    with (
        tep.use_backward(model, "ep", tol=1e-11),
        register_homeostasis(model, weight=3.0, estimator="error-vector") as homeostasis,
    ):
        (scale * ((model(inputs()) @ readout()).sum() + homeostasis.penalty())).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()]) / scale
    other = Model()
    with (
        tep.use_backward(other, "ep", tol=1e-11),
        register_homeostasis(other, weight=3.0, estimator="error-vector", inject=scale),
    ):
        (scale * (other(inputs()) @ readout()).sum()).backward()
    injected = torch.cat([p.grad.flatten() for p in other.parameters()]) / scale
    assert relative_difference(injected, found) < 1e-9


def test_accumulated_passes_add_up():
    def gradient(parts):
        model = Model()
        with (
            tep.use_backward(model, "ep", tol=1e-11),
            register_homeostasis(model, weight=3.0, estimator="error-vector") as homeostasis,
        ):
            for rows in parts:
                share = len(rows) / B
                loss = (model(inputs()[rows]) @ readout()).sum()
                (loss + share * homeostasis.penalty()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert relative_difference(gradient([[0], [1, 2]]), gradient([[0, 1, 2]])) < 1e-8


def test_without_a_loss_there_is_no_error_vector_and_no_penalty():
    model = Model()
    with (
        tep.use_backward(model, "ep"),
        register_homeostasis(model, weight=3.0, estimator="error-vector") as homeostasis,
    ):
        model(inputs())
        homeostasis.penalty().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_penalty_is_zero_in_value_and_nothing_in_evaluation():
    model = Model()
    with (
        tep.use_backward(model, "ep"),
        register_homeostasis(model, weight=3.0, estimator="error-vector") as homeostasis,
    ):
        model(inputs())
        penalty = homeostasis.penalty()
        assert penalty.item() == 0.0
        assert penalty.requires_grad
        with torch.no_grad():
            model.eval()(inputs())
        assert not homeostasis.penalty().requires_grad


def test_a_deq_that_is_not_switched_is_named():
    model = Model()
    with register_homeostasis(model, estimator="error-vector"), pytest.raises(NoDEQError, match=r"deq .*use_backward"):
        model(inputs())
    model(inputs())


@pytest.mark.parametrize(("mode", "along"), [("ep", True), ("ift", True), ("unrolled:k=2", False), (None, False)])
def test_where_there_is_an_error_vector_it_is_the_default(mode, along):
    model = Model()
    with tep.use_backward(model, mode) if mode else nullcontext(), register_homeostasis(model) as homeostasis:
        ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
        assert bool(homeostasis.last.alignment) is along
        assert along or homeostasis.last.weights == {"deq": 0.1}


def test_a_weight_of_ones_own_takes_random_directions_unless_told():
    model = Model()
    with tep.use_backward(model, "ep"):
        for options, has_vector in (({}, False), ({"estimator": "error-vector"}, True)):
            with register_homeostasis(model, 2.0, **options) as homeostasis:
                ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
                assert bool(homeostasis._asking) is has_vector


def test_it_can_be_registered_before_the_switch_and_outlive_it():
    model = Model()
    homeostasis = register_homeostasis(model, weight=1.0, estimator="error-vector")
    for mode in ("ep", "aep"):
        with tep.use_backward(model, mode):
            ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
            assert homeostasis.last.penalty > 0
    homeostasis.remove()
    model(inputs())


def test_copies_are_without_it():
    model = Model()
    tep.use_backward(model, "ep")
    register_homeostasis(model, weight=1.0, estimator="error-vector")
    (model(inputs()) @ readout()).sum().backward()
    for twin in (copy.deepcopy(model.deq), pickle.loads(pickle.dumps(model.deq))):
        z = twin(lambda z: 0.5 * torch.tanh(z) + 0.1, torch.zeros(2, 3))[0][-1]
        assert z.shape == (2, 3)


def test_a_copy_of_a_model_with_homeostasis_trains():
    model = Model()
    tep.use_backward(model, "ep", homeostasis="auto")
    model(inputs()).sum().backward()
    for again in (False, True):
        copied = copy.deepcopy(model)
        copied.zero_grad()
        if again:
            tep.use_backward(copied, "ep", homeostasis="auto")
        copied(inputs()).sum().backward()
        assert copied.layer[0].weight.grad.any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": "auto", "estimator": "paper"}, "error-vector"),
        ({"estimator": "error-vector", "weight": "auto", "target": 1.5}, "target"),
        ({"estimator": "error-vector", "weight": -1.0}, "weight"),
        ({"estimator": "error_vector"}, "estimator"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(InvalidOptionError, match=match):
        register_homeostasis(Model(), **options)


# --- the weight that finds itself ------------------------------------------------------------------------------------


def test_the_weight_grows_below_the_target_and_lets_go_above():
    controller = WeightController(0.9)
    before = controller.weight
    controller.steer(0.4)
    assert controller.weight > 4 * before
    for _ in range(60):
        controller.steer(1.0)
    assert controller.weight == controller.bounds[0]
    controller.steer(math.nan)
    assert controller.weight == controller.bounds[0]


@pytest.mark.parametrize("mode", ["ep", "aep", "ift"])
def test_the_alignment_is_that_of_the_two_error_vectors(mode):
    model = Model()
    with (
        tep.use_backward(model, mode),
        register_homeostasis(model, weight="auto", estimator="error-vector") as homeostasis,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", EPWarning)
        ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
    _, jacobian, _ = pieces(model, "ep")
    g, one = readout().expand(B, N).reshape(-1), torch.eye(B * N, dtype=torch.float64)
    two = [torch.linalg.solve(one - j, g).reshape(B, N) for j in (jacobian, jacobian.T)]
    expected = torch.cosine_similarity(*two, dim=1).mean()
    assert homeostasis.last.alignment["deq"] == pytest.approx(float(expected), abs=0.02)


@pytest.mark.parametrize("homeostasis", ["auto", 2.0])
def test_one_argument_of_the_switch_is_enough(homeostasis):
    model, other = Model(), Model()
    with tep.use_backward(model, "ep", homeostasis=homeostasis) as handle:
        (model(inputs()) @ readout()).sum().backward()
    with (
        tep.use_backward(other, "ep"),
        register_homeostasis(other, weight=homeostasis, estimator="error-vector") as registered,
    ):
        ((other(inputs()) @ readout()).sum() + registered.penalty()).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert repr(handle.homeostasis.last) == repr(registered.last)  # a NaN is not equal to itself
    model(inputs()).sum().backward()
    assert repr(handle.homeostasis.last) == repr(registered.last)


def test_training_holds_the_target():
    torch.manual_seed(0)
    model = Model(f_tol=1e-6)
    nn.init.orthogonal_(model.layer[0].weight, gain=1.8)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with (
        tep.use_backward(model, "ep"),
        register_homeostasis(model, weight="auto", estimator="error-vector", target=0.95) as homeostasis,
    ):
        alignments = []
        for _ in range(120):
            optimizer.zero_grad()
            (functional.mse_loss(model(inputs()), torch.ones(B, N).double()) + homeostasis.penalty()).backward()
            optimizer.step()
            alignments.append(homeostasis.last.alignment["deq"])
    assert alignments[0] < 0.9
    assert alignments[-1] > 0.93


@pytest.mark.parametrize("kind", ["diagonal", "operator"])
def test_with_a_metric_it_is_the_asymmetry_that_the_metric_leaves(kind):
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    mixing = torch.eye(N, dtype=torch.float64) + 0.1 * root @ root.T
    metric = tep.ActivityMetric("tanh")
    if kind == "operator":
        metric = OperatorMetric(lambda v: v @ mixing, lambda v: torch.linalg.solve(mixing, v.T).T)

    class Tanh(Model):
        def f(self, z, x):
            return torch.tanh(0.5 * self.layer[0](z) + x)

    gradients = {}
    for weight in (0.0, 2.0):
        model = Tanh()
        mode = tep.EquilibriumPropagation(metric=metric, tol=1e-11)
        with (
            tep.use_backward(model, mode),
            register_homeostasis(model, weight=weight, estimator="error-vector") as homeostasis,
        ):
            ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
        gradients[weight] = torch.cat([p.grad.flatten() for p in model.parameters()])
    model = Tanh()
    z, jacobian, _ = pieces(model, "ep")
    g = readout().expand(B, N).reshape(-1)
    m = torch.diag(metric(z).flatten()) if kind == "diagonal" else torch.block_diag(*[mixing] * B)
    through = torch.linalg.solve(m, jacobian @ m)
    v = torch.linalg.solve(torch.eye(B * N, dtype=torch.float64) - through, g).reshape(B, -1)
    u = (v / v.norm(dim=1, keepdim=True)).flatten()
    a = through @ u - jacobian.T @ u
    assert homeostasis.last.penalty == pytest.approx(float(a.square().sum()) / B, rel=1e-6)
    x = model.stem(inputs())
    point = z.detach().requires_grad_()
    value = model.f(point, x).flatten()
    rows = torch.stack([torch.autograd.grad(each, point, create_graph=True)[0].flatten() for each in value])
    scalar = 2.0 * (torch.linalg.solve(m, rows @ (m @ u)) - rows.T @ u).square().sum() / (2 * B)
    expected = torch.autograd.grad(scalar, list(model.parameters()), allow_unused=True)
    expected = torch.cat([torch.zeros(0) if e is None else e.flatten() for e in expected])
    assert relative_difference(gradients[2.0] - gradients[0.0], expected) < 1e-5


def test_under_autocast_and_with_two_deqs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(N, N) for _ in range(2))
            self.deqs = nn.ModuleList(torchdeq.get_deq(f_tol=1e-3, f_max_iter=50, ift=True) for _ in range(2))

        def forward(self, x):
            for layer, deq in zip(self.layers, self.deqs, strict=True):
                x = self.solve(layer, deq, x)
            return x

        @staticmethod
        def solve(layer, deq, x):
            return deq(lambda z: 0.5 * torch.tanh(layer(z)) + x, torch.zeros_like(x))[0][-1]

    model, x = Two(), torch.randn(8, N)
    with (
        tep.use_backward(model, "ep"),
        register_homeostasis(model, weight={"deqs.1": 3.0, "deqs.0": 1.0}, estimator="error-vector") as homeostasis,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", EPWarning)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        (loss + homeostasis.penalty()).backward()
    assert set(homeostasis.last.deqs) == {"deqs.0", "deqs.1"}
    assert homeostasis.last.weights == {"deqs.0": 1.0, "deqs.1": 3.0}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_automatic_weight_goes_on_where_it_stood():
    model = Model()
    with tep.use_backward(model, "ep", homeostasis="auto") as handle:
        (model(inputs()) @ readout()).sum().backward()
        state = handle.homeostasis.state_dict()
    assert state["deq"]["passes"] == 1
    with register_homeostasis(Model(), weight="auto", estimator="error-vector") as other:
        other.load_state_dict(state)
        assert other.state_dict() == state
        with pytest.raises(InvalidOptionError, match="is one of"):
            other.load_state_dict({})


def test_an_f_that_relies_on_the_autocast_of_the_forward_pass_is_measured_under_it():
    deq, weight = torchdeq.get_deq(f_tol=1e-3, f_max_iter=50, ift=True), nn.Parameter(torch.randn(N, N) / 8)
    deq.weight = weight
    with (
        tep.use_backward(deq, "ep", homeostasis="auto") as handle,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", EPWarning)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = weight.to(torch.bfloat16)  # z is float32: without autocast the product raises
            loss = deq(lambda z: (z @ cast).float().tanh() + 1, torch.zeros(8, N))[0][-1].square().mean()
        loss.backward()
    assert math.isfinite(handle.homeostasis.last.alignment[""])
    assert bool(torch.isfinite(weight.grad).all())
    assert bool(weight.grad.any())


def test_after_a_fallback_the_asymmetry_is_measured_along_the_vector_that_was_used():
    model, kept = Model(), []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    hook = model.stem.register_forward_hook(keep)
    nn.init.constant_(model.layer[0].bias, 0.0)
    with torch.no_grad():
        model.layer[0].weight.mul_(3)
    with (
        tep.use_backward(model, "ep", max_iter=2, on_divergence="ift"),
        register_homeostasis(model, weight=0.0, estimator="error-vector") as homeostasis,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
    hook.remove()
    assert any("implicit differentiation took over" in str(each.message) for each in caught)
    _, jacobian, _ = pieces(model, "ift")
    v = kept[0].grad  # f is a function of z, plus x
    u = v / v.norm(dim=1, keepdim=True)
    a = (jacobian - jacobian.T) @ u.flatten()
    assert homeostasis.last.penalty == pytest.approx(float(a.square().sum() / B), rel=1e-5)


@pytest.mark.parametrize("kind", MAPS)
def test_the_guard_is_half_the_square_of_what_the_rate_has_above_its_limit(kind):
    model = Model(kind)
    x, z, v, g = (torch.randn(B, N, dtype=torch.float64) for _ in range(4))
    f = lambda state: 20.0 * model.layer(state) + x  # noqa: E731
    equilibrium = Equilibrium(f, z, f(z).detach(), g, 1e-15, rows=Rows(B, (N,)))
    leaves, weight, seen = tuple(model.layer.parameters()), torch.tensor(2.0), []
    gradients = [
        AsymmetryPenalty(leaves, lambda *numbers: seen.append(numbers), guard).gradients(
            equilibrium, v, Autocast.current("cpu"), weight
        )
        for guard in (0.0, 0.7)
    ]
    samples = 1 if equilibrium.independent_rows() is None else B
    u = v.reshape(samples, -1) / v.reshape(samples, -1).norm(dim=1, keepdim=True)
    point = z.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(f(point), point, u.reshape(B, N), create_graph=True)
    rates = pulled.reshape(samples, -1).norm(dim=1)
    assert rates.max() > 1  # some samples are beyond the limit
    guard = (rates - 0.95).clamp(min=0).square().sum() / (2 * samples)
    expected = torch.autograd.grad(guard, leaves, allow_unused=True)
    for plain, guarded, added in zip(*gradients, expected, strict=True):
        found = or_zero(guarded) - or_zero(plain)
        torch.testing.assert_close(found, 2.0 * 0.7 * or_zero(added) + torch.zeros_like(found))
    assert seen[0] == seen[1] == pytest.approx((seen[0][0], float(rates.detach().quantile(0.9))))


def or_zero(gradient):
    return torch.zeros((), dtype=torch.float64) if gradient is None else gradient


def test_the_guard_grows_where_the_map_does_not_contract_and_rests_where_it_does():
    controller = WeightController(0.95)
    for _ in range(50):
        controller.stabilise(1.1)
    grown = controller.guard
    for _ in range(20):
        controller.stabilise(0.5)
    assert grown > 5
    assert controller.guard < 1
    controller.stabilise(math.nan)
    assert math.isfinite(controller.guard)


class Driven(nn.Module):
    """A symmetric linear map, whose Jacobian has no asymmetry to be trained away, and its slowest direction."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator))[0]
        self.weight = nn.Parameter(basis @ torch.diag(torch.linspace(-0.5, 0.94, N, dtype=torch.float64)) @ basis.T)
        self.slowest = torch.outer(basis[:, -1], basis[:, -1])
        self.deq = torchdeq.get_deq(**{**TIGHT, "f_max_iter": 60, "f_tol": 1e-8, "f_solver": "anderson"})

    def forward(self, x):
        return self.deq(lambda z: z @ self.weight.T + x, torch.zeros_like(x))[0][-1]


@pytest.mark.slow
def test_the_guard_holds_a_map_that_its_task_drives_beyond_one():
    """The loss takes the largest eigenvalue up by the same in each step; its share of the state is there to be seen."""
    radii, drive = [], torch.randn(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for homeostasis in ("auto", None):
        model = Driven()
        tep.use_backward(model, "ep", homeostasis=homeostasis)
        optimizer, largest = torch.optim.SGD(model.parameters(), lr=0.1), 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EPWarning)  # near 1 free phases stop early
            for _ in range(75):
                optimizer.zero_grad()
                (1e-9 * model(drive).norm().log() - 0.01 * (model.weight * model.slowest).sum()).backward()
                optimizer.step()
                largest = max(largest, float(torch.linalg.eigvals(model.weight.detach()).abs().max()))
        radii.append(largest)
    guarded, bare = radii
    assert guarded < 0.98
    assert bare > 1.0


@pytest.mark.parametrize("name", ["layer.0.weight", "layer.0.bias"])
def test_the_penalty_reaches_the_parameters_that_it_is_given_and_no_others(name):
    changed = []
    for is_chosen in (False, True):
        model = Model()
        tep.use_backward(model, "ep")
        parameters = [dict(model.named_parameters())[name]] if is_chosen else None
        homeostasis = register_homeostasis(model, 3.0, estimator="error-vector", parameters=parameters)
        (model(inputs()) @ readout()).sum().backward()
        plain = [parameter.grad.clone() for parameter in model.parameters()]
        homeostasis.penalty()
        model.zero_grad()
        ((model(inputs()) @ readout()).sum() + homeostasis.penalty()).backward()
        pairs = zip(model.named_parameters(), plain, strict=True)
        changed.append({each for (each, p), before in pairs if relative_difference(p.grad, before) > 1e-6})
    assert changed[0] >= {"layer.0.weight", "layer.0.bias"}
    assert changed[1] == {name}
