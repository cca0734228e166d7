"""How the time for a circuit grows with its nodes: grids of resistors and diodes, by the twin and by ngspice.

`python docs/figures/circuits.py` measures and draws `circuits.svg` beside this file, and prints the table of
`docs/physics.md`. The twin's times are those of the free phase and the backward pass by `ep`, ngspice's those of the
free state alone. Times are the processor's, each the shortest of three, so that other programs do not count.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import torchdeq_ep_physics as physics
from torchdeq_ep.measuring import COLOURS, INK, dress, new_figure, save

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "physics" / "tests"))
from physics_problems import grid  # noqa: E402  the module of that folder

SIDES = (22, 32, 45, 63, 89)
SLOWEST = 60.0


def shortest(action: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of some times of the processor, child processes included, in seconds; one where that is long."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < SLOWEST:
        before = sum(os.times()[:4])
        action()
        times.append(sum(os.times()[:4]) - before)
    return min(times)


def measure(side: int, with_ngspice: bool) -> tuple[float, float]:
    """Seconds of the twin, free phase and backward pass, and of ngspice, NaN without it."""
    network, x = grid(side)

    def train() -> None:
        network(x).square().sum().backward()

    train()
    own = shortest(train)
    if not with_ngspice:
        return own, math.nan
    spice = physics.Ngspice(network, x)
    return own, shortest(lambda: spice(torch.zeros(())))


def exponent(nodes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    x, y = torch.tensor(nodes).double().log(), torch.tensor(seconds).double().log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def draw(nodes: Sequence[int], rows: Sequence[tuple[float, float]], path: Path) -> None:
    """Both times against the number of nodes."""
    figure = new_figure(6.5, 4.0)
    axes = figure.add_subplot(1, 1, 1)
    dress(axes)
    own = [row[0] for row in rows]
    label = f"twin, free phase and gradient: exponent {exponent(nodes, own):.1f}"
    axes.loglog(nodes, own, "o-", color=COLOURS[2], label=label)
    if not math.isnan(rows[0][1]):
        axes.loglog(nodes, [row[1] for row in rows], "s--", color=COLOURS[7], label="ngspice, free phase")
    axes.set_xlabel("nodes", color=INK)
    axes.set_ylabel("processor seconds", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    figure.tight_layout()
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES), help="of the grids, in nodes")
    parser.add_argument("--spice-up-to", type=int, default=2025, metavar="NODES", help="ngspice takes long beyond it")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    nodes = [side**2 for side in options.sides]
    available = physics.ngspice_available()
    rows = []
    sys.stdout.write("| nodes | twin: free phase and gradient, s | ngspice: free phase, s |\n|---|---|---|\n")
    for side, count in zip(options.sides, nodes, strict=True):
        rows.append(measure(side, available and count <= options.spice_up_to))
        sys.stdout.write(f"| {count:,} | {rows[-1][0]:.2g} | {rows[-1][1]:.2g} |\n")
        sys.stdout.flush()
    draw(nodes, rows, options.out)


if __name__ == "__main__":
    main()
