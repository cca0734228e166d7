"""Unmodified modules at complex states, and what is refused."""

import pickle
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn import functional as fn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchdeq_ep as tep
from torchdeq_ep import holomorphic
from torchdeq_ep.errors import InvalidOptionError, NotHolomorphicError


class ConvNet(nn.Module):
    """Convolution, group norm, SiLU, attention and a linear layer, with nothing but torch.nn."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.SiLU()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 4)

    def forward(self, z):
        y = self.act(self.norm(self.conv(z)))
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return 0.3 * torch.tanh(self.linear(tokens)).transpose(1, 2).reshape(z.shape)


def make(build):
    torch.manual_seed(0)
    return build().double()


def encoder(norm_first, activation="gelu", **kwargs):
    return nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first, **kwargs
    )


class SelfAttention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)
        self.mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)

    def forward(self, z):
        value, weights = self.attention(z, z, z, attn_mask=self.mask)
        return value + weights.sum()


MODULES = {
    "ConvNet": (ConvNet, (2, 4, 3, 3)),
    "encoder norm last": (lambda: encoder(False), (2, 3, 8)),
    "encoder norm first": (lambda: encoder(True), (2, 3, 8)),
    "encoder eval": (lambda: encoder(False).eval(), (2, 3, 8)),
    "encoder eval norm first": (lambda: encoder(True).eval(), (2, 3, 8)),
    "encoder with SiLU": (lambda: encoder(True, activation=fn.silu, bias=False).eval(), (2, 3, 8)),
    "stacked encoder": (lambda: nn.TransformerEncoder(encoder(False), 2).eval(), (2, 3, 8)),
    "decoder": (lambda: CrossAttention(), (2, 3, 8)),
    "attention with weights": (SelfAttention, (3, 2, 8)),
    "attention with biases": (lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True), (3, 2, 8)),
    "attention eval": (lambda: SelfAttention(batch_first=True).eval(), (2, 3, 8)),
    "LSTMCell": (lambda: Cell(nn.LSTMCell(8, 8)), (3, 8)),
    "GRUCell": (lambda: Cell(nn.GRUCell(8, 8)), (3, 8)),
    "RNNCell": (lambda: Cell(nn.RNNCell(8, 8)), (3, 8)),
    "mixer": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.RMSNorm(8), nn.Mish()),
        (2, 3, 8),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ConvTranspose2d(4, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.PixelShuffle(2),
            nn.ReflectionPad2d(1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Unflatten(1, (1, 4)),
            nn.GLU(-1),
            nn.Dropout(0.0),
            nn.Softmax(-1),
            nn.LogSigmoid(),
        ),
        (2, 2, 4, 4),
    ),
    "bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), (2, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (2, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (2, 4)),
    "local response norm": (lambda: nn.LocalResponseNorm(2), (2, 4, 3, 3)),
}


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.register_buffer("memory", torch.randn(2, 5, 8))

    def forward(self, z):
        return self.layer(z, self.memory)


class Cell(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.register_buffer("x", torch.randn(3, 8))

    def forward(self, z):
        if isinstance(self.cell, nn.LSTMCell):
            return torch.cat(self.cell(self.x, (z, z / 2)))
        return self.cell(self.x, z)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer(z, z + 1)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("no_grad", [True, False])
def test_unmodified_module_is_continued(name, no_grad):
    build, shape = MODULES[name]
    net = make(build)
    z, u = torch.randn(2, *shape, dtype=torch.float64)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.set_grad_enabled(not no_grad):
        with holomorphic.mode():
            stepped = net(z + 1e-20j * u)
            at_axis = net(z + 0j)
        after = {key: value.clone() for key, value in net.state_dict().items()}
        value = net(z)
        # Central differences: the fused kernels have no forward-mode formulas.
        slope = (net(z + 1e-5 * u) - net(z - 1e-5 * u)) / 2e-5
    torch.testing.assert_close(at_axis.real, value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stepped.imag / 1e-20, slope, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(before[key], after[key]) for key in before)
    report = holomorphic.check(net, z)
    assert report, report


@pytest.mark.parametrize("name", ["ConvNet", "encoder eval", "encoder norm first", "images"])
def test_module_under_vmap(name):
    build, shape = MODULES[name]
    net = make(build)
    z = torch.randn(3, *shape, dtype=torch.complex128)
    with torch.no_grad(), holomorphic.mode():
        stacked = torch.vmap(net)(z)
        looped = torch.stack([net(state) for state in z])
    torch.testing.assert_close(stacked, looped)


def in_mode(f):
    return holomorphic.holomorphic_map(f)


@pytest.mark.parametrize(("build", "shape"), [(ConvNet, (2, 4, 3, 3)), (lambda: Small(), (2, 6))])
def test_contour_matches_the_infinitesimal_nudge(build, shape):
    net = make(build)
    z = torch.zeros(shape, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(400):
            z = net(z)
        assert (net(z) - z).norm() < 1e-12
    g = torch.randn(shape, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        exact = tep.InfinitesimalEP(tol=1e-13, max_iter=300)(net, z, g)
    errors = []
    for beta in (0.08, 0.04):
        mode = tep.EquilibriumPropagation(tep.Stencil.contour(beta, 4), tol=1e-13, max_iter=300)
        errors.append(float((mode(in_mode(net), z, g) - exact).norm() / exact.norm()))
    assert 10 < errors[0] / errors[1] < 24, errors  # beta^4
    mode = tep.EquilibriumPropagation(tep.Stencil.contour(0.02, 8), tol=1e-13, max_iter=300)
    value = mode(in_mode(net), z, g)
    assert float((value - exact).norm() / exact.norm()) < 1e-9


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, z):
        return 0.5 * torch.sigmoid(self.norm(z + 1) + self.layer(z)) + torch.linspace(0, 1, 6, dtype=z.dtype.to_real())


class Hidden(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), act])

    def forward(self, z):
        for block in self.blocks:
            z = block(z)
        return z


class RealPart(nn.Module):
    def forward(self, z):
        return z.real + z


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 4))

    def forward(self, z):
        self.last.copy_(z)
        return z


class Absolute(nn.Module):
    def forward(self, z):
        return z * abs(z)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool1d(2)

    def forward(self, z):
        return self.pool(z)


@pytest.mark.parametrize(
    ("act", "operation", "where", "line"),
    [
        (nn.ReLU(), "torch.nn.functional.relu", "Hidden.blocks.1 (ReLU)", "z = block(z)"),
        (Pooled(), "torch.nn.functional.max_pool1d", "Hidden.blocks.1.pool (MaxPool1d)", "return self.pool(z)"),
        (Absolute(), "Tensor.abs", "Hidden.blocks.1 (Absolute)", "return z * abs(z)"),
        (RealPart(), "Tensor.real", "Hidden.blocks.1 (RealPart)", "return z.real + z"),
        (Buffer(), "Tensor.copy_", "Hidden.blocks.1 (Buffer)", "self.last.copy_(z)"),
    ],
)
def test_refusal_names_operation_module_and_line(act, operation, where, line):
    net = Hidden(act)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(NotHolomorphicError) as caught, holomorphic.mode():
        net(torch.randn(2, 4, dtype=torch.complex64))
    message = str(caught.value)
    assert message.startswith(operation + " ")
    assert f"in module {where}" in message
    assert f"({line})" in message
    assert __file__ + ":" in message
    assert "'ep-richardson'" in message
    assert "torchdeq_ep.nn" in message
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


REFUSED = {
    "abs": lambda z: z.abs(),
    "torch.abs": torch.abs,
    "norm": lambda z: z.norm(),
    "linalg.norm": torch.linalg.norm,
    "linalg.vector_norm": torch.linalg.vector_norm,
    "normalize": fn.normalize,
    "cosine_similarity": lambda z: fn.cosine_similarity(z, z),
    "cdist": lambda z: torch.cdist(z, z),
    "real": lambda z: z.real,
    "torch.real": torch.real,
    "imag": lambda z: z.imag,
    "conj": lambda z: z.conj(),
    "mH": lambda z: z.mH,
    "angle": torch.angle,
    "view_as_real": torch.view_as_real,
    "vdot": lambda z: torch.vdot(z[0], z[0]),
    "gt": lambda z: z > 0,
    "le": lambda z: torch.le(z, 0),
    "eq": lambda z: z == z,
    "bool": lambda z: 1 if z.sum() else 0,
    "item": lambda z: z.sum().item(),
    "float()": lambda z: float(z.sum()),
    "numpy": lambda z: z.numpy(),
    "max": lambda z: z.max(),
    "min": lambda z: torch.min(z, 1),
    "amax": lambda z: z.amax(1),
    "argmax": lambda z: z.argmax(),
    "maximum": lambda z: torch.maximum(z, torch.zeros(2, 4)),
    "sort": lambda z: z.sort(),
    "topk": lambda z: z.topk(1),
    "median": lambda z: z.median(),
    "clamp": lambda z: z.clamp(min=0),
    "clamp_": lambda z: z.clone().clamp_(0, 1),
    "relu": torch.relu,
    "relu_": lambda z: z.clone().relu_(),
    "fn.relu_": lambda z: fn.relu_(z.clone()),
    "relu6": fn.relu6,
    "leaky_relu": fn.leaky_relu,
    "prelu": lambda z: fn.prelu(z, torch.ones(1)),
    "elu": fn.elu,
    "celu": fn.celu,
    "selu": fn.selu,
    "hardtanh": fn.hardtanh,
    "hardsigmoid": fn.hardsigmoid,
    "hardswish": fn.hardswish,
    "threshold": lambda z: fn.threshold(z, 0, 0),
    "softshrink": fn.softshrink,
    "softsign": fn.softsign,
    "max_pool2d": lambda z: fn.max_pool2d(z[None], 2),
    "max_pool2d with indices": lambda z: fn.max_pool2d(z[None], 2, return_indices=True),
    "adaptive_max_pool1d": lambda z: fn.adaptive_max_pool1d(z, 2),
    "round": torch.round,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "floor": lambda z: z // 1,
    "float": lambda z: z.float(),
    "double": lambda z: z.double(),
    "to": lambda z: z.to(torch.float32),
    "to other": lambda z: z.to(torch.zeros(1)),
    "type": lambda z: z.type(torch.float32),
    "type_as": lambda z: z.type_as(torch.zeros(1)),
    "sum to real": lambda z: z.sum(dtype=torch.float32),
    "view as real dtype": lambda z: z.view(torch.float32),
    "write into real": lambda z: torch.zeros(2, 4).copy_(z),
    "assign into real": lambda z: torch.zeros(2, 4).__setitem__(0, z[0]),
    "add into real": lambda z: torch.zeros(2, 4).add_(z),
    "iadd into real": lambda z: torch.zeros(2, 4).__iadd__(z),
    "out into real": lambda z: torch.add(z, 1, out=torch.zeros(2, 4)),
    "data into real": lambda z: setattr(torch.zeros(2, 4), "data", z),
    "irfft": lambda z: torch.fft.irfft(z),
    "random": torch.randn_like,
    "unknown": torch.lgamma,
    "unknown aten": lambda z: torch.ops.aten.lgamma(z),
    "aten abs": torch.ops.aten.abs.default,
    "aten relu": torch.ops.aten.relu,
    "l1_loss": lambda z: fn.l1_loss(z, torch.zeros(2, 4)),
    "smooth_l1_loss": lambda z: fn.smooth_l1_loss(z, torch.zeros(2, 4)),
    "svd": lambda z: torch.linalg.svd(z),
    "grad of a real leaf": lambda z: torch.autograd.grad((z * torch.ones(4, requires_grad=True)).sum(), torch.ones(4)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("vmapped", [False, True])
def test_refused(name, vmapped):
    z = torch.randn(2, 4, dtype=torch.complex64)
    with pytest.raises(NotHolomorphicError, match="It was called at"), holomorphic.mode():
        torch.vmap(REFUSED[name])(z[None]) if vmapped else REFUSED[name](z)


def test_unknown_operation_says_how_to_teach_it():
    with pytest.raises(NotHolomorphicError, match=r"lgamma has no rule .*register_rule"), holomorphic.mode():
        torch.lgamma(torch.ones(2, dtype=torch.complex64))


def test_piecewise_operation_says_how_to_allow_it():
    with pytest.raises(NotHolomorphicError, match="real-part"), holomorphic.mode():
        torch.relu(torch.ones(2, dtype=torch.complex64))


def test_unknown_piecewise_option():
    with pytest.raises(InvalidOptionError, match="real-part"):
        holomorphic.mode(piecewise="nearest")


def test_mode_is_local_to_its_thread():
    seen = []
    with holomorphic.mode():
        thread = threading.Thread(target=lambda: seen.append(torch.tensor([3 + 4j]).abs()))
        thread.start()
        thread.join()
    assert float(seen[0]) == 5


def test_real_code_is_left_alone():
    z = torch.randn(3, 4)
    with holomorphic.mode():
        assert float(torch.relu(z).abs().max()) >= 0
        assert torch.equal(fn.max_pool1d(z, 2), fn.max_pool1d(z, 2))


def test_modes_nest():
    with holomorphic.mode(), holomorphic.mode():
        value = fn.gelu(torch.ones(1, dtype=torch.complex64))
    assert value.dtype == torch.complex64
    with tep.state.FrozenStatistics(), holomorphic.mode():
        value = nn.BatchNorm1d(2)(torch.randn(4, 2, dtype=torch.complex64))
    assert value.dtype == torch.complex64


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_inside_the_map_are_continued_however_deep_modes_nest(depth):
    z = torch.complex(torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    with ExitStack() as modes:
        for _ in range(depth):
            modes.enter_context(holomorphic.mode())
        by_vjp = torch.func.vjp(torch.sin, z)[1](torch.ones_like(z))[0]
        point = z.clone().requires_grad_()
        (by_grad,) = torch.autograd.grad(torch.sin(point).sum(), point)
    torch.testing.assert_close(by_vjp, torch.cos(z))
    torch.testing.assert_close(by_grad, torch.cos(z))


def test_half_precision_weights_meet_a_single_precision_state():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.SiLU()).bfloat16()
    with holomorphic.mode():
        assert net(torch.randn(2, 4, dtype=torch.complex64)).dtype == torch.complex64


def test_autocast():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    z = torch.randn(2, 4, dtype=torch.complex64)
    with torch.autocast("cpu", dtype=torch.bfloat16), holomorphic.mode():
        coarse = net(z)
    with holomorphic.mode():
        fine = net(z)
    torch.testing.assert_close(coarse, fine, rtol=0.05, atol=0.05)


def test_holomorphic_map_pickles_and_leaves_real_states_alone():
    wrapped = pickle.loads(pickle.dumps(holomorphic.holomorphic_map(torch.nn.functional.silu)))
    assert wrapped == holomorphic.holomorphic_map(torch.nn.functional.silu)
    z = torch.randn(4)
    assert torch.equal(wrapped(z), fn.silu(z))
    assert wrapped(z + 0j).is_complex()


def test_analytic_autograd_function_needs_no_rule():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.matmul(x, torch.eye(2)) * x

    z = torch.tensor([[1 + 1j, 2j]])
    with holomorphic.mode():
        value = Square.apply(z)
    assert torch.equal(value, z * z)


def test_torchdeq_norms_and_dropout():
    from torchdeq.dropout import VariationalDropout1d
    from torchdeq.norm import apply_norm, reset_norm

    for norm in ("weight_norm", "spectral_norm"):
        net = nn.Sequential(nn.Linear(4, 4), VariationalDropout1d(0.4, token_first=True), nn.Tanh())
        apply_norm(net, norm, args={"norm_type": norm})
        reset_norm(net)
        z = torch.randn(2, 3, 4)
        value = net(z)
        with holomorphic.mode():
            continued = net(z + 0j)
        torch.testing.assert_close(continued.real, value)
