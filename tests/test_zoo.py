"""What real models written against torchdeq do inside `f`, one pattern each; every one trains with EP."""

import pytest
import torch
import torchdeq
from problems import PlainSine, contraction, relative_error
from torch import nn
from torch.nn import functional
from torchdeq.norm import apply_norm
from torchdeq.utils.mem import mem_gc

import torchdeq_ep as tep
from torchdeq_ep.errors import JacobianProductError

TIGHT = {"ift": True, "f_max_iter": 300, "f_tol": 1e-11, "b_max_iter": 300, "b_tol": 1e-11}


def _shrink(module, gain=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(gain)
    return module.double()


class ImplicitGraph(nn.Module):
    """Hidden features in dimension 0, nodes in dimension 1, a sparse adjacency matrix."""

    def __init__(self):
        super().__init__()
        self.weight, self.drive = nn.Parameter(contraction(5, 0, 0.7)), nn.Parameter(torch.randn(5, 9).double())
        self.register_buffer("adjacency", contraction(9, 1, 0.9, symmetric=True).to_sparse())
        self.deq = torchdeq.get_deq(**TIGHT)

    def forward(self):
        def f(x):
            support = torch.spmm(self.adjacency, (self.weight @ x).T).T
            return torch.tanh(support + self.drive)

        return self.deq(f, torch.zeros(5, 9, dtype=torch.float64))[0][-1]


class FlowUpdate(nn.Module):
    """Two coupled states, a gated convolution and the flow it moves, with `grid_sample` and code in place."""

    def __init__(self, core):
        super().__init__()
        self.gate, self.update = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.flow = nn.Conv2d(4, 2, 3, padding=1)
        _shrink(self)
        self.image = nn.Parameter(torch.randn(2, 4, 5, 5, dtype=torch.float64))
        self.deq = torchdeq.get_deq(core=core, **TIGHT)

    def forward(self):
        base = functional.affine_grid(torch.eye(2, 3).double().expand(2, 2, 3), (2, 4, 5, 5), align_corners=False)

        def f(h, flow):
            grid = base + 0.05 * flow.permute(0, 2, 3, 1)
            warped = functional.grid_sample(self.image, grid, align_corners=False)
            inputs = torch.cat([h, flow], 1)
            gate = torch.sigmoid(self.gate(inputs))
            candidate = self.update(inputs).add_(warped).mul_(0.5).tanh_()
            h = (1 - gate) * h * 0.5 + gate * candidate
            return [h, 0.5 * torch.tanh(self.flow(h))]

        zeros = [torch.zeros(2, 4, 5, 5).double(), torch.zeros(2, 2, 5, 5).double()]
        h, flow = self.deq(f, zeros)[0][-1]
        return torch.cat([h, flow], 1)


class NormedTransformer(nn.Module):
    """Time steps in dimension 0, weight norm with non-leaf weights, variational dropout, a causal mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.dropout = torchdeq.dropout.VariationalDropout(0.1)
        self.double()
        apply_norm(self, "weight_norm", args={"norm_target_norm": 0.3, "norm_no_scale": True})
        self.x = nn.Parameter(torch.randn(7, 2, 8, dtype=torch.float64))
        self.deq = torchdeq.get_deq(**TIGHT)

    def forward(self):
        torchdeq.reset_deq(self)
        torch.manual_seed(1)
        self.dropout.mask = torch.ones_like(self.x).bernoulli_(0.9) / 0.9
        mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)

        def f(z):
            q, k, v = self.qkv(z + self.x).chunk(3, -1)
            weights = torch.softmax(torch.einsum("tbd,sbd->bts", q, k) / 8**0.5 + mask, -1)
            attended = torch.einsum("bts,sbd->tbd", weights, v)
            return functional.layer_norm(self.dropout(self.out(attended)) + self.x, (8,)) * 0.5

        return self.deq(f, torch.zeros_like(self.x))[0][-1]


class Spectral(nn.Module):
    """Complex parameters, real Fourier transforms, a state that is read through a view."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(0.2 * torch.randn(3, 5, dtype=torch.complex128))
        self.x = nn.Parameter(torch.randn(2, 3, 8, dtype=torch.float64))
        self.deq = torchdeq.get_deq(**TIGHT)

    def forward(self):
        def f(z):
            filtered = torch.fft.irfft(torch.fft.rfft(z) * self.kernel, n=8)
            return torch.tanh(filtered.transpose(1, 2).contiguous().transpose(1, 2) + self.x)

        return self.deq(f, torch.zeros_like(self.x))[0][-1]


class Custom(nn.Module):
    """A custom Function without vmap and forward mode, control flow that looks at data, a z_init with a gradient."""

    def __init__(self):
        super().__init__()
        self.weight, self.x = nn.Parameter(contraction(6, 0, 0.6)), nn.Parameter(torch.randn(3, 6).double())
        self.deq = torchdeq.get_deq(**TIGHT)

    def forward(self):
        def f(z):
            scale = 1.0 if float(z.detach().abs().max()) < 1e6 else 0.5
            return scale * PlainSine.apply(z @ self.weight.T + self.x)

        return self.deq(f, 0.1 * self.x)[0][-1]


def _takes_products(name):
    """Skips a model that this torch has no product `J u` for: up to 2.8, `grid_sample` is differentiable only once."""
    if not name.startswith("flow"):
        return
    grid, weight = torch.zeros(1, 2, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2, requires_grad=True)
    value = functional.grid_sample(torch.zeros(1, 1, 2, 2), grid, align_corners=False)
    (pulled,) = torch.autograd.grad(value, grid, weight, create_graph=True)
    try:
        torch.autograd.grad(pulled.sum(), weight)
    except RuntimeError as error:
        pytest.skip(str(error))


MODELS = {
    "graph": ImplicitGraph,
    "flow-sliced": lambda: FlowUpdate("sliced"),
    "flow-indexing": lambda: FlowUpdate("indexing"),
    "transformer": NormedTransformer,
    "spectral": Spectral,
    "custom": Custom,
}


def _gradient(model, backward=None):
    model.zero_grad()
    if backward is None:
        model().pow(2).sum().backward()
    else:
        with tep.use_backward(model, backward):
            model().pow(2).sum().backward()
    return torch.cat(
        [torch.view_as_real(p.grad).flatten() if p.is_complex() else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("name", MODELS)
def test_exact_modes_match_implicit_differentiation(name):
    _takes_products(name)
    torch.manual_seed(0)
    model = MODELS[name]()
    reference = _gradient(model)
    for backward in ("ift", "aep"):
        assert relative_error(_gradient(model, backward), reference) < 1e-6, backward


@pytest.mark.parametrize("name", MODELS)
def test_nudges_match_their_limit(name):
    _takes_products(name)
    torch.manual_seed(0)
    model = MODELS[name]()
    limit = _gradient(model, "ep-infinitesimal")
    for backward in ("ep", "ep-richardson"):
        assert relative_error(_gradient(model, backward), limit) < 1e-6, backward


@pytest.mark.parametrize("name", ["graph", "transformer"])
def test_complex_nudges_match_their_limit(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    assert relative_error(_gradient(model, "hep:n_points=6"), _gradient(model, "ep-infinitesimal")) < 1e-6


def test_activation_checkpointing_has_no_forward_product():
    torch.manual_seed(0)
    block = _shrink(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), 0.5)
    x = torch.randn(3, 5, dtype=torch.float64)
    model = nn.ModuleDict({"block": block, "deq": torchdeq.get_deq(**TIGHT)})

    def gradient(backward):
        model.zero_grad()
        with tep.use_backward(model, backward):
            (z,), _ = model["deq"](lambda z: mem_gc(block, (z + x,)), torch.zeros_like(x))
            z.pow(2).sum().backward()
        return block[0].weight.grad.clone()

    exact = gradient("ift")
    assert relative_error(gradient("ep"), exact) < 1  # biased, but there
    with pytest.raises(JacobianProductError, match="'ift'"):
        gradient("aep")
