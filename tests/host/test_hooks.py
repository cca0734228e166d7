"""Fixed-point hooks on real torchdeq models: when they are called, with what, and what they leave alone."""

import copy
import pickle

import pytest
import torch
import torchdeq
from problems import contraction, relative_error
from torch import nn

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, NoDEQError
from torchdeq_ep.host.hooks import register_fixed_point_hook

CORES = ["sliced", "indexing", "ep-sliced", "ep-indexing"]
INPUTS = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """One state tensor, or two of different shapes."""

    def __init__(self, tensors=1, n=6, **config):
        super().__init__()
        self.encoder, self.layer = nn.Linear(3, n), nn.Linear(n, n)
        self.tensors = tensors
        with torch.no_grad():
            self.layer.weight.copy_(contraction(n, 0, 0.5))
        ift = not config.get("core", "").startswith("ep")
        self.deq = torchdeq.get_deq(**{"ift": ift, "f_max_iter": 60, "f_tol": 1e-11, **config})
        self.calls = 0

    def f(self, *state):
        self.calls += 1
        joined = torch.tanh(self.layer(torch.cat(state, dim=1)) + self.drive)
        return joined if self.tensors == 1 else (joined[:, :2], joined[:, 2:])

    def forward(self, inputs, **kwargs):
        self.drive = self.encoder(inputs)
        start = torch.zeros_like(self.drive)
        start = start if self.tensors == 1 else (start[:, :2], start[:, 2:])
        self.states, self.info = self.deq(self.f, start, **kwargs)
        last = self.states[-1]
        return last if self.tensors == 1 else torch.cat(last, dim=1)


def _model(**config):
    torch.manual_seed(0)
    return Model(**config).double()


class Recorder:
    """A hook that remembers what it was called with, and calls `f` only if asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, f, z_star, deq):
        self.calls.append((f, z_star, deq))
        return "ignored"


def _flat(state):
    return state if isinstance(state, torch.Tensor) else torch.cat([part.flatten(1) for part in state], dim=1)


SEEN = []


def module_level_hook(f, z_star, deq):
    SEEN.append(deq)


# --- what a hook is called with --------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("f_solver", ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("backward", [None, "aep"])
def test_called_once_at_the_equilibrium(core, tensors, f_solver, backward):
    config = {"core": core, "tensors": tensors, "f_solver": f_solver}
    if tensors == 2 and f_solver == "simple_fixed_point_iter":
        config["ift"] = False  # torchdeq's own implicit gradient cannot take the lists of this solver
    if f_solver == "anderson":
        config["f_tol"] = 1e-7  # its ridge keeps it from better
    model, twin = _model(**config), _model(**config)
    if backward:
        tep.use_backward(model, backward)
        tep.use_backward(twin, backward)
    hook = Recorder()
    register_fixed_point_hook(model, hook)
    random_state = torch.get_rng_state()
    out, expected = model(INPUTS), twin(INPUTS)
    assert torch.equal(out, expected)
    assert model.calls == twin.calls  # no call of f by the package itself
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.state_dict()) == list(twin.state_dict())
    ((f, z_star, deq),) = hook.calls
    assert deq is model.deq
    assert type(z_star) is type(model.states[-1])
    assert not _flat(z_star).requires_grad
    assert torch.equal(_flat(z_star), out)
    value = f(z_star)
    assert type(value) is type(z_star)
    assert relative_error(_flat(value).detach(), _flat(z_star)) < 1e-6
    _flat(value).sum().backward()  # f is open to autograd, in its parameters and its inputs
    assert model.layer.weight.grad.any()
    assert model.encoder.weight.grad.any()
    gradients = []
    for each in (model, twin):
        each.zero_grad()
        each(INPUTS).pow(2).sum().backward()
        gradients.append(each.layer.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("options", [{"n_states": 3}, {"indexing": [5, 20]}, {"n_states": 2, "grad": 3, "tau": 0.7}])
def test_sampled_states_do_not_call_it(core, options):
    model = _model(core=core, f_tol=-1.0, **options)  # the solver never stops early, not at a fixed point either
    hook = Recorder()
    register_fixed_point_hook(model, hook)
    model(INPUTS)
    assert len(model.states) > 1
    ((_, z_star, _),) = hook.calls
    assert torch.equal(z_star, model.states[-1])


def test_evaluation_mode_only_if_asked():
    model = _model().eval()
    silent, asked = Recorder(), Recorder()
    register_fixed_point_hook(model, silent)
    register_fixed_point_hook(model, asked, in_eval=True)
    out = model(INPUTS)
    assert not silent.calls
    ((f, z_star, _),) = asked.calls
    assert torch.equal(z_star, out)
    assert relative_error(f(z_star).detach(), z_star) < 1e-9
    model.train()(INPUTS)
    assert len(silent.calls) == 1
    assert len(asked.calls) == 2


def test_the_map_may_be_a_keyword():
    model, hook = _model(), Recorder()
    register_fixed_point_hook(model, hook)
    model.drive = model.encoder(INPUTS)
    model.deq(func=model.f, z_star=torch.zeros_like(model.drive))
    assert hook.calls[0][0] == model.f


def test_every_deq_of_a_model_and_every_call():
    first, second, hook = _model(), _model(core="ep-indexing"), Recorder()
    handle = register_fixed_point_hook(nn.ModuleList([first, second]), hook)
    assert handle.deqs == (first.deq, second.deq)
    first(INPUTS), second(INPUTS), first(INPUTS)
    assert [deq for _, _, deq in hook.calls] == [first.deq, second.deq, first.deq]


# --- switches, order, removal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_switches_before_and_after_and_any_order_of_removal(core):
    model = _model(core=core)
    rules, solver = model.deq.produce_grad, model.deq.f_solver
    hook = Recorder()
    expected = 0

    def forward(hooked):
        nonlocal expected
        expected += hooked
        model(INPUTS).sum().backward()
        assert len(hook.calls) == expected

    before = tep.use_backward(model, "ep")
    handle = register_fixed_point_hook(model, hook)
    after = tep.use_backward(model, "ift")
    forward(True)
    before.remove()
    forward(True)
    handle.remove()
    forward(False)
    assert model.deq.produce_grad[-1].mode == tep.get_backward("ift")
    after.remove()
    forward(False)
    assert model.deq.produce_grad is rules
    assert model.deq.f_solver is solver
    with register_fixed_point_hook(model, hook):
        forward(True)
    forward(False)


def test_several_hooks_run_in_order_and_go_one_by_one():
    model, order = _model(), []
    handles = [register_fixed_point_hook(model, lambda f, z, deq, k=k: order.append(k)) for k in range(3)]
    model(INPUTS)
    handles[1].remove()
    handles[1].remove()
    model(INPUTS)
    with pytest.raises(ZeroDivisionError), handles[0]:
        _ = 1 / 0
    model(INPUTS)
    assert order == [0, 1, 2, 0, 2, 2]


def test_exceptions_pass_through_unchanged():
    class StopError(Exception):
        pass

    error = StopError("here")

    def hook(f, z_star, deq):
        raise error

    model = _model()
    with register_fixed_point_hook(model, hook):
        with pytest.raises(StopError) as caught:
            model(INPUTS)
        assert caught.value is error
    model(INPUTS)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("core", CORES)
def test_copies_keep_the_hook(copied, core):
    model = _model(core=core)
    tep.use_backward(model, "ep")  # torchdeq's own rules are closures, which do not pickle
    handle = register_fixed_point_hook(model, module_level_hook)
    twin = copied(model)
    SEEN.clear()
    twin(INPUTS)
    assert [deq is twin.deq for deq in SEEN] == [True]
    handle.remove()
    model(INPUTS)
    assert len(SEEN) == 1
    assert list(twin.state_dict()) == list(model.state_dict())


# --- what is refused -------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(NoDEQError, match="no torchdeq DEQ"):
        register_fixed_point_hook(nn.Linear(2, 2), module_level_hook)
    with pytest.raises(InvalidOptionError, match="not callable"):
        register_fixed_point_hook(_model(), 3)
