"""Switching real torchdeq models: what must not change, what must, and what torchdeq gets wrong."""

import copy
import io
import pickle
import sys
import warnings
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchdeq
from problems import contraction, relative_error
from torch import nn
from torchdeq.core import DEQBase
from torchdeq.loss import fp_correction
from torchdeq.norm import apply_norm

import torchdeq_ep as tep
from torchdeq_ep import plugins
from torchdeq_ep.errors import (
    ConvergenceWarning,
    InvalidOptionError,
    LossMismatchWarning,
    MapChangedError,
    NoDEQError,
    NoGradientWarning,
    StochasticMapError,
    TruncationWarning,
    UnknownBackwardError,
)

TIGHT = {"f_max_iter": 200, "f_tol": 1e-12, "b_max_iter": 200, "b_tol": 1e-12}


class DEQModel(nn.Module):
    """A researcher's model: encoder, DEQ over a tanh layer, read-out."""

    def __init__(self, n=6, norm=False, **config):
        super().__init__()
        self.encoder, self.layer, self.readout = nn.Linear(3, n), nn.Linear(n, n), nn.Linear(n, 2)
        with torch.no_grad():
            self.layer.weight.copy_(contraction(n, 0, 0.5))
        self.norm = nn.BatchNorm1d(n) if norm else nn.Identity()
        if norm:
            nn.init.constant_(self.norm.weight, 0.2)
        self.deq = torchdeq.get_deq(**{"ift": True, **TIGHT, **config})
        self.calls = 0

    def f(self, z, x):
        self.calls += 1
        return torch.tanh(0.7 * self.norm(self.layer(z)) + x)

    def forward(self, inputs, **kwargs):
        x = self.encoder(inputs)
        states, self.info = self.deq(lambda z: self.f(z, x), torch.zeros_like(x), **kwargs)
        self.states = states
        return self.readout(states[-1])


def _model(**config):
    torch.manual_seed(0)
    return DEQModel(**config).double()


INPUTS = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gradients(model, inputs=INPUTS, **kwargs):
    model.zero_grad()
    model(inputs, **kwargs).pow(2).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _difference(one, other):
    return max(relative_error(one[name], other[name]) for name in other)


# --- what a switch changes, and what not -----------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("f_solver", ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_exact_modes_give_torchdeqs_implicit_gradient(core, f_solver):
    model = _model(core=core, f_solver=f_solver)
    if f_solver == "anderson":
        model.deq.f_tol = 1e-7  # its ridge keeps it from better
    reference = _gradients(_model(core=core))
    for backward in ("ift", "aep"):
        with tep.use_backward(model, backward):
            assert _difference(_gradients(model), reference) < 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"core": "sliced"},
        {"core": "indexing"},
        {"core": "sliced", "ift": False, "grad": 1},
        {"core": "sliced", "ift": False, "grad": 3, "tau": 0.8},
        {"core": "sliced", "ift": False, "grad": 4, "sup_gap": 2},
        {"core": "sliced", "ift": False, "grad": 3, "sup_loc": [1]},
        {"core": "sliced", "ift": False, "grad": 3, "sup_loc": [1, 3]},
        {"core": "sliced", "n_states": 3},
        {"core": "indexing", "n_states": 3, "f_tol": 1e-30},
        {"core": "sliced", "hook_ift": True},
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_the_forward_pass_stays_bit_equal(config, norm):
    model, twin = _model(norm=norm, **config), _model(norm=norm, **config)
    keys = list(model.state_dict())
    handle = tep.use_backward(model, "ep")
    random_state = torch.get_rng_state()
    out, expected = model(INPUTS), twin(INPUTS)
    assert torch.equal(out, expected)
    assert len(model.states) == len(twin.states)
    assert all(torch.equal(a, b) for a, b in zip(model.states, twin.states, strict=True))
    assert model.calls == twin.calls
    assert list(model.state_dict()) == keys
    after_forward = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in after_forward.items())
    out.sum().backward()
    assert all(torch.equal(value, after_forward[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    handle.remove()
    model.eval(), twin.eval()
    assert torch.equal(model(INPUTS), twin(INPUTS))


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_removing_gives_torchdeqs_gradient_back_bit_for_bit(core):
    model = _model(core=core)
    rules, solver = model.deq.produce_grad, model.deq.f_solver
    before = _gradients(model)
    with tep.use_backward(model, "ep") as handle:
        assert _difference(_gradients(model), before) > 1e-3  # asymmetric weights: EP is biased
        assert handle.deqs == (model.deq,)
    assert model.deq.produce_grad is rules
    assert model.deq.f_solver is solver
    after = _gradients(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_nested_and_repeated_switches():
    model = _model(core="indexing")
    rules, solver = model.deq.produce_grad, model.deq.f_solver

    def mode():
        return model.deq.produce_grad[-1].mode

    first = tep.use_backward(model, "ep")
    second = tep.use_backward(model, "aep")
    third = tep.use_backward(model, "ift")
    second.remove()  # from the middle: the latest stays in force
    assert mode() == tep.get_backward("ift")
    third.remove()
    assert mode() == tep.get_backward("ep")
    third.remove()
    first.remove()
    assert model.deq.produce_grad is rules
    assert model.deq.f_solver is solver
    with pytest.raises(ZeroDivisionError), tep.use_backward(model, "ep"):
        _ = 1 / 0
    assert model.deq.produce_grad is rules


def test_a_switch_between_forward_and_backward_applies_to_the_next_forward():
    model = _model()
    reference = _gradients(model)
    model.zero_grad()
    with tep.use_backward(model, "aep"):
        loss = model(INPUTS).pow(2).sum()
    loss.backward()
    assert relative_error(model.layer.weight.grad, reference["layer.weight"]) < 1e-7


def test_several_deqs_and_one_deq_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = _model(), _model(core="indexing")
            self.glue = nn.Linear(2, 3).double()

        def forward(self, inputs):
            once = self.glue(self.first(inputs))
            return self.second(self.glue(self.second(once)))

    torch.manual_seed(0)
    model = Twice()
    reference = _gradients(model)
    with tep.use_backward(model, "aep") as handle:
        assert len(handle.deqs) == 2
        assert _difference(_gradients(model), reference) < 1e-6


# --- torchdeq's features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("n_states", [2, 4])
def test_sampled_states_keep_their_phantom_gradient(core, n_states):
    config = {"core": core, "n_states": n_states, "f_max_iter": 40, "f_tol": 1e-30}
    model, twin = _model(**config), _model(**config)

    def gradients(model):
        model.zero_grad()
        model(INPUTS)
        target = torch.ones_like(model.states[0])
        fp_correction(nn.functional.mse_loss, (model.states, target), weight_func="exp").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    reference = gradients(twin)
    assert len(twin.states) == n_states
    with tep.use_backward(model, "aep"):
        assert _difference(gradients(model), reference) < 1e-6


def test_indexing_that_converges_early_keeps_its_gradient():
    model = _model(core="indexing", n_states=2, f_max_iter=400)
    exact = _gradients(_model(core="sliced"))
    assert _difference(_gradients(model), exact) > 1e-3  # torchdeq drops implicit differentiation here
    assert len(model.states) == 1
    with tep.use_backward(model, "aep"):
        assert _difference(_gradients(model), exact) < 1e-6
        assert len(model.states) == 2


def test_phantom_gradients_become_equilibrium_gradients():
    exact = _gradients(_model())
    model = _model(ift=False, grad=3, tau=0.5)
    assert _difference(_gradients(model), exact) > 1e-3
    with tep.use_backward(model, "aep"):
        assert _difference(_gradients(model), exact) < 1e-6


def test_backward_writer_receives_statistics():
    model, written = _model(), []
    with tep.use_backward(model, "ep", beta=0.01):
        _gradients(model, backward_writer=written.append)
    (statistics,) = written
    assert statistics["report"].beta == 0.01
    assert statistics["rel_trace"].shape == (1, statistics["report"].iterations)
    assert float(statistics["rel_lowest"]) == pytest.approx(statistics["report"].residual)
    assert {"abs_lowest", "abs_trace", "nstep", "sradius"} <= set(statistics)


def test_solver_kwargs_reach_the_forward_solver():
    model = _model()
    with tep.use_backward(model, "ep"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(INPUTS, solver_kwargs={"f_max_iter": 3, "tau": 0.9})
    assert float(model.info["nstep"].max()) <= 3


@pytest.mark.parametrize("no_stat", [True, False])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_a_state_of_two_coupled_tensors(no_stat, core):
    weight = nn.Parameter(contraction(10, 0, 0.5))
    x = torch.randn(3, 10, dtype=torch.float64)
    solver = "simple_fixed_point_iter" if no_stat else "fixed_point_iter"
    deq = torchdeq.get_deq(core=core, ift=True, f_solver=solver, **TIGHT)

    def f(a, b):
        joint = torch.tanh(torch.cat([a.flatten(1), b], 1) @ weight.T + x)
        return joint[:, :6].reshape(3, 2, 3), joint[:, 6:]

    def gradient():
        zeros = (torch.zeros(3, 2, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))
        ((a, b),), _ = deq(f, zeros)
        (a.pow(2).sum() + b.sin().sum()).backward()
        gradient, weight.grad = weight.grad, None
        return gradient, torch.cat([a.flatten(1), b], 1).detach()

    with tep.use_backward(deq, "aep"):
        got, z = gradient()
    slope = 1 - z**2
    g = torch.cat([2 * z[:, :6], z[:, 6:].cos()], 1)
    eye = torch.eye(10, dtype=torch.float64)
    v = torch.stack(
        [torch.linalg.solve(eye - (s[:, None] * weight.detach()).T, g_row) for s, g_row in zip(slope, g, strict=True)]
    )
    assert relative_error(got, (slope * v).T @ z) < 1e-8


def test_dimension_zero_may_hold_nodes_of_a_graph():
    adjacency = contraction(7, 1, 0.9).to_sparse()
    linear = nn.Linear(4, 4).double()
    with torch.no_grad():
        linear.weight.copy_(contraction(4, 2, 0.6))
    x = torch.randn(7, 4, dtype=torch.float64)
    deq = torchdeq.get_deq(ift=True, **TIGHT)

    def gradient():
        (z,), _ = deq(lambda z: torch.tanh(torch.sparse.mm(adjacency, linear(z)) + x), torch.zeros_like(x))
        z.pow(2).sum().backward()
        gradient, linear.weight.grad = linear.weight.grad, None
        return gradient

    reference = gradient()
    with tep.use_backward(deq, "aep"):
        assert relative_error(gradient(), reference) < 1e-7


def test_coupled_rows_under_a_per_row_solver_are_judged_as_a_whole():
    # Row 0 converges at once, the chain behind it later: per-row bookkeeping mixes rows of different iterates.
    chain = torch.diag(torch.full((5,), 0.95, dtype=torch.float64), -1)
    x = nn.Parameter(torch.ones(6, 1, dtype=torch.float64))
    deq = torchdeq.get_deq(ift=True, **TIGHT)
    with tep.use_backward(deq, "aep", solver="fixed_point_iter"):
        (z,), _ = deq(lambda z: 0.99 * torch.tanh(chain @ z) + x, torch.zeros(6, 1, dtype=torch.float64))
        z.sum().backward()
    slope = 0.99 * (1 - torch.tanh(chain @ z.detach()) ** 2)
    exact = torch.linalg.solve(
        torch.eye(6, dtype=torch.float64) - (slope * chain).T, torch.ones(6, dtype=torch.float64)
    )
    assert relative_error(x.grad[:, 0], exact) < 1e-8


def test_weight_norm_and_variational_dropout():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 6), torchdeq.dropout.VariationalDropout(0.2), nn.Tanh()).double()
    apply_norm(layer, "weight_norm", args={"norm_target_norm": 0.5, "norm_no_scale": True})
    deq = torchdeq.get_deq(ift=True, **TIGHT)
    x = torch.randn(4, 6, dtype=torch.float64)

    def gradient(reset_before_backward=False):
        torch.manual_seed(3)
        torchdeq.reset_deq(layer)
        layer.zero_grad()
        layer[1].mask = torch.ones_like(x).bernoulli_(0.8) / 0.8
        (z,), _ = deq(lambda z: layer(0.9 * z + x), torch.zeros_like(x))
        if reset_before_backward:
            torchdeq.reset_deq(layer)
        z.pow(2).sum().backward()
        return layer[0].weight_v.grad.clone()

    reference = gradient()
    with tep.use_backward(deq, "aep"):
        assert relative_error(gradient(), reference) < 1e-6
        with pytest.raises((MapChangedError, StochasticMapError)):
            gradient(reset_before_backward=True)


def test_an_optimiser_step_between_forward_and_backward_is_refused():
    model = _model()
    with tep.use_backward(model, "ep"):
        loss = model(INPUTS).sum()
        with torch.no_grad():
            for parameter in model.layer.parameters():
                parameter.data.mul_(1.001)
        with pytest.raises(MapChangedError):
            loss.backward()
    assert model.encoder.weight.grad is None


def test_plain_dropout_is_refused():
    linear, dropout = nn.Linear(5, 5), nn.Dropout(0.5)
    deq = torchdeq.get_deq(core="ep-sliced")
    (z,), _ = deq(lambda z: 0.1 * torch.tanh(linear(dropout(z) + 1)), torch.zeros(2, 5))
    with pytest.raises(StochasticMapError):
        z.sum().backward()
    assert linear.weight.grad is None


def test_a_tiny_loss_has_the_right_gradient():
    model = _model()
    reference = _gradients(model)
    with tep.use_backward(model, "aep"):
        model.zero_grad()
        (1e-5 * model(INPUTS).pow(2).sum()).backward()
    assert relative_error(1e5 * model.layer.weight.grad, reference["layer.weight"]) < 1e-7


def test_a_free_phase_that_did_not_converge_is_said():
    model = _model(f_max_iter=2)
    with tep.use_backward(model, "ep"), pytest.warns(ConvergenceWarning, match="f_max_iter"):
        _gradients(model)


def test_evaluation_mode_is_torchdeqs():
    model = _model().eval()
    with tep.use_backward(model, "ep"):
        with pytest.warns(NoGradientWarning):
            model(INPUTS, sradius_mode=True)
        assert model.info["sradius"].shape == (4,)
        out = model(INPUTS)
    assert not model.states[0].requires_grad
    assert out.requires_grad  # through the read-out


def test_z_init_may_require_grad():
    model = _model()
    z0 = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    with tep.use_backward(model, "ep"):
        (z,), _ = model.deq(lambda z: torch.tanh(model.layer(z) + 0.1), z0)
        z.sum().backward()
    assert z0.grad is None


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_one_training_step_under_autocast(core):
    torch.manual_seed(0)
    model = DEQModel(core=core, f_tol=1e-3, f_max_iter=40)
    inputs = INPUTS.float()
    reference = _gradients(model, inputs)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with tep.use_backward(model, "aep"):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(inputs).float().pow(2).sum()
        loss.backward()
        got = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert _difference(got, reference) < 0.03
        optimiser.step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(inputs).float().pow(2).sum() < loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_one_training_step_with_a_compiled_map():
    model = _model()
    reference = _gradients(model)
    compiled = torch.compile(model.f)
    model.f = compiled
    for backward in ("aep", "ep"):
        with tep.use_backward(model, backward):
            difference = _difference(_gradients(model), reference)
        assert difference < 1e-6 if backward == "aep" else 1e-3 < difference < 1


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ModuleList(), "model"])
def test_a_module_without_a_deq(module):
    with pytest.raises(NoDEQError):
        tep.use_backward(module, "ep")


def test_a_deq_of_unknown_make():
    class Custom(DEQBase):
        pass

    with pytest.raises(NoDEQError, match="produce_grad"):
        tep.use_backward(Custom(), "ep")


def test_nothing_is_switched_if_the_mode_is_bad():
    model = _model()
    rules = model.deq.produce_grad
    for backward, options in (("hepp", {}), ("ep", {"betta": 1}), ("ep", {"beta": -1})):
        with pytest.raises((UnknownBackwardError, InvalidOptionError)):
            tep.use_backward(model, backward, **options)
    assert model.deq.produce_grad is rules


# --- loss nudging ----------------------------------------------------------------------------------------------------


def test_loss_nudging_reaches_the_layer_and_ends_with_the_context():
    model = _model()
    handle = tep.use_backward(model, "ep:beta=0.5")

    def loss_of_state(z):
        return model.readout(z).pow(4).sum()

    def gradient(nudged):
        model.zero_grad()
        loss = model(INPUTS).pow(4).sum()
        if nudged:
            with tep.nudge_loss(model, loss_of_state):
                loss.backward()
        else:
            loss.backward()
        return model.layer.weight.grad.clone()

    frozen = gradient(False)
    with pytest.warns(TruncationWarning):
        assert relative_error(gradient(True), frozen) > 0.05  # a finite nudge feels the curvature of the loss
    assert torch.equal(gradient(False), frozen)
    handle.remove()
    with pytest.raises(NoDEQError, match="use_backward"), tep.nudge_loss(model, loss_of_state):
        pass


def test_a_single_nudge_by_the_loss_goes_downhill_where_a_large_one_settles():
    model, losses = _model(), []

    def loss_of_state(z):
        loss = model.readout(z).pow(4).sum()
        losses.append(loss.item())
        return loss

    with (
        tep.use_backward(model, "ep-one-sided:beta=0.5", tol=1e-8),
        tep.nudge_loss(model, loss_of_state),
        pytest.warns(TruncationWarning),
    ):
        model(INPUTS).pow(4).sum().backward()
    assert min(losses) < losses[0]


def test_the_right_loss_is_known_for_it_when_the_free_phase_stopped_early():
    model = _model(f_solver="fixed_point_iter", f_max_iter=2)

    def loss_of_state(z):
        return torch.exp(5 * model.readout(z)).sum()

    with (
        tep.use_backward(model, "ep", tol=0.2),
        tep.nudge_loss(model, loss_of_state),
        pytest.warns(ConvergenceWarning) as caught,
    ):
        torch.exp(5 * model(INPUTS)).sum().backward()
    assert not any(issubclass(warning.category, LossMismatchWarning) for warning in caught)


# --- objects survive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing", "ep-sliced", "ep-indexing"])
@pytest.mark.parametrize("config", [{"ift": True}, {"ift": False, "grad": 2, "n_states": 2}])
def test_switched_models_can_be_copied_and_saved(core, config):
    model = _model(core=core, **config)
    handle = tep.use_backward(model, "aep")
    expected = _gradients(model)
    buffer = io.BytesIO()
    model.states = model.info = None
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        got = _gradients(twin)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    handle.remove()
    assert type(copies[0].deq.produce_grad[-1]).__name__ == "EquilibriumRule"  # a copy is switched by itself


def _near_singular():
    """A DEQ whose map is nearly singular, and its parameter."""
    weight = torch.nn.Parameter(torch.tensor(0.9995))
    deq = torchdeq.get_deq(ift=True, f_max_iter=3, f_tol=1e-12)
    start = torch.linspace(-1, 1, 24).reshape(8, 3)

    def loss():
        states, _ = deq(lambda z: weight * torch.relu(z) + 0.01 * start, start)
        return states[-1].square().sum()

    return deq, weight, loss


@pytest.mark.parametrize("spec", ["ift", "ep", "aep", "ep-one-sided", "ep-infinitesimal"])
def test_a_layer_warns_once_of_a_kind_in_a_training_of_a_hundred_steps(spec):
    deq, weight, loss = _near_singular()
    with warnings.catch_warnings(record=True) as caught, tep.use_backward(deq, spec, max_iter=3) as handle:
        warnings.simplefilter("always")
        for _ in range(100):
            (gradient,) = torch.autograd.grad(loss(), weight)
            assert torch.isfinite(gradient)
    issued = [warning for warning in caught if issubclass(warning.category, tep.errors.EPWarning)]
    about_free_phases = [w for w in issued if str(w.message).startswith("the free phase")]
    assert len(about_free_phases) <= 1
    assert len(issued) - len(about_free_phases) <= 1
    assert "100 backward passes" in handle.summary()
    assert not handle.last[""].converged


def test_a_handle_tells_what_the_passes_reported_and_survives_its_end():
    deq, _, loss = _near_singular()
    with tep.use_backward(deq, "ift", max_iter=3) as handle:
        assert handle.last == {}
        with pytest.warns(tep.errors.ConvergenceWarning):
            loss().backward()
    assert handle.last[""].iterations == 3
    assert "1 backward pass," in handle.summary()
    assert "removed" in repr(handle)
    with tep.use_backward(deq, "ift", max_iter=3) as another:
        assert another.last == {}


def _adapters(monkeypatch, **functions):
    """Plugins that switch other libraries; `None` for one that cannot be imported."""
    module = ModuleType("somebody")
    vars(module).update({name: function for name, function in functions.items() if function is not None})
    monkeypatch.setitem(sys.modules, "somebody", module)
    found = [EntryPoint(name, f"somebody:{name}", plugins.ADAPTERS) for name in functions]
    monkeypatch.setattr("torchdeq_ep.host.switching.entries", lambda group: found)
    monkeypatch.setattr(plugins, "_left_out", set())


def test_homeostasis_is_not_dropped_in_silence_where_another_library_is_switched(monkeypatch):
    removed = []
    _adapters(
        monkeypatch,
        mine=lambda module, backward, **options: SimpleNamespace(remove=lambda: removed.append(backward)),
    )
    assert tep.use_backward(nn.Linear(2, 2), "ep") is not None
    with pytest.raises(InvalidOptionError, match="homeostasis"):
        tep.use_backward(nn.Linear(2, 2), "ep", homeostasis="auto")
    assert removed == ["ep"]


def _broken(module, backward, **options):
    return module.no_such_attribute


def test_a_broken_adapter_is_said_once_by_name_and_keeps_nobody_from_training(monkeypatch):
    handle = SimpleNamespace(remove=lambda: None)
    _adapters(monkeypatch, absent=None, broken=_broken, good=lambda module, backward, **options: handle)
    with pytest.warns(tep.errors.PluginWarning) as caught:
        assert tep.use_backward(nn.Linear(2, 2), "ep") is handle
    first, second = (str(warning.message) for warning in caught)
    assert (
        "the adapter 'absent' of somebody:absent is somebody:absent, which cannot be imported: AttributeError" in first
    )
    assert "the adapter 'broken' of somebody:broken failed with AttributeError: 'Linear' object has no" in second
    assert all(warning.filename == __file__ for warning in caught)
    assert tep.use_backward(nn.Linear(2, 2), "ep") is handle  # a warning would be an error


def test_without_an_adapter_that_works_there_is_no_deq(monkeypatch):
    _adapters(monkeypatch, broken=_broken)
    with pytest.raises(tep.errors.NoDEQError), pytest.warns(tep.errors.PluginWarning):
        tep.use_backward(nn.Linear(2, 2), "ep")


def test_what_an_adapter_refuses_is_said_as_it_says_it(monkeypatch):
    def refuse(module, backward, **options):
        raise InvalidOptionError("this reconstruction has no such option.")

    _adapters(monkeypatch, strict=refuse)
    with pytest.raises(InvalidOptionError, match="no such option"):
        tep.use_backward(nn.Linear(2, 2), "ep")
