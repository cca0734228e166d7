"""Every rule is the analytic continuation of its operation: against mpmath, interpolation, and forward mode."""

import math

import einops
import pytest
import torch
from torch import nn
from torch.nn import functional as fn

from torchdeq_ep import holomorphic
from torchdeq_ep.nn import dsilu, shifted_sigmoid, softmax_pool
from torchdeq_ep.state import forward_derivative

GENERATOR = torch.Generator().manual_seed(1)


def real(*shape, low=-1.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, generator=GENERATOR, dtype=torch.float64)


def constant(*shape, **kwargs):
    """A real tensor that a case closes over, in the precision of the state it meets."""
    value = real(*shape, **kwargs)
    return lambda z: value.to(z.dtype.to_real() if z.dtype.is_complex else z.dtype)


W34, W33, B3 = constant(3, 4), constant(3, 3), constant(3)
K1, K2, K3 = constant(3, 2, 3), constant(3, 2, 3, 3), constant(3, 2, 2, 2, 2)
T1, T2, T3 = constant(2, 3, 3), constant(2, 3, 3, 3), constant(2, 3, 2, 2, 2)
C2, M2, V2 = constant(2, low=0.5), constant(2), constant(2, low=0.5, high=2)
S4, S24 = constant(4), constant(2, 4)
GRID = constant(1, 3, 3, 2)
BIL = constant(3, 4, 4)
LSTM_I, LSTM_H, LSTM_B = constant(12, 4), constant(12, 3), constant(12)
GRU_I, GRU_H, GRU_B = constant(9, 4), constant(9, 3), constant(9)
H23 = constant(2, 3)
SOFT = torch.softmax(real(2, 4), 1)
CLASSES = torch.tensor([3, 1])
SPARSE = torch.tensor([[0.0, 0.5, 0, 0], [0.3, 0, 0, 0], [0, 0, -0.2, 0.1]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])


def soft(z):
    return SOFT.to(W34(z).dtype)


def inplace(name, *args):
    def apply(z):
        y = z.clone()
        return getattr(y, name)(*args)

    return apply


def fill_buffer(z):
    y = torch.zeros_like(z)
    y[..., 1:] = z[..., 1:] * 2
    y[..., :1] += z[..., :1].exp()
    return y


POSITIVE = {"low": 0.4, "high": 1.6}
# name: (function, shape of the argument, options of the random point)
CASES = {
    "sigmoid": (torch.sigmoid, (2, 4)),
    "Tensor.sigmoid": (lambda z: z.sigmoid(), (2, 4)),
    "Tensor.sigmoid_": (inplace("sigmoid_"), (2, 4)),
    "fn.sigmoid": (fn.sigmoid, (2, 4)),
    "special.expit": (torch.special.expit, (2, 4)),
    "logsigmoid": (fn.logsigmoid, (2, 4)),
    "softplus": (fn.softplus, (2, 4)),
    "softplus beta": (lambda z: fn.softplus(z, beta=2.5), (2, 4)),
    "softplus beyond threshold": (lambda z: fn.softplus(z, threshold=-3), (2, 4)),
    "silu": (fn.silu, (2, 4)),
    "silu inplace": (lambda z: fn.silu(z.clone(), inplace=True), (2, 4)),
    "mish": (fn.mish, (2, 4)),
    "gelu": (fn.gelu, (2, 4)),
    "gelu tanh": (lambda z: fn.gelu(z, approximate="tanh"), (2, 4)),
    "glu": (lambda z: fn.glu(z, -1), (2, 4)),
    "tanh": (torch.tanh, (2, 4)),
    "fn.tanh": (fn.tanh, (2, 4)),
    "tanhshrink": (fn.tanhshrink, (2, 4)),
    "erf": (torch.erf, (2, 4), {"low": -3.0, "high": 3.0}),
    "erfc": (torch.erfc, (2, 4), {"low": -3.0, "high": 3.0}),
    "logit": (torch.logit, (2, 4), {"low": 0.4, "high": 0.6}),
    "exp log": (lambda z: torch.exp(z).add(1).log(), (2, 4)),
    "log1p expm1": (lambda z: torch.log1p(z / 4) + torch.expm1(z), (2, 4)),
    "sqrt rsqrt": (lambda z: torch.sqrt(z) + z.rsqrt(), (2, 4), POSITIVE),
    "trigonometric": (
        lambda z: z.sin() * z.cos() + torch.tan(z / 2) + z.atan() / 9,
        (2, 4),
        {"low": -0.3, "high": 0.3},
    ),
    "hyperbolic": (lambda z: z.sinh() * z.cosh() + z.asinh() / 9, (2, 4), {"low": -0.3, "high": 0.3}),
    "inverse": (lambda z: (z / 3).asin() + (z / 3).acos() * z + (z / 3).atanh() + (z + 4).acosh(), (2, 4)),
    "log2 log10 exp2": (lambda z: z.log2() + z.log10() + z.exp2(), (2, 4), POSITIVE),
    "sinc": (torch.sinc, (2, 4)),
    "square reciprocal": (lambda z: z.square() + (z + 3).reciprocal(), (2, 4)),
    "pow 2": (lambda z: z**2, (2, 4)),
    "pow 5": (lambda z: torch.pow(z, 5), (2, 4)),
    "pow -3": (lambda z: (z + 3).pow(-3), (2, 4)),
    "pow 2.5": (lambda z: z**2.5, (2, 4), POSITIVE),
    "pow tensor": (lambda z: torch.pow(z, S4(z) + 2), (2, 4), POSITIVE),
    "rpow": (lambda z: 2**z + 1.5**z, (2, 4)),
    "float_power": (lambda z: torch.float_power(z, 3).to(z.dtype), (2, 4)),
    "xlogy": (lambda z: torch.xlogy(S4(z), z) + torch.xlogy(z, 2.0), (2, 4), POSITIVE),
    "logaddexp": (lambda z: torch.logaddexp(z, S4(z)) + torch.logaddexp(S4(z), z), (2, 4)),
    "operators": (lambda z: (1 - z) / (3 + z) * z + 2 / (z + 5) - (-z), (2, 4)),
    "in-place arithmetic": (lambda z: z.clone().mul_(2).add_(S4(z)).sub_(1).div_(z + 4).neg_(), (2, 4)),
    "lerp": (lambda z: torch.lerp(z, S4(z).expand_as(z), 0.3) + S4(z).expand_as(z).lerp(z, 0.2), (2, 4)),
    "addcmul addcdiv": (
        lambda z: torch.addcmul(z, z, S24(z), value=0.5) + z.addcdiv(S24(z), z + 3) + S24(z).addcmul(z, z),
        (2, 4),
    ),
    "deg2rad": (lambda z: torch.deg2rad(z) + torch.rad2deg(z), (2, 4)),
    "linear": (lambda z: fn.linear(z, W34(z), B3(z)), (2, 4)),
    "linear vector": (lambda z: fn.linear(z, W34(z)), (4,)),
    "linear batch": (lambda z: fn.linear(z, W34(z), B3(z)), (2, 5, 4)),
    "linear of complex weight": (lambda z: fn.linear(S24(z), z, B3(z)) + fn.linear(z, z, z[:, 0])[:2], (3, 4)),
    "linear of complex bias": (lambda z: fn.linear(S24(z), W34(z), z), (3,)),
    "bilinear": (lambda z: fn.bilinear(z, S24(z), BIL(z), B3(z)), (2, 4)),
    "bilinear both": (lambda z: fn.bilinear(z, z, BIL(z), B3(z)), (2, 4)),
    "matmul": (lambda z: torch.matmul(z, W34(z).T), (2, 4)),
    "matmul left": (lambda z: torch.matmul(W34(z), z), (4, 2)),
    "@": (lambda z: z @ W34(z).T, (5, 2, 4)),
    "@ left": (lambda z: W34(z) @ z, (4,)),
    "@ both": (lambda z: z @ z.mT, (2, 4)),
    "@ vector": (lambda z: z @ S4(z), (2, 4)),
    "Tensor.__rmatmul__": (lambda z: z.__rmatmul__(W34(z)), (4, 2)),
    "mm": (lambda z: torch.mm(W34(z), z) + W34(z).mm(z), (4, 2)),
    "bmm": (lambda z: torch.bmm(z, S24(z).expand(2, 2, 4).mT), (2, 3, 4)),
    "bmm left": (lambda z: S24(z).expand(2, 2, 4).bmm(z), (2, 4, 3)),
    "mv": (lambda z: torch.mv(z, S4(z)) + z.mv(z[0]), (2, 4)),
    "dot": (lambda z: torch.dot(z, S4(z)) + S4(z).dot(z) + z.dot(z), (4,)),
    "inner outer": (lambda z: torch.inner(z, W34(z)) + torch.outer(z, S4(z)).sum(), (4,)),
    "kron": (lambda z: torch.kron(z, W34(z)), (2, 2)),
    "multi_dot": (lambda z: torch.linalg.multi_dot([z, W34(z).T, W33(z)]), (2, 4)),
    "tensordot": (lambda z: torch.tensordot(z, BIL(z), 2), (3, 4)),
    "einsum": (lambda z: torch.einsum("bi,oi->bo", z, W34(z)), (2, 4)),
    "einsum both": (lambda z: torch.einsum("bi,oij,bj->bo", z, BIL(z), z), (2, 4)),
    "addmm": (lambda z: torch.addmm(B3(z), z, W34(z).T, beta=0.5, alpha=2), (2, 4)),
    "addmm of complex input": (lambda z: torch.addmm(z, S24(z), W34(z).T), (2, 3)),
    "Tensor.addmm": (lambda z: H23(z).addmm(z, W34(z).T), (2, 4)),
    "baddbmm": (lambda z: torch.baddbmm(z[:, :, :3], z, z.mT, alpha=0.5), (2, 3, 4)),
    "addbmm": (lambda z: torch.addbmm(W33(z), z, BIL(z)[:2, :, :3]), (2, 3, 4)),
    "addmv addr": (lambda z: torch.addmv(B3(z), W34(z), z) + torch.addr(W34(z), B3(z), z).sum(1), (4,)),
    "sparse": (lambda z: SPARSE.to(W34(z).dtype).to_sparse() @ z, (4, 2)),
    "sparse.mm": (lambda z: torch.sparse.mm(SPARSE.to(W34(z).dtype).to_sparse(), z), (4, 2)),
    "conv1d": (lambda z: fn.conv1d(z, K1(z), B3(z), padding=1), (2, 2, 5)),
    "conv1d unbatched": (lambda z: fn.conv1d(z, K1(z), B3(z), stride=2), (2, 5)),
    "conv2d": (lambda z: fn.conv2d(z, K2(z), B3(z), padding=1, dilation=2), (2, 2, 5, 5)),
    "conv2d groups": (lambda z: fn.conv2d(z, K2(z)[:2, :1], None, 1, "same", 1, 2), (2, 2, 4, 4)),
    "torch.conv2d": (lambda z: torch.conv2d(z, K2(z)), (2, 2, 4, 4)),
    "conv2d of complex weight": (lambda z: fn.conv2d(z[:, :2], z.transpose(0, 1)[:1, :2]), (2, 3, 3, 3)),
    "conv3d": (lambda z: fn.conv3d(z, K3(z), B3(z)), (2, 2, 3, 3, 3)),
    "conv_transpose1d": (lambda z: fn.conv_transpose1d(z, T1(z), B3(z), stride=2), (2, 2, 4)),
    "conv_transpose2d": (lambda z: fn.conv_transpose2d(z, T2(z), B3(z), 2, 1, 1), (2, 2, 3, 3)),
    "conv_transpose3d": (lambda z: fn.conv_transpose3d(z, T3(z), B3(z)), (1, 2, 2, 2, 2)),
    "avg_pool1d": (lambda z: fn.avg_pool1d(z, 2, padding=1), (2, 2, 5)),
    "avg_pool2d": (lambda z: fn.avg_pool2d(z, 3, 2, 1, False, False), (2, 2, 5, 5)),
    "avg_pool3d": (lambda z: fn.avg_pool3d(z, 2), (1, 2, 4, 4, 4)),
    "adaptive_avg_pool": (lambda z: fn.adaptive_avg_pool2d(z, (5, 3)) + fn.adaptive_avg_pool1d(z[0], 3), (2, 2, 5, 5)),
    "adaptive_avg_pool3d": (lambda z: fn.adaptive_avg_pool3d(z, 2), (1, 2, 3, 3, 3)),
    "interpolate nearest": (lambda z: fn.interpolate(z, scale_factor=2.0), (1, 2, 3, 3)),
    "interpolate bilinear": (lambda z: fn.interpolate(z, size=(5, 7), mode="bilinear"), (1, 2, 3, 3)),
    "interpolate linear": (lambda z: fn.interpolate(z, size=7, mode="linear", align_corners=True), (1, 2, 3)),
    "grid_sample": (lambda z: fn.grid_sample(z, GRID(z), align_corners=False), (1, 2, 3, 3)),
    "fold": (lambda z: fn.fold(fn.unfold(z, 2), (3, 3), 2), (1, 2, 3, 3)),
    "Tensor.unfold": (lambda z: z.unfold(1, 2, 1).sum(-1), (2, 4)),
    "pixel_shuffle": (lambda z: fn.pixel_unshuffle(fn.pixel_shuffle(z, 2), 2) + z, (1, 4, 2, 2)),
    "pad": (lambda z: fn.pad(z, (1, 2), value=0.7), (2, 4)),
    "pad reflect": (lambda z: fn.pad(z, (1, 2), mode="reflect") + fn.pad(z, (1, 2), "replicate"), (1, 2, 4)),
    "pad circular": (lambda z: fn.pad(z, (1, 1), mode="circular"), (1, 2, 4)),
    "layer_norm": (lambda z: fn.layer_norm(z, (4,), S4(z), S4(z)), (2, 4)),
    "torch.layer_norm": (lambda z: torch.layer_norm(z, (2, 4)), (3, 2, 4)),
    "rms_norm": (lambda z: fn.rms_norm(z, (4,), S4(z), 1e-3), (2, 4)),
    "rms_norm default": (lambda z: fn.rms_norm(z, (4,)), (2, 4)),
    "group_norm": (lambda z: fn.group_norm(z, 2, S4(z), S4(z)), (2, 4, 3)),
    "torch.group_norm": (lambda z: torch.group_norm(z, 2), (2, 4, 3)),
    "batch_norm train": (lambda z: fn.batch_norm(z, None, None, C2(z), M2(z), True), (3, 2, 4)),
    "batch_norm eval": (lambda z: fn.batch_norm(z, M2(z), V2(z), C2(z), M2(z)), (3, 2)),
    "torch.batch_norm": (lambda z: torch.batch_norm(z, C2(z), M2(z), M2(z), V2(z), False, 0.1, 1e-5, True), (3, 2, 4)),
    "instance_norm": (lambda z: fn.instance_norm(z, weight=C2(z), bias=M2(z)), (3, 2, 4)),
    "instance_norm eval": (lambda z: fn.instance_norm(z, M2(z), V2(z), use_input_stats=False), (3, 2, 4)),
    "local_response_norm": (lambda z: fn.local_response_norm(z, 3, alpha=0.5), (2, 4, 3)),
    "local_response_norm 2d": (lambda z: fn.local_response_norm(z, 2, alpha=0.5), (2, 4, 3, 3)),
    "var": (lambda z: torch.var(z, 1) + z.var(1, keepdim=False, unbiased=False) + torch.var(z) + z.var((0, 1)), (2, 4)),
    "std": (lambda z: torch.std(z, -1, correction=0) + z.std(dim=1), (2, 4)),
    "var_mean": (lambda z: torch.stack(torch.var_mean(z, 1) + torch.std_mean(z, 1, keepdim=True)[:0]), (2, 4)),
    "softmax": (lambda z: torch.softmax(z, 1), (2, 4)),
    "fn.softmax": (lambda z: fn.softmax(z, dim=-1), (2, 4)),
    "Tensor.softmax": (lambda z: z.softmax(0), (2, 4)),
    "softmin": (lambda z: fn.softmin(z, dim=0), (2, 4)),
    "log_softmax": (lambda z: fn.log_softmax(z, 1) + torch.log_softmax(z, 1) + z.log_softmax(-1), (2, 4)),
    "logsumexp": (lambda z: torch.logsumexp(z, 1) + z.logsumexp((1,)), (2, 4)),
    "logsumexp of two dims": (lambda z: torch.logsumexp(z, (0, 1), keepdim=True), (2, 4)),
    "attention": (lambda z: fn.scaled_dot_product_attention(z, z * 2, z + 1), (2, 3, 4)),
    "attention causal": (lambda z: fn.scaled_dot_product_attention(z, z, z, is_causal=True, scale=0.3), (2, 3, 4)),
    "attention mask": (lambda z: fn.scaled_dot_product_attention(z, z, z, attn_mask=MASK), (2, 3, 4)),
    "attention real query": (lambda z: fn.scaled_dot_product_attention(S24(z), S24(z), z), (2, 3)),
    "attention bias": (lambda z: fn.scaled_dot_product_attention(z, z, z, attn_mask=W33(z)), (2, 3, 4)),
    "attention gqa": (
        lambda z: fn.scaled_dot_product_attention(z, z[:, :2], z[:, :2], enable_gqa=True),
        (1, 4, 3, 4),
    ),
    "mse_loss": (lambda z: fn.mse_loss(z, S24(z)), (2, 4)),
    "mse_loss sum": (lambda z: fn.mse_loss(S24(z), z, reduction="sum"), (2, 4)),
    "cross_entropy": (lambda z: fn.cross_entropy(z, CLASSES), (2, 4)),
    "cross_entropy weighted": (
        lambda z: fn.cross_entropy(z, CLASSES, weight=S4(z).abs(), label_smoothing=0.1, ignore_index=1),
        (2, 4),
    ),
    "cross_entropy smoothed": (lambda z: fn.cross_entropy(z, CLASSES, label_smoothing=0.1), (2, 4)),
    "cross_entropy smoothed weighted": (
        lambda z: fn.cross_entropy(z, CLASSES, weight=S4(z).abs(), label_smoothing=0.1),
        (2, 4),
    ),
    "cross_entropy none": (lambda z: fn.cross_entropy(z, CLASSES, reduction="none"), (2, 4)),
    "cross_entropy soft": (lambda z: fn.cross_entropy(z, soft(z), label_smoothing=0.2), (2, 4)),
    "cross_entropy soft weighted": (lambda z: fn.cross_entropy(z, soft(z), weight=S4(z).abs()), (2, 4)),
    "cross_entropy images": (lambda z: fn.cross_entropy(z, CLASSES.expand(3, 2).T), (2, 4, 3)),
    "cross_entropy unbatched": (lambda z: fn.cross_entropy(z, CLASSES[0]), (4,)),
    "nll_loss": (lambda z: fn.nll_loss(z, CLASSES), (2, 4)),
    "kl_div": (lambda z: fn.kl_div(z, soft(z), reduction="batchmean"), (2, 4)),
    "bce_with_logits": (lambda z: fn.binary_cross_entropy_with_logits(z, soft(z), pos_weight=S4(z) + 2), (2, 4)),
    "bce": (lambda z: fn.binary_cross_entropy(z, soft(z)), (2, 4), {"low": 0.4, "high": 0.6}),
    "soft_margin_loss": (lambda z: fn.soft_margin_loss(z, S24(z).sign()), (2, 4)),
    "multilabel_soft_margin_loss": (lambda z: fn.multilabel_soft_margin_loss(z, soft(z)), (2, 4)),
    "embedding and cat": (
        lambda z: torch.cat([z, fn.embedding(CLASSES, W34(z).T), torch.stack([z[0], z[1]])], 1),
        (2, 3),
    ),
    "indexing": (lambda z: z[:, [0, 2]] + z[torch.tensor([1, 0])][:, 1:3] + z.index_select(1, CLASSES), (2, 4)),
    "masks": (lambda z: z.masked_fill(MASK, 0.5) + torch.where(MASK, z, z * z) + z.gather(1, MASK.long()), (3, 3)),
    "scatter": (
        lambda z: torch.zeros_like(z).scatter_add(0, CLASSES.expand(4, 2).T % 2, z) + z.index_add(0, CLASSES % 2, z),
        (2, 4),
    ),
    "scatter_reduce": (
        lambda z: torch.zeros(2, 4, dtype=W34(z).dtype).scatter_reduce(0, CLASSES.expand(4, 2).T % 2, z, "sum"),
        (2, 4),
    ),
    "shapes": (
        lambda z: torch.roll(z.reshape(4, 2).T.flip(0).repeat(1, 2).unflatten(1, (2, 4)).transpose(0, 1).sum(0), 1, 1),
        (2, 4),
    ),
    "reductions": (lambda z: z.sum(1) + z.mean(1) + z.cumsum(1)[:, 2] + z.prod(1) + z.cumprod(1)[:, 1], (2, 4)),
    "nan_to_num diff": (lambda z: torch.nan_to_num(z).diff(dim=1) + torch.gradient(z, dim=1)[0][:, 1:], (2, 4)),
    "jvp": (lambda z: torch.func.jvp(torch.tanh, (z,), (z,))[1], (2, 4)),
    "vjp": (lambda z: torch.func.vjp(torch.sigmoid, z)[1](z)[0], (2, 4)),
    "grad": (lambda z: torch.func.grad(lambda y: fn.softplus(y).sum())(z), (2, 4)),
    "einops": (lambda z: einops.rearrange(z, "a (b c) -> (a b) c", c=2), (2, 4)),
    "fill a buffer": (fill_buffer, (2, 4)),
    "inverse matrix": (lambda z: torch.linalg.inv(z + 4 * torch.eye(3)) + torch.linalg.matrix_exp(z), (3, 3)),
    "solve": (lambda z: torch.linalg.solve(W33(z) + 4 * torch.eye(3), z) + torch.det(z), (3, 3)),
    "fft": (lambda z: torch.fft.ifft(torch.fft.fft(z) * S4(z)) + torch.fft.ifft2(torch.fft.fft2(z)), (2, 4)),
    "rfft": (lambda z: (torch.fft.rfft(z) ** 2 + 0).sum(-1) + torch.fft.rfft2(z, norm="ortho").sum(), (2, 5)),
    "rfftn": (lambda z: torch.fft.rfftn(z, dim=(0, 1)) + 0j, (2, 4)),
    "lstm_cell": (
        lambda z: torch.cat(torch.lstm_cell(z, (H23(z), H23(z)), LSTM_I(z), LSTM_H(z), LSTM_B(z), LSTM_B(z))),
        (2, 4),
    ),
    "gru_cell": (lambda z: torch.gru_cell(z, H23(z), GRU_I(z), GRU_H(z), GRU_B(z), GRU_B(z)), (2, 4)),
    "rnn_tanh_cell": (lambda z: torch.rnn_tanh_cell(z, H23(z), W34(z), W33(z), B3(z), B3(z)), (2, 4)),
    "dropout off": (
        lambda z: fn.dropout(z, 0.5, training=False) + fn.dropout1d(z, 0.0) + torch.dropout(z, 0.5, False),
        (2, 3, 4),
    ),
    "shifted_sigmoid": (shifted_sigmoid, (2, 4), {"low": 0.0, "high": 0.5}),
    "dsilu": (dsilu, (2, 4)),
    "softmax_pool": (lambda z: softmax_pool(z, 3, 2, 1, 0.7), (2, 5, 5)),
    "softmax_pool 1d": (lambda z: softmax_pool(z, 2, n_dims=1), (2, 6)),
    "aten": (lambda z: torch.ops.aten.mul(torch.ops.aten.tanh.default(z), 2.0) + torch.ops.aten.sigmoid(z), (2, 4)),
}
NO_VMAP = {"sparse", "sparse.mm"}
NO_FORWARD = {"grid_sample", "attention gqa"}
REAL_IS_COMPLEX = {"fft", "rfft", "rfftn"}


def case(name):
    f, shape, *options = CASES[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(len(name))
    low, high = (options[0]["low"], options[0]["high"]) if options else (-1.0, 1.0)
    x = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    u = torch.randn(shape, generator=generator, dtype=torch.float64)
    return f, x, 0.15 * u / u.abs().max()


def interpolated(g, t, n=26):
    """The polynomial through `g` at `n` Chebyshev points of [-1, 1], at a complex `t` (barycentric form)."""
    nodes = [math.cos(math.pi * (k + 0.5) / n) for k in range(n)]
    weights = [(-1) ** k * math.sin(math.pi * (k + 0.5) / n) / (t - node) for k, node in enumerate(nodes)]
    return sum(w * g(node) for w, node in zip(weights, nodes, strict=True)) / sum(weights)


def close(actual, expected, tol):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = 1 + expected.abs().max()
    assert float((actual - expected).abs().max() / scale) < tol


@pytest.mark.parametrize("name", CASES)
def test_rule_is_the_analytic_continuation(name):
    f, x, u = case(name)
    with torch.no_grad():
        for t in (0.7 + 0j, 0.4 + 0.5j, -0.3 - 0.4j):
            with holomorphic.mode():
                value = f(x + t * u)
            close(value, interpolated(lambda s: f(x + s * u), t).to(torch.complex128), 2e-11)


@pytest.mark.parametrize("name", CASES)
def test_rule_in_single_precision(name):
    f, x, u = case(name)
    z = x + (0.4 + 0.5j) * u
    with torch.no_grad(), holomorphic.mode():
        wide = f(z)
        value = f(z.to(torch.complex64))
    close(value.to(torch.complex128), wide, 2e-5)


@pytest.mark.parametrize("name", sorted(CASES.keys() - NO_VMAP))
def test_rule_under_vmap(name):
    f, x, u = case(name)
    z = torch.stack([x + t * u for t in (0.4 + 0.5j, -0.3 - 0.4j, 0.7 + 0j)])
    with torch.no_grad(), holomorphic.mode():
        stacked = torch.vmap(f)(z)
        looped = torch.stack([f(state) for state in z])
    close(stacked, looped, 1e-13)


@pytest.mark.parametrize("name", sorted(CASES.keys() - REAL_IS_COMPLEX - NO_VMAP - NO_FORWARD))
def test_complex_step_is_the_forward_derivative(name):
    f, x, u = case(name)
    step = 1e-20
    tangent = forward_derivative(f, x, u)
    with torch.no_grad(), holomorphic.mode():
        value = f(x + 1j * step * u)
    close(value.imag / step, tangent, 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_norm_layers_never_touch_their_statistics(training):
    net = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)).double().train(training)
    net(torch.randn(4, 3, 5, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with holomorphic.mode():
        net(torch.randn(4, 3, 5, dtype=torch.complex128))
        net(torch.randn(4, 3, 5, dtype=torch.float64))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_gradient_of_a_holomorphic_energy_is_its_complex_derivative():
    def force(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            energy = torch.nn.functional.softplus(z).sum() + (z**3).sum()
            return torch.autograd.grad(energy, z)[0]

    z = torch.tensor([0.3 + 0.2j, -0.5 + 0.1j], dtype=torch.complex128)
    with holomorphic.mode():
        value = force(z)
        expected = torch.sigmoid(z) + 3 * z**2
    torch.testing.assert_close(value, expected)
