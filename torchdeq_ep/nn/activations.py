"""Activations that are analytic, so that a complex nudge can be used with them, and the slope of any activation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdeq_ep.holomorphic.context import real_part
from torchdeq_ep.holomorphic.elementwise import sigmoid, sigmoid_of_parts, tanh
from torchdeq_ep.holomorphic.registry import continued
from torchdeq_ep.state import forward_derivative

Activation = Callable[[Tensor], Tensor]
_GAP = 1 - math.exp(-2)
"""`(s(x) - s(x - 2)) / (s(x) s(2 - x))` with the logistic function `s`."""


def _sigmoid(x: Tensor) -> Tensor:
    return sigmoid(x) if x.is_complex() else torch.sigmoid(x)


@continued("torchdeq_ep.nn", r"$\sigma(4 z - 2)$")
def shifted_sigmoid(x: Tensor) -> Tensor:
    """The papers' sigmoid, `1 / (1 + exp(-4 x + 2))`: slope 1 at 1/2, values between 0 and 1.

    Laborieux & Zenke, arXiv 2209.00530 and 2309.02214. It is analytic in the strip `|Im x| < pi / 4`.

    Args:
        x: Real or complex tensor.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> shifted_sigmoid(torch.tensor([0.5, 0.5 + 0.1j]))
        tensor([0.5000+0.0000j, 0.5000+0.1014j])
    """
    if has_torch_function_unary(x):
        return handle_torch_function(shifted_sigmoid, (x,), x)
    if x.is_complex():  # the argument by its parts, so that no complex kernel is called
        return sigmoid_of_parts(4 * x.real - 2, 4 * x.imag)
    return torch.sigmoid(4 * x - 2)


@continued("torchdeq_ep.nn", r"$\sigma(z)\,(1 + z\,\sigma(-z))$")
def dsilu(x: Tensor) -> Tensor:
    """The derivative of SiLU, `s(x) (1 + x (1 - s(x)))` with the logistic function `s`.

    Elfwing et al., Neural Networks 107:3 (2018). It is a sigmoid with overshoots: 1/2 at 0, with slope 1/2, tending to
    0 and 1, between -0.1 and 1.1. It is analytic in the strip `|Im x| < pi`.

    Args:
        x: Real or complex tensor.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> dsilu(torch.tensor([-2.4, 0.0, 2.4]))
        tensor([-0.0998,  0.5000,  1.0998])
    """
    if has_torch_function_unary(x):
        return handle_torch_function(dsilu, (x,), x)
    # 1 - s(x) = s(-x), without cancellation.
    return _sigmoid(x) * (1 + x * _sigmoid(-x))


@continued("torchdeq_ep.nn", r"$(z\,\sigma(z) - (z - 2)\,\sigma(z - 2)) / 2$")
def shifted_dsilu(x: Tensor) -> Tensor:
    """The activation that the papers call dSiLU: the finite difference `(SiLU(x) - SiLU(x - 2)) / 2`.

    It is that of the public code of Laborieux & Zenke, arXiv 2309.02214: like [`dsilu`][torchdeq_ep.nn.dsilu], but
    centred at 1 and a little flatter: 1/2 there with slope 0.43, between -0.09 and 1.09. It is analytic in the strip
    `|Im x| < pi`.

    Args:
        x: Real or complex tensor.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> shifted_dsilu(torch.tensor([-1.8, 1.0, 3.8])).round(decimals=3)
        tensor([-0.0860,  0.5000,  1.0860])
    """
    if has_torch_function_unary(x):
        return handle_torch_function(shifted_dsilu, (x,), x)
    # s(x) - s(x - 2) as a product, without cancellation.
    return _sigmoid(x - 2) + (_GAP / 2) * x * _sigmoid(x) * _sigmoid(2 - x)


ACTIVATIONS: dict[str, tuple[Activation, Activation]] = {
    "tanh": (torch.tanh, lambda value: 1 - value**2),
    "sigmoid": (torch.sigmoid, lambda value: value * (1 - value)),
    "shifted-sigmoid": (shifted_sigmoid, lambda value: 4 * value * (1 - value)),
}
"""The activations that have a name: the function, and its slope as a function of its value."""
_CONTINUED: dict[Activation, Activation] = {torch.tanh: tanh, torch.sigmoid: sigmoid}
"""What stands for PyTorch's own at complex points, outside the mode too."""


def has_closed_slope(phi: Activation) -> bool:
    """Whether the slope of an activation is known in closed form, at real and complex points.

    Args:
        phi: The activation.

    Returns:
        Whether it is `dsilu`, `shifted_dsilu` or one of `ACTIVATIONS`.

    Example:
        >>> has_closed_slope(dsilu), has_closed_slope(torch.sin)
        (True, False)
    """
    return phi in (dsilu, shifted_dsilu) or any(phi is function for function, _ in ACTIVATIONS.values())


@continued("torchdeq_ep.nn", r"$\varphi(z)$ and $\varphi'(z)$ in closed form")
def value_and_slope(phi: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and its derivative in closed form, at complex points too, inside the holomorphic mode or not.

    Args:
        phi: One for which [`has_closed_slope`][torchdeq_ep.nn.activations.has_closed_slope] is true.
        x: Real or complex tensor.

    Returns:
        `phi(x)` and `phi'(x)`, of the shape of `x`.

    Example:
        >>> value_and_slope(shifted_sigmoid, torch.tensor([0.5]))
        (tensor([0.5000]), tensor([1.]))
    """
    if has_torch_function_unary(x):
        found: tuple[Tensor, Tensor] = handle_torch_function(value_and_slope, (x,), phi, x)
        return found
    if phi is dsilu:
        s, rest = _sigmoid(x), _sigmoid(-x)
        return s * (1 + x * rest), s * rest * (2 + x * (rest - s))
    if phi is shifted_dsilu:
        s, rest, above, below = _sigmoid(x), _sigmoid(-x), _sigmoid(x - 2), _sigmoid(2 - x)
        share = (_GAP / 2) * s * below
        return above + x * share, below * above + share * (1 + x * (rest - above))
    slope_of_value = next(slope_of for function, slope_of in ACTIVATIONS.values() if function is phi)
    value = _CONTINUED.get(phi, phi)(x) if x.is_complex() else phi(x)
    return value, slope_of_value(value)


def slope(phi: Activation, x: Tensor) -> Tensor:
    """The derivative of an elementwise activation.

    In closed form for `dsilu`, `shifted_dsilu` and the functions in `ACTIVATIONS`. Any other is differentiated in
    reverse mode at real points, since a custom function need have no other formula, and in forward mode at complex
    ones.

    Args:
        phi: The activation.
        x: Real tensor, or a complex one if `phi` takes it.

    Returns:
        `phi'(x)`, of the shape of `x` and without a graph.

    Example:
        >>> slope(shifted_sigmoid, torch.tensor([0.5])), slope(torch.sin, torch.tensor([0.0]))
        (tensor([1.]), tensor([1.]))
    """
    x = x.detach()
    if has_closed_slope(phi):
        return value_and_slope(phi, x)[1]
    derivative: Tensor
    if x.is_complex():
        return forward_derivative(phi, x, torch.ones_like(x))
    with torch.enable_grad():
        point = x.requires_grad_()
        (derivative,) = torch.autograd.grad(phi(point).sum(), point)
    return derivative


def steepness(phi: Activation, x: Tensor, floor: float) -> Tensor:
    """The absolute value of the slope, bounded from below; at complex points that of the real part, continued.

    Args:
        phi: The activation.
        x: Real tensor, or a complex one if `phi` takes it.
        floor: The bound. It holds where the slope at the real part is no steeper.

    Returns:
        `max(|phi'(x)|, floor)`, of the shape of `x` and without a graph.

    Example:
        >>> steepness(dsilu, torch.tensor([0.0, 3.0, 99.0]), 1e-3).round(decimals=3)
        tensor([0.5000, 0.0320, 0.0010])
    """
    derivative = slope(phi, x)
    if not x.is_complex():
        return derivative.abs().clamp_min(floor)
    real = slope(phi, real_part(x))
    return torch.where(real.abs() > floor, derivative * real.sign(), floor)


class ShiftedSigmoid(nn.Module):
    """Module of [`shifted_sigmoid`][torchdeq_ep.nn.shifted_sigmoid].

    Example:
        >>> ShiftedSigmoid()(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.1192, 0.5000, 0.8808])
    """

    def forward(self, x: Tensor) -> Tensor:
        return shifted_sigmoid(x)


class DSiLU(nn.Module):
    """Module of [`dsilu`][torchdeq_ep.nn.dsilu].

    Example:
        >>> DSiLU()(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return dsilu(x)


class ShiftedDSiLU(nn.Module):
    """Module of [`shifted_dsilu`][torchdeq_ep.nn.shifted_dsilu].

    Example:
        >>> ShiftedDSiLU()(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return shifted_dsilu(x)
