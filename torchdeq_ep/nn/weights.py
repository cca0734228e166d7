"""Angles between forward and backward weights: how large one is, and a weight at a given one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.state import norm


def weight_at_angle(weight: Tensor, degrees: float, name: str = "a weight", noise_norm: float | None = None) -> Tensor:
    """A random tensor of the same shape and norm as another, at a given angle to it.

    Args:
        weight: The other one; of at least two entries, and not zero, unless the angle is 0 or 180.
        degrees: The angle between the two as vectors.
        name: What the error message calls it.
        noise_norm: Norm of what is orthogonal to the other one, at 90 degrees; by default that of the other one. With
            another norm, `degrees` other than 0, 90 and 180 are nominal: the angle is `atan(noise_norm / |w| tan(a))`.

    Returns:
        `cos(a) w + sin(a) n`, with a Gaussian `n` made orthogonal to `w` and given the norm.

    Raises:
        InvalidOptionError: If no tensor of that shape is at that angle.

    Example:
        >>> weight = torch.randn(4, 3)
        >>> round(weight_angle(weight, weight_at_angle(weight, 30.0)), 3)
        30.0
    """
    if weight.is_meta:  # it has a shape and no values
        return torch.empty_like(weight)
    wide = weight.to("cpu", torch.float64)  # which not every device has
    noise = torch.randn_like(wide)  # drawn at every angle, so that what is drawn next does not depend on it
    if degrees % 180 == 0:
        return (math.cos(math.radians(degrees)) * wide).to(weight)
    if weight.numel() < 2:
        raise InvalidOptionError(
            f"{name} of shape {tuple(weight.shape)} is a single number, and none is at an angle of {degrees:g} degrees "
            "to another: use an angle of 0, or more units."
        )
    if not bool(wide.any()):
        raise InvalidOptionError(f"{name} is zero everywhere and has no direction, so there is no angle to it.")
    for _ in range(2):  # a second time for what rounding left
        noise = noise - (noise * wide).sum() / wide.square().sum() * wide
    noise = noise * ((norm(wide) if noise_norm is None else noise_norm) / norm(noise))
    radians = math.radians(degrees)
    return (math.cos(radians) * wide + math.sin(radians) * noise).to(weight)


def weight_angle(forward_weight: Tensor, backward_weight: Tensor) -> float:
    """The angle between forward and backward weights, in degrees: 0 aligned, 90 unrelated, 180 opposed.

    Args:
        forward_weight: A weight of any shape.
        backward_weight: The weight that should equal it, in the same layout: `.weight` of a `ConvTranspose2d` beside
            that of a `Conv2d`, but `.weight.T` of a `Linear` that goes back beside the `.weight` of one that goes
            forth.

    Returns:
        An angle between 0 and 180.

    Raises:
        InvalidOptionError: If the shapes differ, or a weight is zero.

    Example:
        >>> import torch
        >>> weight_angle(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        45.0
    """
    if forward_weight.shape != backward_weight.shape:
        raise InvalidOptionError(
            f"weights of shapes {tuple(forward_weight.shape)} and {tuple(backward_weight.shape)} have no angle: bring "
            "both into one layout, e.g. weight_angle(forward.weight, backward.weight.T) for two linear layers."
        )
    pair = [weight.detach().flatten().to("cpu", torch.float64) for weight in (forward_weight, backward_weight)]
    sizes = [norm(weight) for weight in pair]
    if not all(sizes):
        raise InvalidOptionError("a weight that is zero everywhere has no direction, so there is no angle to it.")
    one, other = (weight / size for weight, size in zip(pair, sizes, strict=True))
    # Exact at small angles, where the arc cosine of the product is not.
    return math.degrees(2 * math.atan2(norm(one - other), norm(one + other)))


def rounded_angle(forward_weight: Tensor, backward_weight: Tensor) -> float:
    """The same to a thousandth of a degree, as the networks report it; NaN where a weight is zero everywhere.

    Args:
        forward_weight: A weight of any shape.
        backward_weight: Another of the same shape.

    Returns:
        An angle between 0 and 180, or NaN.

    Example:
        >>> rounded_angle(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]))
        26.565
    """
    if not (bool(forward_weight.any()) and bool(backward_weight.any())):
        return math.nan  # a report in the middle of training is no place for an error
    return round(weight_angle(forward_weight, backward_weight), 3)
