"""Rules of operations that are linear in each tensor: real weights meet the real and imaginary parts separately.

A real factor is never promoted: a product with a complex state costs two real products. Where the parts can be
stacked along a batch they make one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.holomorphic.elementwise import sigmoid, tanh
from torchdeq_ep.holomorphic.registry import CannotContinueError, Operation, rule

_Gates = Callable[[Tensor, Tensor, Any], Any]

_GROUP = "products"
_RESAMPLING = "pooling and resampling"


def join(real: Tensor, imag: Tensor) -> Tensor:
    """The complex tensor of two parts, which autocast may have made too coarse for that."""
    wide = torch.promote_types(real.dtype, torch.float32)
    return torch.complex(real.to(wide), imag.to(wide))


def by_parts(op: Operation, z: Tensor) -> Tensor:
    """`op(z)` for an `op` that is linear over the reals."""
    return join(op(z.real), op(z.imag))


def multilinear(op: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`op(*tensors)`, `op` linear in each: two real calls if one tensor is complex, one complex call otherwise."""
    is_complex = [tensor.is_complex() for tensor in tensors]
    if sum(is_complex) > 1:
        dtype = torch.complex64
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return op(*(tensor.to(dtype) for tensor in tensors))
    position = is_complex.index(True)
    z = tensors[position]
    others = [_match(tensor, z) for tensor in tensors]

    def of_part(part: Tensor) -> Tensor:
        return op(*others[:position], part, *others[position + 1 :])

    return by_parts(of_part, z)


def _match(tensor: Tensor, z: Tensor) -> Tensor:
    """A real factor in the precision of `z`: a state kept in float32 may meet half-precision weights."""
    real = z.dtype.to_real()
    return tensor if tensor.is_complex() or tensor.dtype == real else tensor.to(real)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


@rule("linear", _GROUP, "$W$ on real and imaginary parts, in one product")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input W^T + bias`, any of them complex."""
    if not input.is_complex() and not weight.is_complex():
        value = functional.linear(input, weight)
    elif weight.is_complex() or not _is_dense(weight):
        value = multilinear(functional.linear, input, weight)
    else:
        real, imag = functional.linear(torch.stack((input.real, input.imag)), _match(weight, input))
        if bias is not None and not bias.is_complex():
            return join(real + bias, imag)
        value = join(real, imag)
    return value if bias is None else value + bias


@rule("matmul mm bmm mv spmm smm linalg.matmul sparse.mm", _GROUP, "on the parts of the complex factor")
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """`input @ other`, either or both complex."""
    if input.is_complex() and not other.is_complex() and other.dim() == 2 and _is_dense(other) and input.dim() > 0:
        parts = torch.matmul(torch.stack((input.real, input.imag)), _match(other, input))
        return join(parts[0], parts[1])
    return multilinear(torch.matmul, input, other)


def _product(op: Operation) -> Operation:
    return lambda *tensors: multilinear(op, *tensors)


for _name in ("dot", "inner", "kron", "chain_matmul"):
    rule(_name, _GROUP, "on the parts of the complex factor")(_product(getattr(torch, _name)))


@rule("linalg.multi_dot", _GROUP, "on the parts of the complex factor")
def _multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    return multilinear(lambda *factors: torch.linalg.multi_dot(factors), *tensors)


@rule("tensordot", _GROUP, "on the parts of the complex factor")
def _tensordot(a: Tensor, b: Tensor, dims: Any = 2) -> Tensor:
    return multilinear(lambda x, y: torch.tensordot(x, y, dims), a, b)


@rule("einsum", _GROUP, "on the parts of the complex factor")
def _einsum(equation: str, *operands: Any) -> Tensor:
    if not isinstance(equation, str):
        raise CannotContinueError("the sublist format of einsum has no rule; write the equation as a string")
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    return multilinear(lambda *factors: torch.einsum(equation, *factors), *tensors)


def _plus(product: Operation) -> Operation:
    def apply(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        value: Tensor = product(a, b) if alpha == 1 else alpha * product(a, b)
        return value if beta == 0 else value + (input if beta == 1 else beta * input)

    return apply


for _name in ("addmm", "baddbmm", "addmv", "sspaddmm", "sparse.addmm"):
    rule(_name, _GROUP, "sum of a product and a tensor")(
        _plus(lambda a, b: matmul(a, b) if a.is_complex() or b.is_complex() else torch.matmul(a, b))
    )
rule("addbmm", _GROUP, "sum of a product and a tensor")(
    _plus(lambda a, b: (matmul(a, b) if a.is_complex() or b.is_complex() else torch.matmul(a, b)).sum(0))
)
rule("addr", _GROUP, "sum of a product and a tensor")(_plus(torch.outer))


@rule("bilinear", _GROUP, "$x_1^T W x_2$ on the parts of the complex factor")
def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    value = multilinear(lambda x, y, w: torch.einsum("...i,oij,...j->...o", x, w, y), input1, input2, weight)
    return value if bias is None else value + bias


def _convolution(op: Operation, n_dims: int) -> Operation:
    def apply(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not input.is_complex() and not weight.is_complex():
            value: Tensor = op(input, weight, None, *args, **kwargs)
        elif input.is_complex() and weight.is_complex():
            # Not the complex kernel: its three products mix the small imaginary parts with the real ones.
            value = apply(input, weight.real, None, *args, **kwargs) + 1j * apply(
                input, weight.imag, None, *args, **kwargs
            )
        elif weight.is_complex() or input.dim() == n_dims + 1:
            value = multilinear(lambda x, w: op(x, w, None, *args, **kwargs), input, weight)
        else:
            parts = op(torch.cat((input.real, input.imag)), _match(weight, input), None, *args, **kwargs)
            value = join(*parts.chunk(2))
        return value if bias is None else value + bias.reshape(-1, *(1,) * n_dims)

    return apply


for _dims in (1, 2, 3):
    for _name in (f"conv{_dims}d", f"conv_transpose{_dims}d"):
        rule(_name, "convolutions", "kernel on real and imaginary parts, in one call")(
            _convolution(getattr(functional, _name), _dims)
        )


def _linear_in_input(op: Operation) -> Operation:
    def apply(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(value, Tensor) and value.is_complex() for value in (*args, *kwargs.values())):
            raise CannotContinueError("only its first argument may be complex")
        return by_parts(lambda part: op(part, *args, **kwargs), input)

    return apply


_POOLING = [f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)]
for _name in (*_POOLING, "interpolate", "upsample", "grid_sample", "unfold", "fold"):
    # Named in full: Tensor.unfold is another operation.
    rule(f"nn.functional.{_name}", _RESAMPLING, "on real and imaginary parts")(
        _linear_in_input(getattr(functional, _name))
    )


@rule("nn.functional.pad", _RESAMPLING, "on real and imaginary parts")
def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if mode == "constant":
        return join(functional.pad(input.real, pad, mode, value), functional.pad(input.imag, pad))
    return by_parts(lambda part: functional.pad(part, pad, mode), input)


def _promoted(op: Operation) -> Operation:
    def apply(*tensors: Tensor, **kwargs: Any) -> Any:
        dtype = torch.promote_types(*(tensor.dtype for tensor in tensors))
        return op(*(tensor.to(dtype) for tensor in tensors), **kwargs)

    return apply


for _name in ("linalg.solve", "linalg.solve_triangular"):
    rule(_name, "matrix functions", "complex kernel, both arguments promoted")(_promoted(attrgetter(_name)(torch)))


@rule("scatter_reduce", "indexing", "sum, mean and product; refused for amax and amin")
def _scatter_reduce(
    input: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    if reduce not in ("sum", "mean", "prod"):
        raise CannotContinueError(f"reduce={reduce!r} compares numbers")
    dtype = torch.promote_types(input.dtype, src.dtype)
    return torch.scatter_reduce(input.to(dtype), dim, index, src.to(dtype), reduce, include_self=include_self)


def _half_spectrum(n_dims: int | None) -> Operation:
    """`rfft` of a complex tensor: the transform, cut to the half that PyTorch keeps of a real one."""

    def apply(input: Tensor, *args: Any, norm: str | None = None, **kwargs: Any) -> Tensor:
        transform = {1: torch.fft.fft, 2: torch.fft.fft2, None: torch.fft.fftn}[n_dims]
        full: Tensor = transform(input, *args, norm=norm, **kwargs)
        named = dict(zip(("s", "dim"), args, strict=False)) | kwargs
        last = named.get("dim", -1)
        last = (-1 if last is None else last) if isinstance(last, int | None) else last[-1]
        return full.narrow(last, 0, full.shape[last] // 2 + 1)

    return apply


for _name, _n_dims in (("fft.rfft", 1), ("fft.rfft2", 2), ("fft.rfftn", None)):
    rule(_name, "Fourier transforms", "the complex transform, cut to half the spectrum")(_half_spectrum(_n_dims))


def _cell(name: str, note: str) -> Callable[[_Gates], _Gates]:
    """Decorator: the rule of a recurrent cell, as a function of the projected input and state, and of the state."""

    def register(gates: _Gates) -> _Gates:
        @rule(name, "recurrent cells", note)
        def apply(
            input: Tensor,
            hx: Any,
            w_ih: Tensor,
            w_hh: Tensor,
            b_ih: Tensor | None = None,
            b_hh: Tensor | None = None,
        ) -> Any:
            h = hx if isinstance(hx, Tensor) else hx[0]
            return gates(linear(input, w_ih, b_ih), linear(h, w_hh, b_hh), hx)

        return gates

    return register


@_cell("lstm_cell", "gates with complex sigmoid and tanh")
def _lstm_cell(x: Tensor, h: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = sigmoid(f) * hx[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@_cell("gru_cell", "gates with complex sigmoid and tanh")
def _gru_cell(x: Tensor, h: Tensor, hx: Tensor) -> Tensor:
    reset_x, update_x, new_x = x.chunk(3, -1)
    reset_h, update_h, new_h = h.chunk(3, -1)
    new = tanh(new_x + sigmoid(reset_x + reset_h) * new_h)
    return new + sigmoid(update_x + update_h) * (hx - new)


@_cell("rnn_tanh_cell", "complex tanh")
def _rnn_tanh_cell(x: Tensor, h: Tensor, hx: Tensor) -> Tensor:
    return tanh(x + h)
