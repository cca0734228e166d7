"""What a nudge does, for a state of one number: a picture of the first page.

`make figures` runs this, which writes `nudge.svg` beside it and prints what is measured in the picture.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from torchdeq_ep.measuring import COLOURS, INK, dress, new_figure, save

COTANGENT, BETA = -1.0, 0.12
START, STEPS, RANGE = 0.12, 7, (0.0, 1.45)
BLUE, ORANGE, GREEN, GREY = COLOURS[2], COLOURS[7], COLOURS[3], COLOURS[5]


def f(z: float) -> float:
    """A layer of one unit."""
    return 0.3 + 0.75 * math.tanh(1.1 * z)


def slope(z: float) -> float:
    """Its Jacobian."""
    return 0.75 * 1.1 / math.cosh(1.1 * z) ** 2


def settled(nudge: float) -> float:
    """The fixed point of `f(z) + nudge`."""
    z = 0.8
    for _ in range(300):
        z = f(z) + nudge
    return z


def main() -> None:
    """Draw, and print."""
    free, plus, minus = settled(0.0), settled(BETA * COTANGENT), settled(-BETA * COTANGENT)
    measured, exact = (plus - minus) / (2 * BETA), COTANGENT / (1 - slope(free))
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    points = [RANGE[0] + (RANGE[1] - RANGE[0]) * k / 200 for k in range(201)]
    for axes in (left, right):
        dress(axes)
        axes.plot(points, points, color=GREY, linewidth=1)
        axes.plot(points, [f(z) for z in points], color=BLUE, linewidth=2)
        axes.set(xlim=RANGE, ylim=RANGE, xlabel="state z", aspect="equal")
    _steps(left)
    left.plot(free, free, "o", color=BLUE, markersize=9)
    left.annotate("z* = f(z*)", (free, free), (free - 0.1, free + 0.22), ha="right", color=BLUE, fontsize=11)
    left.text(0.75, f(0.75) - 0.21, "f(z)", color=BLUE, fontsize=11)
    left.set_title("The layer settles: free phase", color=INK, fontsize=12)
    for nudge, state, name in (
        (-BETA * COTANGENT, minus, r"$f(z) - \beta g$"),
        (BETA * COTANGENT, plus, r"$f(z) + \beta g$"),
    ):
        right.plot(points, [f(z) + nudge for z in points], color=ORANGE, linewidth=1.4, linestyle="--")
        right.plot(state, state, "o", color=ORANGE, markersize=9)
        right.text(RANGE[1] + 0.03, f(RANGE[1]) + nudge, name, color=ORANGE, va="center")
    right.plot(free, free, "o", color=BLUE, markersize=6)
    height = 0.22
    for state in (minus, plus):
        right.plot((state, state), (height, state), color=GREEN, linewidth=1, linestyle=":")
    right.annotate("", (plus, height), (minus, height), arrowprops={"arrowstyle": "->", "color": GREEN, "linewidth": 2})
    right.text((plus + minus) / 2, height - 0.13, r"moved by $2\beta\,v$", color=GREEN, fontsize=11, ha="center")
    right.set_title("Nudged both ways, it settles elsewhere", color=INK, fontsize=12)
    figure.tight_layout(w_pad=2.5)
    save(figure, Path(__file__).with_suffix(".svg"))
    sys.stdout.write(f"moved by 2 beta times {measured:.3f}; the adjoint equation has {exact:.3f}\n")


def _steps(axes: Any) -> None:
    """The way of the free phase: to the curve, and to the diagonal."""
    z, path = START, [(START, 0.0)]
    for _ in range(STEPS):
        path += [(z, f(z)), (f(z), f(z))]
        z = f(z)
    axes.plot(*zip(*path, strict=True), color=INK, linewidth=1.1)
    axes.plot(START, 0.0, "o", color=INK, markersize=5, clip_on=False)
    axes.text(START + 0.04, 0.04, "start", color=INK, fontsize=10)


if __name__ == "__main__":
    main()
