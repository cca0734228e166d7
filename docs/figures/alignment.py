"""Alignment of the EP gradient with the exact one against the amplitude of the nudge.

`make figures` runs this, which writes `alignment.svg` beside it and prints the figures at one amplitude.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchdeq_ep import EquilibriumPropagation, ImplicitDifferentiation, Stencil
from torchdeq_ep.errors import ConvergenceWarning, EPError, TruncationWarning
from torchdeq_ep.measuring import COLOURS, GROUND, INK, SHAPES, dress, new_figure, save

WIDTH, BATCH = 32, 16
AMPLITUDES = tuple(10.0 ** (k / 4) for k in range(-12, 1))
PERFECT = 1e-12
"""Where a curve is cut off: `1 - cosine` in double precision means nothing below this."""
SHOWN = 0.1
"""The amplitude whose figures are printed."""

Map = Callable[[Tensor, Tensor], Tensor]

MODES: dict[str, Callable[[float], EquilibriumPropagation]] = {
    "ep-one-sided": lambda beta: _mode(Stencil.one_sided(beta)),
    "ep": lambda beta: _mode(Stencil.symmetric(beta)),
    "ep-richardson": lambda beta: _mode(Stencil.richardson(beta)),
    "hep, N = 4": lambda beta: _mode(Stencil.contour(beta, n_points=4)),
    "aep": lambda beta: _mode(Stencil.symmetric(beta), correction="asymmetric"),
}


def _mode(stencil: Stencil, **options: str) -> EquilibriumPropagation:
    return EquilibriumPropagation(stencil, tol=1e-13, max_iter=400, on_divergence="raise", **options)  # type: ignore[arg-type]


def symmetric_map(weight: Tensor, z: Tensor) -> Tensor:
    """A layer whose Jacobian is symmetric, up to the drive."""
    return 0.5 * torch.tanh(z @ weight.T) @ weight


def asymmetric_map(weight: Tensor, z: Tensor) -> Tensor:
    """A layer whose Jacobian is not symmetric, up to the drive."""
    return torch.tanh(z @ weight.T)


def alignments(layer: Map, gain: float) -> dict[str, list[float]]:
    """`1 - cosine` of the gradient of the weights to the exact one, for each mode at each amplitude."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, drive, target = gain * draw(WIDTH, WIDTH) / math.sqrt(WIDTH), draw(BATCH, WIDTH), draw(BATCH, WIDTH)
    z_star = torch.zeros_like(drive)
    for _ in range(500):
        z_star = layer(weight, z_star) + drive
    cotangent = (z_star - target) / BATCH

    # At complex states the weight is taken as complex, so that the map is one of plain complex arithmetic.
    def f(z: Tensor) -> Tensor:
        return layer(weight.to(z.dtype), z) + drive

    def gradient(error_vector: Tensor) -> Tensor:
        trained = weight.clone().requires_grad_()
        (result,) = torch.autograd.grad(layer(trained, z_star), trained, error_vector)
        return result

    exact = gradient(ImplicitDifferentiation(tol=1e-14, max_iter=500)(f, z_star, cotangent))

    def misalignment(mode: EquilibriumPropagation) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            warnings.simplefilter("ignore", TruncationWarning)  # to be seen in the figure
            try:
                found = gradient(mode(f, z_star, cotangent))
            except (EPError, ConvergenceWarning):
                return math.nan
        # |a/|a| - b/|b||^2 / 2 is 1 - cosine without the cancellation.
        return float((found / found.norm() - exact / exact.norm()).square().sum() / 2)

    return {name: [misalignment(make(beta)) for beta in AMPLITUDES] for name, make in MODES.items()}


def main() -> None:
    """Measure, print and draw."""
    panels = {
        "Symmetric Jacobian": alignments(symmetric_map, 0.7),
        "Asymmetric Jacobian": alignments(asymmetric_map, 0.6),
    }
    at = min(range(len(AMPLITUDES)), key=lambda k: abs(math.log(AMPLITUDES[k] / SHOWN)))
    for title, found in panels.items():
        for name, values in found.items():
            sys.stdout.write(f"{title:20} {name:14} 1 - cosine at {AMPLITUDES[at]:.2g}: {values[at]:.1e}\n")

    figure = new_figure(9.6, 4.4)
    for column, (title, found) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 2, column)
        dress(axes)
        for (name, values), colour, shape in zip(found.items(), (*COLOURS[1:5], COLOURS[7]), SHAPES, strict=False):
            heights = [max(value, PERFECT) for value in values]
            # Where the Jacobian is symmetric, "aep" lies on "ep": both can be seen if its markers are hollow.
            inside, style = (GROUND, "--") if name == "aep" else (colour, "-")
            axes.plot(AMPLITUDES, heights, style, color=colour, marker=shape, mfc=inside, markersize=5, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1.0, PERFECT / 2)
        axes.set_yticks(
            [1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12],
            ["0.9", "0.99", "$1 - 10^{-4}$", "$1 - 10^{-6}$", "$1 - 10^{-8}$", "$1 - 10^{-10}$", "$1 - 10^{-12}$"],
        )
        axes.minorticks_off()
        axes.set_xlabel("amplitude of the nudge, relative to the state", color=INK)
        axes.set_title(title, loc="left", color=INK, fontsize=12)
        if column == 1:
            axes.set_ylabel("cosine to the exact gradient", color=INK)
        else:
            axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(0.0, 0.33))
    figure.subplots_adjust(left=0.105, right=0.985, top=0.92, bottom=0.13, wspace=0.24)
    save(figure, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
