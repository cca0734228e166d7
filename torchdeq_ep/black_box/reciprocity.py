"""Whether a system whose solver is a black box is reciprocal, from two more solves.

With a metric `M`, equilibrium propagation is exact if `K^-1 M` is symmetric. The nudges of a backward pass measure
`d = K^-1 M g`. Two along a random `e` measure `d_e = K^-1 M e`, and in a reciprocal system `<e, d> = <g, d_e>`. For `e`
with independent entries of unit variance, the mean square of the difference is `|d - d'|^2`, where `d' = M v` for the
exact error vector `v`.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchdeq_ep.black_box.response import Response, size_of
from torchdeq_ep.errors import AsymmetryWarning
from torchdeq_ep.state import norm

_ASYMMETRIC = 0.5
_SIGMAS = 5.0


@dataclass(frozen=True)
class Reciprocity:
    """How far a system is from a reciprocal one.

    Args:
        difference: `|<e, d> - <g, d_e>|`, relative to `|d|` for an `e` of unit variance.
        noise: The part of it that errors of the solves explain.

    Example:
        >>> Reciprocity(difference=0.01, noise=0.0).warn_of_asymmetry()
    """

    difference: float
    noise: float

    def warn_of_asymmetry(self) -> None:
        """Warn if the error vector is likely to be another one than the exact."""
        if self.difference - self.noise > _ASYMMETRIC:
            warnings.warn(
                f"the system is not reciprocal: how far g moves it along a random direction, and how far that moves it "
                f"along g, differ by {self.difference:.2g} of the displacement, and noise explains {self.noise:.1g}. "
                "Equilibrium propagation's error vector is about that far from the exact one. Give the metric that "
                "makes dF/dz symmetric, if the entries of the state have different units or time scales; else the "
                "system has one-way elements, and its gradient is biased.",
                AsymmetryWarning,
                stacklevel=2,
            )


def measure_reciprocity(
    measure: Callable[[Sequence[tuple[float, Tensor]]], Sequence[Tensor]],
    response: Response,
    cotangent: Tensor,
    systematic: bool,
) -> Reciprocity:
    """Nudge a system up and down a random direction, and compare with its response to the cotangent.

    Args:
        measure: From pairs of an amplitude and a force to states.
        response: To the cotangent.
        cotangent: `g`.
        systematic: Whether repeats share the error of a solve.

    Returns:
        What was found.

    Example:
        >>> def measure(forces):  # dF/dz = [[-1, 1], [0, -1]]: the second entry acts on the first alone
        ...     return [torch.stack([force.sum(), force[1]]) for _, force in forces]
        >>> g = torch.tensor([1.0, 0.0])
        >>> nudged = torch.stack(measure([(0.1, 0.1 * g), (-0.1, -0.1 * g)])).unsqueeze(1)
        >>> from torchdeq_ep.modes import Stencil
        >>> response = Response(torch.zeros(1, 2), nudged, Stencil.symmetric(0.1), [0.1, -0.1], g, None, 1e-7)
        >>> measure_reciprocity(measure, response, g, False).difference > 0.1
        True
    """
    rest, direction = response.rest, response.direction
    # A generator of its own, so that the user's is not touched; the seed differs from one cotangent to the next.
    seed = struct.unpack("<q", struct.pack("<d", norm(cotangent)))[0]
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(rest.shape, generator=generator, dtype=torch.float64).to(rest)
    force = probe if response.metric is None else response.metric * probe
    amplitude = max(abs(b) for b in response.amplitudes) * norm(direction) / norm(force)
    beta = max(abs(cast(float, node)) for node in response.stencil.nodes)
    up, down = measure([(beta, amplitude * force), (-beta, -amplitude * force)])
    returned = (up - down) / (2 * amplitude)
    displacement = response.displacement
    g = cotangent.to(rest)
    scale = norm(displacement) * norm(probe) / math.sqrt(rest.numel())
    difference = abs(float((probe * displacement).sum() - (g * returned).sum()))
    weights = response.weights
    entry = response.noise * size_of(rest) / math.sqrt(rest.numel() * (1 if systematic else len(response.free)))
    spread = sum(weight**2 for weight in weights) + sum(weights) ** 2
    deviation = entry * math.sqrt(norm(g) ** 2 / (2 * amplitude**2) + norm(probe) ** 2 * spread)
    if scale == 0:
        return Reciprocity(math.nan, math.nan)
    return Reciprocity(difference / scale, _SIGMAS * deviation / scale)
