"""The standard deviation of the two homeostasis estimators against the asymmetry of the Jacobian.

`make figures` runs this, which writes `estimators.svg` beside it and prints the table of docs/homeostasis.md.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from torchdeq_ep.jacobian import Estimator, symmetry_penalty
from torchdeq_ep.measuring import COLOURS, INK, dress, new_figure, save

N = 300
ASYMMETRIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DRAWS = 400
GRADIENTS = 40
ESTIMATORS: tuple[Estimator, ...] = ("paper", "antisymmetric")


def jacobian(asymmetry: float) -> Tensor:
    """A random matrix with `|A| / |J| = asymmetry`, and `|J|_F^2 = n`."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(N, N, generator=generator, dtype=torch.float64)
    symmetric, antisymmetric = matrix + matrix.T, matrix - matrix.T
    parts = (
        math.sqrt(1 - asymmetry**2) * symmetric / symmetric.norm(),
        asymmetry * antisymmetric / antisymmetric.norm(),
    )
    return math.sqrt(N) * (parts[0] + parts[1])


def spreads(matrix: Tensor, estimator: Estimator) -> tuple[float, float]:
    """Standard deviation of the penalty from one probe, and of its gradient (root of the mean square distance)."""
    weight, z = matrix.clone().requires_grad_(), torch.zeros(N, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return symmetry_penalty(lambda z: z @ weight.T, z, 1, estimator, generator=generator)

    with torch.no_grad():
        values = torch.stack([draw() for _ in range(DRAWS)])
    mean = 2 * (matrix - matrix.T) / N
    distances = [(torch.autograd.grad(draw(), weight)[0] - mean).square().sum() for _ in range(GRADIENTS)]
    return float(values.std()), float(torch.stack(distances).mean().sqrt())


def main() -> None:
    """Measure, print and draw."""
    found = {estimator: [spreads(jacobian(a), estimator) for a in ASYMMETRIES] for estimator in ESTIMATORS}
    sys.stdout.write(
        "| asymmetry | standard deviation, paper : antisymmetric | noise of the gradient |\n|---|---|---|\n"
    )
    for asymmetry, (paper, paper_gradient), (ours, our_gradient) in zip(ASYMMETRIES, *found.values(), strict=True):
        sys.stdout.write(f"| {asymmetry:.1%} | {paper / ours:.1f} | {paper_gradient / our_gradient:.1f} |\n")

    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    dress(axes)
    percent = [100 * asymmetry for asymmetry in ASYMMETRIES]
    exact = [2 * asymmetry**2 for asymmetry in ASYMMETRIES]  # 2 |A|_F^2 / n
    axes.plot(percent, exact, color=COLOURS[0], linestyle="--", linewidth=1.2, label="the penalty itself")
    labels = (r'"paper": $|u|^2 - e^T J^2 e$', r'"antisymmetric" (default): $|u - w|^2 / 2$')
    for estimator, label, colour, marker in zip(ESTIMATORS, labels, (COLOURS[7], COLOURS[2]), "os", strict=True):
        axes.plot(percent, [value for value, _ in found[estimator]], color=colour, marker=marker, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(percent, [f"{value:g}" for value in percent])
    axes.minorticks_off()
    axes.set_xlabel("asymmetry $|A| / |J|$ in percent", color=INK)
    axes.set_ylabel("standard deviation with one probe, times $n / |J|^2$", color=INK)
    axes.set_title("How noisy is a measured penalty?", loc="left", color=INK, fontsize=13)
    axes.legend(frameon=False, labelcolor=INK)
    figure.subplots_adjust(left=0.12, right=0.97, top=0.91, bottom=0.13)
    save(figure, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
