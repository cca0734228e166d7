"""Homeostasis of a model whose activations are made anew in the backward pass."""

import warnings
from functools import partial

import pytest
import torch
import torchdeq
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchdeq_ep as tep
from torchdeq_ep.errors import EPWarning

OPTIONS = {
    "random": {"weight": 1.0},
    "random, in chunks": {"weight": 1.0, "chunk": 2},
    "random, injected": {"weight": 1.0, "inject": True},
    "random, beside": {"weight": 0.5, "estimator": "antisymmetric", "descent": True},
    "error vector": {"weight": lambda step: 1.0 + step, "estimator": "error-vector"},
    "error vector, by itself": {"weight": "auto"},
    "error vector, injected": {"weight": 1.0, "estimator": "error-vector", "inject": True},
    "error vector, beside": {"weight": 0.5, "estimator": "error-vector", "descent": True},
}
SEES_CHECKPOINTS = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell of them"
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.orthogonal_(self.layer.weight, gain=0.5)
        self.deq = torchdeq.get_deq(ift=True, f_max_iter=60, f_tol=1e-9)
        self.double()

    def forward(self, x):
        drive = self.stem(x)
        return self.deq(lambda z: torch.tanh(self.layer(z) + drive), torch.zeros_like(drive))[0][-1]


def trained(options, backward, run):
    """Parameters after three steps, and the penalties on the way."""
    model, x = Model(), torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if backward is not None:
        tep.use_backward(model, backward)
    options = dict(options)
    if options.pop("descent", False):
        options["descent"] = optimizer
    homeostasis, seen = tep.register_homeostasis(model, **options), []
    for _ in range(3):
        optimizer.zero_grad()
        y = run(model, x.requires_grad_())
        (y.square().sum() + homeostasis.penalty()).backward()
        optimizer.step()
        seen.append(homeostasis.last.penalty)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), seen


@SEES_CHECKPOINTS
@pytest.mark.parametrize("backward", [None, "ep", "ift"])
@pytest.mark.parametrize("name", OPTIONS)
def test_activations_made_anew_change_nothing(name, backward):
    if backward is None and "error" in name:
        pytest.skip("it has no error vector")
    plain, anew = (
        trained(OPTIONS[name], backward, run)
        for run in (lambda model, x: model(x), partial(checkpoint, use_reentrant=False))
    )
    torch.testing.assert_close(anew[0], plain[0], rtol=1e-12, atol=1e-14)
    assert anew[1] == pytest.approx(plain[1], rel=1e-12)


@pytest.mark.parametrize("name", ["random", "error vector"])
def test_a_penalty_that_comes_too_late_is_told(name):
    with pytest.warns(EPWarning, match="use_reentrant=False"):
        late, _ = trained(OPTIONS[name], "ep", partial(checkpoint, use_reentrant=True))
    without, _ = trained({"weight": 0.0}, "ep", partial(checkpoint, use_reentrant=True))
    torch.testing.assert_close(late, without, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["random, injected", "error vector, injected"])
def test_an_injected_penalty_is_not_too_late(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", EPWarning)
        trained(OPTIONS[name], "ep", partial(checkpoint, use_reentrant=True))
