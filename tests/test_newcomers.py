"""What people who did not know the package ran into, with models of their own."""

import warnings

import pytest
import torch
import torchdeq
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import torchdeq_ep as tep
from torchdeq_ep.errors import (
    AsymmetryWarning,
    InvalidOptionError,
    JacobianProductError,
    MapContractError,
    NoDEQError,
    NudgeDivergedError,
)
from torchdeq_ep.measuring import Comparison, Row


class Dense(nn.Module):
    def __init__(self, reentrant=None, **options):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.deq = torchdeq.get_deq(**{"f_tol": 1e-5, "ift": True} | options)
        self.reentrant = reentrant

    def forward(self, x):
        def cell(z):
            return torch.tanh(z @ self.weight.T + x)

        if self.reentrant is None:
            return self.deq(cell, torch.zeros_like(x))[0][-1]
        return self.deq(lambda z: checkpoint(cell, z, use_reentrant=self.reentrant), torch.zeros_like(x))[0][-1]


def inputs(batch=4):
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(1))


def settled(f, z):
    with torch.no_grad():
        for _ in range(200):
            z = f(z)
    return z


@pytest.mark.parametrize("mode", ["ep", "ift", "aep", "one-step"])
def test_the_relaxation_solver_takes_an_empty_batch(mode):
    model = Dense(f_solver="relaxation")
    with tep.use_backward(model, mode):
        model(inputs()[:0].requires_grad_()).sum().backward()
    assert not model.weight.grad.any()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_named_where_a_product_is_needed():
    model = Dense(reentrant=True)
    with tep.use_backward(model, "ift"), pytest.raises(JacobianProductError, match="use_reentrant=False"):
        model(inputs().requires_grad_()).sum().backward()


def test_a_state_found_in_inference_mode_has_a_gradient():
    weight, x = Dense().weight, inputs()

    def f(z):
        return torch.tanh(z @ weight.T + x)

    with torch.inference_mode():
        found = settled(f, torch.zeros_like(x))
    (got,) = torch.autograd.grad(tep.attach(f, found, "ift").sum(), weight)
    (wanted,) = torch.autograd.grad(tep.attach(f, settled(f, torch.zeros_like(x)), "ift").sum(), weight)
    torch.testing.assert_close(got, wanted)


def test_attach_warns_of_asymmetry_once_where_it_may_remember():
    turn = torch.tensor([[0.1, 0.8], [-0.8, 0.1]], requires_grad=True)
    f, memory = lambda z: z @ turn.T + 1, tep.Memory(lasting=True)
    z = settled(f, torch.zeros(3, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            tep.attach(f, z, "ep", memory=memory).square().sum().backward()
    assert [warning.category for warning in caught] == [AsymmetryWarning]
    assert memory.passes == 3


def test_an_estimate_that_is_not_finite_has_no_residual():
    mode = tep.get_backward("hep-online:steps=400,periods=2,beta=1")
    with pytest.raises(NudgeDivergedError, match="the estimate is not finite"):
        mode(lambda z: z + z**3, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("weight", [True, "on"])
def test_a_wrong_homeostasis_is_told_of_the_automatic_one(weight):
    with pytest.raises(InvalidOptionError, match="'auto'"):
        tep.use_backward(Dense(), "ep", homeostasis=weight)


def test_steps_with_homeostasis_are_told_what_works():
    model = Dense()
    with (
        tep.use_backward(model, "unrolled:k=3", homeostasis="auto"),
        pytest.raises(InvalidOptionError, match=r"register_homeostasis\(module, 20.0, estimator='antisymmetric'"),
    ):
        model(inputs()).sum().backward()
    with tep.use_backward(model, "unrolled:k=3"):
        homeostasis = tep.register_homeostasis(model, 20.0, estimator="antisymmetric")
        (model(inputs()).sum() + homeostasis.penalty()).backward()


def test_a_state_that_is_none_is_told_its_form():
    with pytest.raises(MapContractError, match="values as a tuple"):
        tep.attach(lambda state: state, {"h": torch.zeros(2)})
    with pytest.raises(MapContractError, match="The map comes first"):
        tep.attach(torch.zeros(2), lambda z: z)


def test_a_model_that_attaches_is_told_of_the_loop():
    with pytest.raises(NoDEQError, match=r"tep\.loop"):
        tep.compare(nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1, 2)), functional.mse_loss)


def test_the_summary_tells_what_homeostasis_reached():
    model = Dense()
    with tep.use_backward(model, "ep", homeostasis="auto") as handle:
        model(inputs()).square().sum().backward()
        told = handle.summary()
    assert f"{handle.homeostasis.last.alignment['deq']:.2f} when last measured" in told
    assert "nan" not in repr(handle.homeostasis.last)
    assert "alignment={'deq':" in repr(handle.homeostasis.last)


def test_homeostasis_has_a_hundred_passes_before_asymmetry_is_a_warning():
    model = Dense()
    with torch.no_grad():
        model.weight.copy_(0.9 * torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0])
    with warnings.catch_warnings(record=True) as caught, tep.use_backward(model, "ep", homeostasis="auto"):
        warnings.simplefilter("always")
        for _ in range(100):
            model(inputs()).square().sum().backward()
        assert not [warning for warning in caught if warning.category is AsymmetryWarning]
        model(inputs()).square().sum().backward()
    (told,) = [str(warning.message) for warning in caught if warning.category is AsymmetryWarning]
    assert "Homeostasis has not removed it in 101 passes" in told


def test_a_sentence_has_no_powers_of_ten_above_one():
    row = Row("ep", "own", gradient_error=8.2, milliseconds=123.0)
    assert "(error 8.2) and the fastest (120 ms)" in Comparison((row,), "dense", 8, "cpu", 5).sentence()
