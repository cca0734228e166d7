"""Rules of the analytic elementwise functions, without overflow, and mostly made of PyTorch's real kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep.holomorphic.registry import CannotContinueError, rule

_GROUP = "activations"
_ELEMENTARY = "elementary functions"


@rule("exp", _ELEMENTARY, r"$e^x (\cos y + i \sin y)$")
def exp(z: Tensor) -> Tensor:
    """The exponential function, from real kernels: they are vectorised, PyTorch's complex ones are not."""
    modulus = torch.exp(z.real)
    # Adding a mask of -inf leaves NaN in the imaginary part.
    angle = z.imag.masked_fill(modulus == 0, 0)
    return torch.complex(modulus * torch.cos(angle), modulus * torch.sin(angle))


@rule("tanh", _ELEMENTARY, r"$(t (1 + T^2) + i T (1 - t^2)) / (1 + t^2 T^2)$, $t = \tanh x$, $T = \tan y$")
def tanh(z: Tensor) -> Tensor:
    """The hyperbolic tangent, from real kernels."""
    t, tan = torch.tanh(z.real), torch.tan(z.imag)
    square = tan * tan
    denominator = 1 + t * t * square
    return torch.complex(t * (1 + square) / denominator, tan * ((1 - t) * (1 + t)) / denominator)


def _falling(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sign of `Re z`, a constant and never 0, and the parts of `exp(-sign z)`, which cannot overflow."""
    sign = 1 - 2 * (z.real < 0).to(z.real.dtype)
    modulus = torch.exp(-sign * z.real)
    return sign, modulus * torch.cos(z.imag), -sign * modulus * torch.sin(z.imag)


@rule("sigmoid expit", _GROUP, r"$1 / (1 + e^{-z})$, or $e^z / (1 + e^z)$ where $\mathrm{Re}\,z < 0$")
def sigmoid(z: Tensor) -> Tensor:
    """The logistic function, from real kernels and without overflow."""
    sign, a, b = _falling(z)
    numerator = a + torch.exp((1 - sign) * z.real)
    denominator = (1 + a) * (1 + a) + b * b
    return torch.complex(numerator / denominator, -sign * b / denominator)


@rule("log1p", _ELEMENTARY, r"$\frac12 \log(1 + x (2 + x) + y^2) + i\,\mathrm{arg}(1 + z)$")
def log1p(z: Tensor) -> Tensor:
    """`log(1 + z)`. PyTorch's own is NaN at denormal numbers in single precision."""
    return _log1p(z.real, z.imag)


def _log1p(x: Tensor, y: Tensor) -> Tensor:
    return torch.complex(0.5 * torch.log1p(x * (2 + x) + y * y), torch.atan2(y, 1 + x))


def log1p_exp(z: Tensor) -> Tensor:
    """`log(1 + exp(z))` in the strip `|Im z| < pi`, where it has no branch point."""
    sign, a, b = _falling(z)
    return _log1p(a, b) + 0.5 * (1 + sign) * z


@rule(
    "softplus", _GROUP, r"$\log(1 + e^{\beta z}) / \beta$, and $z$ where $\beta\,\mathrm{Re}\,z$ exceeds the threshold"
)
def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:  # noqa: A002
    # Above the threshold PyTorch returns its argument; a continuation that did not would jump there.
    scaled = beta * input
    return torch.where(scaled.real > threshold, input, log1p_exp(scaled) / beta)


@rule("log_sigmoid", _GROUP, r"$-\log(1 + e^{-z})$")
def logsigmoid(input: Tensor) -> Tensor:  # noqa: A002
    """Logarithm of the logistic function."""
    return -log1p_exp(-input)


def _inplace(z: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return z.copy_(value) if inplace else value


@rule("silu", _GROUP, r"$z\,\sigma(z)$")
def _silu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    return _inplace(input, input * sigmoid(input), inplace)


@rule("mish", _GROUP, r"$z \tanh(\log(1 + e^z))$")
def _mish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    return _inplace(input, input * tanh(log1p_exp(input)), inplace)


@rule("gelu", _GROUP, r"$\frac z2 \mathrm{erfc}(-z/\sqrt 2)$ with a complex erfc; $z\,\sigma(2u)$ for the tanh form")
def _gelu(input: Tensor, approximate: str = "none") -> Tensor:  # noqa: A002
    if approximate == "tanh":
        return input * sigmoid(math.sqrt(8 / math.pi) * (input + 0.044715 * input * input * input))
    return 0.5 * input * erfc(input * -math.sqrt(0.5))


@rule("glu", _GROUP, r"$a\,\sigma(b)$")
def _glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    value, gate = input.chunk(2, dim)
    return value * sigmoid(gate)


@rule("tanhshrink", _GROUP, r"$z - \tanh z$")
def _tanhshrink(input: Tensor) -> Tensor:  # noqa: A002
    return input - tanh(input)


@rule("logit", _ELEMENTARY, r"$\log z - \log(1 - z)$")
def _logit(input: Tensor, eps: float | None = None) -> Tensor:  # noqa: A002
    if eps is not None:
        inside = (input.real > eps) & (input.real < 1 - eps)
        input = torch.where(inside, input, input.real.clamp(eps, 1 - eps).to(input.dtype))  # noqa: A001
    return torch.log(input) - log1p(-input)


@rule("pow", _ELEMENTARY, "repeated squaring for small whole exponents, else the principal branch")
def _pow(input: Any, exponent: Any) -> Tensor:  # noqa: A002
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
def _float_power(input: Any, exponent: Any) -> Tensor:  # noqa: A002
    return _pow(input.to(torch.complex128) if isinstance(input, Tensor) else input, exponent)


@rule("xlogy", _ELEMENTARY, r"$x \log z$, zero where $x = 0$")
def _xlogy(input: Any, other: Any) -> Tensor:  # noqa: A002
    x, z = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (input, other))
    zero = x == 0
    return torch.where(zero, 0, x * torch.log(torch.where(zero, 1, z)))


@rule("logaddexp", _ELEMENTARY, r"$\log(e^z + e^w)$")
def _logaddexp(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    return other + log1p_exp(input - other)


@rule("lerp", "arithmetic", "$z + w (y - z)$")
def _lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:  # noqa: A002
    value: Tensor = input + weight * (end - input)
    return value


@rule("addcmul", "arithmetic", "$z + c\\,a b$")
def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:  # noqa: A002
    return input + value * (tensor1 * tensor2)


@rule("addcdiv", "arithmetic", "$z + c\\,a / b$")
def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:  # noqa: A002
    return input + value * (tensor1 / tensor2)


rule("deg2rad", "arithmetic", r"$z\,\pi / 180$")(lambda z: z * (math.pi / 180))
rule("rad2deg", "arithmetic", r"$180\,z / \pi$")(lambda z: z * (180 / math.pi))


def _dropout(draw: Any) -> Any:
    def apply(
        input: Tensor,  # noqa: A002
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
def _alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:  # noqa: A002
    if training and p > 0:
        raise CannotContinueError("it draws other random numbers at every call")
    return input


@rule("erf", _ELEMENTARY, r"Taylor series near 0, else $1 - e^{-z^2} w(iz)$ with Weideman's $w$")
def erf(z: Tensor) -> Tensor:
    """The error function of a complex argument, to about ten units in the last place for `|z| < 10`."""
    small, outer = _erf_parts(z)
    return torch.where(_is_small(z), small, torch.where(z.real < 0, outer - 1, 1 - outer))


@rule("erfc", _ELEMENTARY, r"$1 - \mathrm{erf}(z)$, without cancellation")
def erfc(z: Tensor) -> Tensor:
    """The complementary error function, accurate where it is small."""
    small, outer = _erf_parts(z)
    return torch.where(_is_small(z), 1 - small, torch.where(z.real < 0, 2 - outer, outer))


def _is_small(z: Tensor) -> Tensor:
    return z.real**2 + z.imag**2 < _SERIES_RADIUS**2


_SERIES_RADIUS = 1.0
_SERIES_TERMS = 22


def _erf_parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """`erf(z)` by its series, right where `|z|` is small, and `erfc(+-z)`, the sign such that `Re >= 0`."""
    # Each form is evaluated where it is finite, so that neither spoils a gradient through torch.where.
    small = _is_small(z)
    inner = torch.where(small, z, 0)
    square = inner * inner
    series = torch.zeros_like(z)
    for n in reversed(range(_SERIES_TERMS)):
        series = series * square + (-1) ** n / (math.factorial(n) * (2 * n + 1))
    outer = torch.where(small, 1, torch.where(z.real < 0, -z, z))
    x, y = outer.real, outer.imag
    # (x - y)(x + y) keeps the digits of Re z^2 that x^2 - y^2 loses.
    decay = exp(torch.complex((y - x) * (y + x), -2 * x * y))
    return series * inner * (2 / math.sqrt(math.pi)), decay * _faddeeva(outer)


def _faddeeva(z: Tensor) -> Tensor:
    """`w(iz)` for `Re z >= 0` (Weideman, SIAM J. Numer. Anal. 31:1497, 1994)."""
    scale, coefficients = _weideman(40 if z.dtype == torch.complex128 else 20)
    denominator = 1 / (scale + z)
    ratio = (scale - z) * denominator
    polynomial = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        polynomial = polynomial * ratio + coefficient
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
