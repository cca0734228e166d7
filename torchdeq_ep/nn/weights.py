"""Vector-field networks of Laborieux & Zenke (arXiv 2309.02214) as maps for torchdeq.

Neurons have a potential `u` and an activity `phi(u)`, and connections carry activity to potentials:

    f(u) = damping * u + (1 - damping) * (W phi(u) + drive),        drive = U x + b.

Forward and backward weights between two layers are independent parameters. With `D = diag phi'(u)`, the Jacobian
`damping I + (1 - damping) W D` is not symmetric even if `W` is. With the metric `M = D^-1`, what counts for equilibrium
propagation is `J M`: `(1 - damping) W` and a diagonal. `metric` of a network is this `M`. `nudge_metric`, the same for
nudges, makes EP the papers', who nudge potentials by `dL/dphi`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weight_at_angle(weight: Tensor, degrees: float) -> Tensor:
    """A random tensor of the same shape and norm as another, at a given angle to it.

    Args:
        weight: The other one; of at least two entries unless the angle is 0.
        degrees: The angle between the two as vectors.

    Returns:
        `cos(a) w + sin(a) n`, with a Gaussian `n` made orthogonal to `w` and given its norm.

    Example:
        >>> weight = torch.randn(4, 3)
        >>> angle_between(weight, weight_at_angle(weight, 30.0))
        30.0
    """
    wide = weight.double()
    noise = torch.randn_like(wide)
    for _ in range(2):  # a second time for what rounding left
        noise = noise - (noise * wide).sum() / wide.square().sum() * wide
    noise = noise * (wide.norm() / noise.norm()) if degrees else torch.zeros_like(wide)
    radians = math.radians(degrees)
    return (math.cos(radians) * wide + math.sin(radians) * noise).to(weight.dtype)


def angle_between(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors as vectors, in degrees, rounded to a thousandth.

    Args:
        a: One.
        b: The other, of the same shape.

    Returns:
        0 to 180.

    Example:
        >>> angle_between(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
        45.0
    """
    a, b = a.detach().double() / a.detach().double().norm(), b.detach().double() / b.detach().double().norm()
    # Unlike the arc cosine, exact at small angles too.
    return round(math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm()))), 3)
