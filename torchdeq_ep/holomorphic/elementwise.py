"""Rules of the analytic elementwise functions, without overflow, and mostly made of PyTorch's real kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.holomorphic.registry import CannotContinueError, rule

_GROUP = "activations"
_ELEMENTARY = "elementary functions"


def _parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, each contiguous: real kernels are several times faster on those."""
    return z.real.contiguous(), z.imag.contiguous()


def _sign(x: Tensor) -> Tensor:
    """The sign of a real tensor as a constant of 1 and -1, never 0."""
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x.detach())


@rule("exp", _ELEMENTARY, r"$e^x (\cos y + i \sin y)$")
def exp(z: Tensor) -> Tensor:
    """The exponential function, from real kernels: they are vectorised, PyTorch's complex ones are not."""
    x, y = _parts(z)
    modulus = torch.exp(x)
    # Adding a mask of -inf leaves NaN in the imaginary part.
    y = y.masked_fill(modulus == 0, 0)
    return torch.complex(modulus * torch.cos(y), modulus * torch.sin(y))


@rule("tanh", _ELEMENTARY, r"$(t (1 + T^2) + i T (1 - t^2)) / (1 + t^2 T^2)$, $t = \tanh x$, $T = \tan y$")
def tanh(z: Tensor) -> Tensor:
    """The hyperbolic tangent, from real kernels."""
    x, y = _parts(z)
    t, tan = torch.tanh(x), torch.tan(y)
    square = tan * tan
    scale = (1 + t * t * square).reciprocal()
    return torch.complex(t * (1 + square) * scale, tan * ((1 - t) * (1 + t)) * scale)


@rule("sigmoid expit", _GROUP, r"$s / (s + (1 - s) e^{-iy})$, $s = \sigma(x)$")
def sigmoid(z: Tensor) -> Tensor:
    """The logistic function, from real kernels and without overflow."""
    return sigmoid_of_parts(*_parts(z))


def sigmoid_of_parts(x: Tensor, y: Tensor) -> Tensor:
    """The logistic function of `x + i y`."""
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    real, imag = torch.addcmul(s, rest, torch.cos(y)), rest * torch.sin(y)
    scale = s / torch.addcmul(real * real, imag, imag)
    return torch.complex(real * scale, imag * scale)


@rule("log1p", _ELEMENTARY, r"$\frac12 \log(1 + x (2 + x) + y^2) + i\,\mathrm{arg}(1 + z)$")
def log1p(z: Tensor) -> Tensor:
    """`log(1 + z)`. PyTorch's own is NaN at denormal numbers in single precision."""
    x, y = _parts(z)
    return torch.complex(0.5 * torch.log1p(x * (2 + x) + y * y), torch.atan2(y, 1 + x))


def log1p_exp(z: Tensor) -> Tensor:
    """`log(1 + exp(z))` in the strip `|Im z| < pi`, where it has no branch point.

    It is `log(1 + exp(x)) + log((1 - s) + s exp(iy))` with `s` the logistic function of `x`.
    """
    x, y = _parts(z)
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    half = torch.sin(0.5 * y)
    real = 0.5 * torch.log1p(-4 * s * rest * half * half) - functional.logsigmoid(-x)
    return torch.complex(real, torch.atan2(s * torch.sin(y), torch.addcmul(rest, s, torch.cos(y))))


@rule(
    "softplus", _GROUP, r"$\log(1 + e^{\beta z}) / \beta$, and $z$ where $\beta\,\mathrm{Re}\,z$ exceeds the threshold"
)
def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    # Above the threshold PyTorch returns its argument; a continuation that did not would jump there.
    scaled = beta * input
    return torch.where(scaled.real > threshold, input, log1p_exp(scaled) / beta)


@rule("log_sigmoid", _GROUP, r"$-\log(1 + e^{-z})$")
def logsigmoid(input: Tensor) -> Tensor:
    """Logarithm of the logistic function."""
    return -log1p_exp(-input)


def _inplace(z: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return z.copy_(value) if inplace else value


@rule("silu", _GROUP, r"$z\,\sigma(z)$")
def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _inplace(input, input * sigmoid(input), inplace)


@rule("mish", _GROUP, r"$z \tanh(\log(1 + e^z))$")
def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    return _inplace(input, input * tanh(log1p_exp(input)), inplace)


@rule("gelu", _GROUP, r"$\frac z2 \mathrm{erfc}(-z/\sqrt 2)$ with a complex erfc; $z\,\sigma(2u)$ for the tanh form")
def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return input * sigmoid(math.sqrt(8 / math.pi) * (input + 0.044715 * input * input * input))
    return 0.5 * input * erfc(input * -math.sqrt(0.5))


@rule("glu", _GROUP, r"$a\,\sigma(b)$")
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * sigmoid(gate)


@rule("tanhshrink", _GROUP, r"$z - \tanh z$")
def _tanhshrink(input: Tensor) -> Tensor:
    return input - tanh(input)


@rule("logit", _ELEMENTARY, r"$\log z - \log(1 - z)$")
def _logit(input: Tensor, eps: float | None = None) -> Tensor:
    if eps is not None:
        inside = (input.real > eps) & (input.real < 1 - eps)
        input = torch.where(inside, input, input.real.clamp(eps, 1 - eps).to(input.dtype))
    return torch.log(input) - log1p(-input)


@rule("pow", _ELEMENTARY, "repeated squaring for small whole exponents, else the principal branch")
def _pow(input: Any, exponent: Any) -> Tensor:
    whole = isinstance(exponent, int | float) and float(exponent).is_integer() and 0 < abs(exponent) <= _MAX_SQUARING
    if not whole:
        result: Tensor = torch.pow(input, exponent)
        return result
    power, square, n = None, input, abs(int(exponent))
    while n:
        if n & 1:
            power = square if power is None else power * square
        n >>= 1
        square = square * square if n else square
    assert isinstance(power, Tensor)
    return power if exponent > 0 else power.reciprocal()


_MAX_SQUARING = 64


@rule("float_power", _ELEMENTARY, "as `pow`, in double precision")
def _float_power(input: Any, exponent: Any) -> Tensor:
    return _pow(input.to(torch.complex128) if isinstance(input, Tensor) else input, exponent)


@rule("xlogy", _ELEMENTARY, r"$x \log z$, zero where $x = 0$")
def _xlogy(input: Any, other: Any) -> Tensor:
    x, z = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (input, other))
    zero = x == 0
    return torch.where(zero, 0, x * torch.log(torch.where(zero, 1, z)))


@rule("logaddexp", _ELEMENTARY, r"$\log(e^z + e^w)$")
def _logaddexp(input: Tensor, other: Tensor) -> Tensor:
    return other + log1p_exp(input - other)


@rule("lerp", "arithmetic", "$z + w (y - z)$")
def _lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    if isinstance(weight, int | float) and input.dtype == end.dtype and input.is_complex():
        # A real weight acts on both parts alike: one pass of the real kernel over the pairs.
        start, stop = (torch.view_as_real(z.resolve_conj()) for z in (input, end))
        return torch.view_as_complex(torch.lerp(start, stop, weight))
    value: Tensor = input + weight * (end - input)
    return value


@rule("addcmul", "arithmetic", "$z + c\\,a b$")
def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 * tensor2)


@rule("addcdiv", "arithmetic", "$z + c\\,a / b$")
def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 / tensor2)


rule("deg2rad", "arithmetic", r"$z\,\pi / 180$")(lambda z: z * (math.pi / 180))
rule("rad2deg", "arithmetic", r"$180\,z / \pi$")(lambda z: z * (180 / math.pi))


def _dropout(draw: Any) -> Any:
    def apply(
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool = True,
    ) -> Tensor:
        if not (training and train) or p == 0:
            return input
        return _inplace(input, input * draw(torch.ones_like(input.real), p, True), inplace)

    return apply


for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
    rule(_name, "regularisation", "the mask that a real tensor of this shape is given")(
        _dropout(getattr(functional, _name))
    )


@rule("alpha_dropout feature_alpha_dropout", "regularisation", "identity; refused in training mode")
def _alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    if training and p > 0:
        raise CannotContinueError("it draws other random numbers at every call")
    return input


@rule("erf", _ELEMENTARY, r"Taylor series near 0, else $1 - e^{-z^2} w(iz)$ with Weideman's $w$")
def erf(z: Tensor) -> Tensor:
    """The error function of a complex argument, to about fifty units in the last place for `|z| < 10`."""
    is_small, small, sign, outer = _erf_parts(z)
    return torch.where(is_small, small, sign * (1 - outer))


@rule("erfc", _ELEMENTARY, r"$1 - \mathrm{erf}(z)$, without cancellation")
def erfc(z: Tensor) -> Tensor:
    """The complementary error function, accurate where it is small."""
    is_small, small, sign, outer = _erf_parts(z)
    return torch.where(is_small, 1 - small, (1 - sign) + sign * outer)


_TERMS = {torch.complex64: (11, 20), torch.complex128: (20, 40)}
"""Terms of the Taylor series for `|z| < 1`, and of Weideman's expansion."""


def _erf_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where `|z| < 1`; `erf(z)` by its series, right there; the sign of `Re z`; and `erfc(sign z)`."""
    x, y = _parts(z)
    sign = _sign(x)
    is_small = x * x + y * y < 1
    # The series is kept finite outside its disc, so that it cannot spoil a gradient through torch.where.
    inner = z * is_small
    terms, _ = _TERMS[z.dtype]
    series = _polynomial([(-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in reversed(range(terms))], inner * inner)
    # (x - y)(x + y) keeps the digits of Re z^2 that x^2 - y^2 loses.
    decay = exp(torch.complex((y - x) * (y + x), -2 * x * y))
    return is_small, series * inner * (2 / math.sqrt(math.pi)), sign, decay * _faddeeva(sign * z)


def _polynomial(coefficients: Sequence[float], z: Tensor) -> Tensor:
    """Horner's rule on real and imaginary part, the coefficient of the highest power first."""
    x, y = _parts(z)
    first, *rest = torch.tensor(coefficients, dtype=x.dtype, device=x.device).unbind()
    real, imag = first.expand_as(x), torch.zeros_like(x)
    for coefficient in rest:
        real, imag = (
            torch.addcmul(torch.addcmul(coefficient, real, x), imag, y, value=-1),
            torch.addcmul(imag * x, real, y),
        )
    return torch.complex(real, imag)


def _faddeeva(z: Tensor) -> Tensor:
    """`w(iz)` for `Re z >= 0` (Weideman, SIAM J. Numer. Anal. 31:1497, 1994)."""
    scale, coefficients = _weideman(_TERMS[z.dtype][1])
    denominator = 1 / (scale + z)
    ratio = (scale - z) * denominator
    polynomial = _polynomial(coefficients, ratio)
    return (2 * polynomial * denominator + 1 / math.sqrt(math.pi)) * denominator


@functools.cache
def _weideman(n: int) -> tuple[float, tuple[float, ...]]:
    """The scale and the coefficients, highest power first, of Weideman's expansion in `n` terms."""
    scale = math.sqrt(n / math.sqrt(2))
    theta = torch.arange(-2 * n + 1, 2 * n, dtype=torch.float64) * (math.pi / (2 * n))
    t = scale * torch.tan(theta / 2)
    values = torch.cat((t.new_zeros(1), torch.exp(-t * t) * (scale**2 + t * t)))
    spectrum = torch.fft.fft(torch.fft.fftshift(values)).real / (4 * n)
    return scale, tuple(spectrum[1 : n + 1].flip(0).tolist())
