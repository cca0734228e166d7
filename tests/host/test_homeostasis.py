"""The homeostatic penalty as a regulariser of real torchdeq models."""

import copy
import dataclasses
import math
import pickle
import warnings

import pytest
import torch
import torchdeq
from problems import contraction, dense_penalty, misaligned, normal, relative_error, seeded
from torch import nn
from torch.nn import functional
from torchdeq.norm import apply_norm

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning, InvalidOptionError, NoDEQError
from torchdeq_ep.host.homeostasis import HomeostasisReport, register_homeostasis
from torchdeq_ep.jacobian.linearization import dense_jacobian
from torchdeq_ep.jacobian.metric import ActivityMetric
from torchdeq_ep.jacobian.symmetry import SymmetryMeasurement, symmetry_penalty, symmetry_score

INPUTS = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Encoder, one or several DEQs in a row, read-out."""

    def __init__(self, n=6, depth=1, norm=False, tensors=1, **config):
        super().__init__()
        self.encoder, self.readout = nn.Linear(3, n), nn.Linear(n, 2)
        self.layers = nn.ModuleList(nn.Linear(n, n) for _ in range(depth))
        self.norm = nn.BatchNorm1d(n) if norm else nn.Identity()
        with torch.no_grad():
            for k, layer in enumerate(self.layers):
                layer.weight.copy_(contraction(n, k, 0.5))
        if norm:
            nn.init.constant_(self.norm.weight, 0.2)
        config = {"ift": True, "f_max_iter": 100, "f_tol": 1e-11, "b_max_iter": 100, "b_tol": 1e-11, **config}
        self.deqs = nn.ModuleList(torchdeq.get_deq(**config) for _ in range(depth))
        self.tensors = tensors
        self.calls = 0

    def forward(self, inputs):
        h = self.encoder(inputs)
        for deq, layer in zip(self.deqs, self.layers, strict=True):
            h = self.equilibrium(deq, layer, h)
        return self.readout(h)

    def equilibrium(self, deq, layer, x):
        def f(*state):
            self.calls += 1
            value = torch.tanh(0.7 * self.norm(layer(torch.cat(state, 1))) + x)
            return value if self.tensors == 1 else (value[:, :2], value[:, 2:])

        self.f = f
        start = torch.zeros_like(x)
        states, _ = deq(f, start if self.tensors == 1 else [start[:, :2], start[:, 2:]])
        self.states = states
        return states[-1] if self.tensors == 1 else torch.cat(states[-1], 1)


def _model(**config):
    torch.manual_seed(0)
    return Model(**config).double()


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _loss_gradients(model, homeostasis=None):
    model.zero_grad()
    loss = model(INPUTS).pow(2).sum()
    (loss if homeostasis is None else loss + homeostasis.penalty()).backward()
    return _gradients(model)


def _difference(one, other):
    assert one.keys() == other.keys()
    return max(relative_error(one[name], other[name]) for name in other)


@pytest.mark.parametrize("core", ["sliced", "indexing", "ep-sliced", "ep-indexing"])
@pytest.mark.parametrize("backward", [None, "ift", "aep"])
@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_it_adds_its_gradient_and_changes_nothing_else(core, backward, tensors, inject, norm):
    model, twin = (_model(core=core, tensors=tensors, norm=norm) for _ in range(2))
    if backward:
        tep.use_backward(model, backward)
        tep.use_backward(twin, backward)
    homeostasis = register_homeostasis(model, 3.0, probes=4, seed=5, inject=inject)
    random_state = torch.get_rng_state()
    out, expected = model(INPUTS), twin(INPUTS)
    assert torch.equal(out, expected)
    assert model.calls == twin.calls + 1
    assert torch.equal(torch.get_rng_state(), random_state)
    for (name, value), (twin_name, twin_value) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert name == twin_name
        assert torch.equal(value, twin_value)

    # The same penalty from the plain function, and its gradient on top of the twin's.
    penalty = 3 * symmetry_penalty(twin.f, twin.states[-1], 4, generator=seeded(5))
    (out.pow(2).sum() + homeostasis.penalty()).backward()
    (expected.pow(2).sum() + penalty).backward()
    assert _difference(_gradients(model), _gradients(twin)) < 1e-9
    assert homeostasis.last.weighted == pytest.approx(float(penalty.detach()))
    assert homeostasis.last.penalty == pytest.approx(float(penalty.detach()) / 3)


@pytest.mark.parametrize("backward", [None, "ift", "ep", "hep", "aep"])
@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_of_probes_have_the_same_gradient(backward, inject, autocast):
    found = []
    for chunk in (None, 1, 2):
        model = _model()
        if backward:
            tep.use_backward(model, backward)
        homeostasis = register_homeostasis(model, 3.0, probes=4, inject=inject, chunk=chunk)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(INPUTS).pow(2).sum()
        (loss + homeostasis.penalty()).backward()
        found.append(_gradients(model))
    assert max(_difference(other, found[0]) for other in found[1:]) < 1e-9


@pytest.mark.parametrize("n_states", [2, 3])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_once_a_forward_with_sampled_states(core, n_states):
    model, twin = _model(core=core, n_states=n_states), _model(core=core, n_states=n_states)
    homeostasis = register_homeostasis(model, 1.0, seed=5, inject=True)
    out, expected = model(INPUTS), twin(INPUTS)
    assert len(model.states) == len(twin.states)
    assert all(torch.equal(a, b) for a, b in zip(model.states, twin.states, strict=True))
    penalty = symmetry_penalty(twin.f, twin.states[-1], generator=seeded(5))
    torch.testing.assert_close(homeostasis.penalty(), penalty.detach())
    out.pow(2).sum().backward()
    (expected.pow(2).sum() + penalty).backward()
    assert _difference(_gradients(model), _gradients(twin)) < 1e-9


def test_training_with_it_makes_the_jacobian_symmetric():
    model = _model(f_tol=1e-7)
    tep.use_backward(model, "ep")
    homeostasis = register_homeostasis(model, 10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalties = []
    for _ in range(60):
        optimizer.zero_grad()
        (model(INPUTS).pow(2).sum() + homeostasis.penalty()).backward()
        optimizer.step()
        penalties.append(homeostasis.last)
    assert penalties[-1].penalty < penalties[0].penalty / 20
    assert penalties[-1].symmetry > penalties[0].symmetry + 0.1
    exact = symmetry_score(model.f, model.states[-1].detach(), 500, generator=seeded())
    assert penalties[-1].symmetry == pytest.approx(exact, abs=0.2)


def test_penalty_is_taken_once_and_sums_the_forward_passes():
    model = _model()
    homeostasis = register_homeostasis(model, 0.5)
    assert float(homeostasis.penalty()) == 0.0
    assert homeostasis.last is None
    weighted = []
    for _ in range(3):
        model(INPUTS)
        weighted.append(homeostasis.last.weighted)
    assert float(homeostasis.penalty().detach()) == pytest.approx(sum(weighted))
    zero = homeostasis.penalty()
    assert float(zero) == 0.0
    assert not zero.requires_grad
    assert homeostasis.last.weighted == weighted[-1]
    model.eval()(INPUTS)
    assert float(homeostasis.penalty()) == 0.0
    homeostasis.remove()
    homeostasis.remove()
    model.train()(INPUTS)
    assert float(homeostasis.penalty()) == 0.0
    calls = model.calls
    with register_homeostasis(model) as homeostasis:
        model(INPUTS)
        more = model.calls - calls
    model(INPUTS)
    assert model.calls - calls == 2 * more - 1
    assert homeostasis.deqs == tuple(model.deqs)


def test_without_autograd_it_measures_only():
    model = _model()
    homeostasis = register_homeostasis(model)
    with torch.no_grad():
        model(INPUTS)
    assert homeostasis.last.penalty > 0
    assert not homeostasis.penalty().requires_grad
    watching = register_homeostasis(model, 0.0)
    model(INPUTS)
    assert watching.last.penalty > 0
    assert watching.last.weighted == 0.0
    assert not watching.penalty().requires_grad


def test_a_frozen_map_has_no_gradient_to_add():
    deq = torchdeq.get_deq(ift=True)
    weight = contraction(4, 0)
    homeostasis = register_homeostasis(deq, inject=True), register_homeostasis(deq)
    states, _ = deq(lambda z: torch.tanh(z @ weight), torch.zeros(1, 4, dtype=torch.float64))
    assert not states[-1].requires_grad
    for each in homeostasis:
        penalty = each.penalty()
        assert float(penalty) > 0
        assert not penalty.requires_grad


def test_a_penalty_nobody_takes_is_warned_about_once(monkeypatch):
    monkeypatch.setattr("torchdeq_ep.host.homeostasis._MANY_UNCOLLECTED", 10)
    model = _model(n=2, f_tol=1e-2)
    register_homeostasis(model, 0.0)
    register_homeostasis(model, inject=True)
    for _ in range(12):
        model(INPUTS)
    register_homeostasis(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            model(INPUTS)
    assert [warning.category for warning in caught] == [EPWarning]
    assert "inject=True" in str(caught[0].message)


def test_probes_differ_from_step_to_step_and_repeat_with_the_seed():
    def run(seed):
        model = _model()
        homeostasis = register_homeostasis(model, seed=seed)
        values = []
        for _ in range(3):
            model(INPUTS)
            values.append(float(homeostasis.penalty().detach()))
        return values

    first = run(0)
    assert len(set(first)) == 3
    assert run(0) == first
    assert run(1) != first


def test_weights_by_layer_and_by_schedule():
    model = _model(depth=3)
    names = [name for name, part in model.named_modules() if part in list(model.deqs)]
    homeostasis = register_homeostasis(model, {names[0]: 2.0, names[2]: lambda step: 0.1 * step})
    assert homeostasis.deqs == (model.deqs[0], model.deqs[2])
    for step in range(3):
        model(INPUTS)
        last = homeostasis.last
        assert list(last.deqs) == [names[0], names[2]]
        expected = 2.0 * last.deqs[names[0]].penalty + 0.1 * step * last.deqs[names[2]].penalty
        assert last.weighted == pytest.approx(expected)
        assert float(homeostasis.penalty().detach()) == pytest.approx(expected)
        assert last.penalty == pytest.approx(sum(deq.penalty for deq in last.deqs.values()))
    single = register_homeostasis(model.deqs[1])
    model(INPUTS)
    assert list(single.last.deqs) == [""]


@pytest.mark.parametrize(("every", "expected"), [(1, 8), (2, 4), (3, 3)])
def test_every_kth_step(every, expected):
    model = _model()
    homeostasis = register_homeostasis(model, every=every)
    measured = []
    for _ in range(8):
        model(INPUTS)
        measured.append(float(homeostasis.penalty().detach()) > 0)
    assert sum(measured) == expected
    assert measured[0]
    assert measured == [step % every == 0 for step in range(8)]


def test_with_a_probability():
    model = _model(n=2, f_tol=1e-2)
    homeostasis = register_homeostasis(model, every=0.25)
    random_state = torch.get_rng_state()
    taken = 0
    for _ in range(400):
        model(INPUTS)
        taken += float(homeostasis.penalty().detach()) > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert abs(taken - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)


def test_the_measurements_and_their_standard_errors():
    weight = misaligned(40, 0.3)
    deq = torchdeq.get_deq(f_tol=1e-9, f_max_iter=100)
    homeostasis = register_homeostasis(deq, 0.0, probes=8)
    x = normal(1, 40)

    def f(z):
        return torch.tanh(z @ weight.T + x)

    reports, states = [], [torch.zeros_like(x)]
    for _ in range(300):
        states, _ = deq(f, states[-1].detach())
        reports.append(homeostasis.last)
    jacobian = dense_jacobian(f, states[-1])
    s, a = ((jacobian + sign * jacobian.T).norm() / 2 for sign in (1, -1))
    exact = {
        "penalty": float(dense_penalty(jacobian)),
        "symmetry": float(s / (s + a)),
        "asymmetry": float(a / jacobian.norm()),
    }
    for name, value in exact.items():
        draws = torch.tensor([getattr(report, name) for report in reports])
        errors = torch.tensor([getattr(report, f"{name}_se") for report in reports])
        assert float(draws.mean()) == pytest.approx(value, rel=0.03)
        assert float(errors.square().mean().sqrt()) == pytest.approx(float(draws.std()), rel=0.25)
    assert isinstance(reports[0], HomeostasisReport)
    assert pickle.loads(pickle.dumps(reports[0])) == reports[0]
    assert reports[0].deqs[""] == SymmetryMeasurement(
        **{field.name: getattr(reports[0], field.name) for field in dataclasses.fields(SymmetryMeasurement)}
    )


def test_measurements_at_the_ends():
    homeostasis = register_homeostasis(deq := torchdeq.get_deq(), 0.0, probes=3)
    weight = contraction(5, 0)
    for matrix, symmetry in ((weight + weight.T, 1.0), (weight - weight.T, 0.0), (0 * weight, 1.0)):
        deq(lambda z, matrix=matrix: 0.1 * z @ matrix.T, torch.zeros(2, 5, dtype=torch.float64))
        last = homeostasis.last
        assert last.symmetry == pytest.approx(symmetry, abs=1e-12)
        assert last.asymmetry == pytest.approx(1 - symmetry, abs=1e-12)
        assert math.isfinite(last.symmetry_se)
    single = register_homeostasis(deq, 0.0, probes=1)
    deq(lambda z: 0.1 * z @ weight.T, torch.zeros(2, 5, dtype=torch.float64))
    assert math.isnan(single.last.penalty_se)
    assert math.isnan(single.last.symmetry_se)


def test_with_a_metric_a_symmetric_weight_has_no_penalty():
    weight, x = contraction(6, 0, symmetric=True), normal(2, 6)
    deq = torchdeq.get_deq(f_tol=1e-12, f_max_iter=200)
    plain = register_homeostasis(deq)
    metrics = [register_homeostasis(deq, metric=metric) for metric in (ActivityMetric("tanh"), "auto")]
    deq(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x))
    assert plain.last.asymmetry > 0.05
    for homeostasis, bound in zip(metrics, (1e-10, 5e-3), strict=True):
        assert homeostasis.last.asymmetry < bound


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_without_it(copied, inject):
    model = _model(core="ep-sliced")
    homeostasis = register_homeostasis(model, lambda step: 1.0, inject=inject)
    kept = homeostasis.penalty
    twin = copied(model)
    before = homeostasis.last
    twin(INPUTS).sum().backward()
    assert homeostasis.last is before
    assert float(kept()) == 0.0
    model(INPUTS)
    model.f = model.states = None  # a closure, and tensors with a graph
    copied(model)  # with a penalty that waits to be taken, too
    assert float(kept().detach()) > 0
    assert list(twin.state_dict()) == list(model.state_dict())


def test_weight_norm_and_reset():
    torch.manual_seed(0)
    model = _model()
    apply_norm(model.layers[0], "weight_norm")
    homeostasis = register_homeostasis(model, 1.0)
    torchdeq.reset_deq(model)
    (model(INPUTS).pow(2).sum() + homeostasis.penalty()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.layers.parameters())


@pytest.mark.parametrize("mixed", [False, True])
def test_under_autocast_a_small_asymmetry_is_still_seen(mixed):
    weight = misaligned(64, 0.01).float().requires_grad_()
    x = normal(8, 64).float()
    deq = torchdeq.get_deq(ift=True, f_max_iter=60)
    tep.use_backward(deq, "ift")  # with torch 2.8, torchdeq's own loses the parameters under autocast
    homeostasis = register_homeostasis(deq, 1.0, probes=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drive = x.bfloat16() if mixed else x  # mixed: linear refuses a bfloat16 bias with a float32 weight

        def f(z):
            if mixed:
                return functional.linear(z, weight, drive[0]).float()
            return functional.linear(z, weight) + drive

        deq(f, torch.zeros_like(x))
        penalty = homeostasis.penalty()
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert torch.isfinite(weight.grad).all()
    if not mixed:
        assert homeostasis.last.asymmetry == pytest.approx(0.01, rel=0.1)


def _twins(**options):
    """A model with an injected penalty, and one whose loop adds it; the same probes."""
    injected, added = _model(), _model()
    return (
        (injected, register_homeostasis(injected, 2.0, **options)),
        (added, register_homeostasis(added, 2.0)),
    )


def test_injected_penalties_have_no_graph_so_that_they_cannot_count_twice():
    (model, homeostasis), _ = _twins(inject=True)
    model(INPUTS)
    penalty = homeostasis.penalty()
    assert float(penalty) > 0
    assert not penalty.requires_grad


@pytest.mark.parametrize("steps", [1, 3])
def test_injection_under_a_grad_scaler(steps):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    (model, _), (twin, homeostasis) = _twins(inject=scaler)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, twin)]
    for _ in range(steps):  # the scale doubles at every step
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(INPUTS).pow(2).sum()).backward()
        scaler.step(optimizers[0])
        scaler.update()
        (twin(INPUTS).pow(2).sum() + homeostasis.penalty()).backward()
        optimizers[1].step()
    assert scaler.get_scale() == 1024.0 * 2**steps
    assert _difference(dict(model.state_dict()), dict(twin.state_dict())) < 1e-9
    wrong, _ = _twins(inject=True)
    scaler.scale(wrong[0](INPUTS).pow(2).sum()).backward()
    scaled = {name: g / scaler.get_scale() for name, g in _gradients(wrong[0]).items()}
    assert _difference(scaled, _loss_gradients(_model())) < 1e-2  # what the scaler is for: else it fades away


@pytest.mark.parametrize("inject", [0.25, lambda: 0.25])
def test_injection_with_gradient_accumulation(inject):
    (model, _), (twin, homeostasis) = _twins(inject=inject)
    for k in range(4):
        batch = INPUTS + k
        (model(batch).pow(2).sum() / 4).backward()
        ((twin(batch).pow(2).sum() + homeostasis.penalty()) / 4).backward()
    assert _difference(_gradients(model), _gradients(twin)) < 1e-9


def test_injection_with_a_retained_graph_is_the_same_loss_twice():
    (model, _), (twin, homeostasis) = _twins(inject=True)
    loss = model(INPUTS).pow(2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    loss = twin(INPUTS).pow(2).sum() + homeostasis.penalty()
    loss.backward(retain_graph=True)
    loss.backward()
    assert _difference(_gradients(model), _gradients(twin)) < 1e-9


def test_injection_into_a_state_of_which_one_tensor_is_used_and_written_to():
    model = _model(tensors=2)
    twin = _model(tensors=2)
    register_homeostasis(model, 2.0, inject=True)
    homeostasis = register_homeostasis(twin, 2.0)
    for each in (model, twin):
        each(INPUTS)
        used = each.states[-1][1]
        if each is model:
            used *= 3.0
            used.sum().backward()
        else:  # torchdeq's own states do not allow that
            (3.0 * used.sum() + homeostasis.penalty()).backward()
    assert _difference(_gradients(model), _gradients(twin)) < 1e-9


def test_an_in_place_change_of_the_returned_state_does_not_reach_the_penalty():
    gradients = []
    for changed in (False, True):
        model = _model()
        homeostasis = register_homeostasis(model, 2.0)
        x = model.encoder(INPUTS)
        z = model.equilibrium(model.deqs[0], model.layers[0], x)
        with torch.no_grad():
            z.mul_(2.0 if changed else 1.0)
        homeostasis.penalty().backward()
        gradients.append(_gradients(model))
    assert _difference(*gradients) == 0.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": -1.0}, "number of at least 0"),
        ({"weight": True}, "number of at least 0"),
        ({"weight": math.nan}, "number of at least 0"),
        ({"weight": {"deqs.0": "much"}}, "number of at least 0"),
        ({"probes": 0}, "probes"),
        ({"probes": 2.0}, "probes"),
        ({"chunk": 0}, "chunk"),
        ({"estimator": "papers"}, "Did you mean 'paper'"),
        ({"every": 0}, "probability between 0 and 1"),
        ({"every": 1.5}, "probability between 0 and 1"),
        ({"every": True}, "probability between 0 and 1"),
        ({"metric": "tanh"}, "'auto' or None"),
        ({"inject": "yes"}, "GradScaler"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(InvalidOptionError, match=match):
        register_homeostasis(_model(), **options)


def test_other_errors():
    with pytest.raises(NoDEQError, match=r"Did you mean 'deqs\.0'"):
        register_homeostasis(_model(), {"deqs.00": 1.0})
    with pytest.raises(NoDEQError, match="no torchdeq DEQ"):
        register_homeostasis(nn.Linear(2, 2))
    model = _model()
    register_homeostasis(model, lambda step: -1.0)
    with pytest.raises(InvalidOptionError, match="number of at least 0"):
        model(INPUTS)
