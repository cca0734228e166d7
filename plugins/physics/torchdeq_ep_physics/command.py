"""`torchdeq-ep physics`: the recipes on the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torchdeq_ep_physics import recipes
from torchdeq_ep_physics.spice_process import ngspice_available


def main(arguments: list[str]) -> int:
    """Run a recipe.

    Args:
        arguments: What follows `torchdeq-ep physics`.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    picture = str(Path(options.out, f"{options.recipe}.png"))
    if options.recipe in ("iris", "moons"):
        simulator: recipes.Simulator = options.simulator or ("ngspice" if ngspice_available() else "twin")
        if not ngspice_available() and options.simulator is None:
            _say("ngspice is not installed, so the differentiable twin takes its place")
        done = recipes.classify(options.recipe, simulator, steps=options.steps, seed=options.seed)
        _say(
            f"{options.recipe} on {simulator}: {done.accuracy:.1%} of unseen samples right, loss {done.losses[-1]:.3f}"
        )
    elif options.recipe == "amplifiers":
        for row in recipes.amplifiers(seed=options.seed):
            _say("  ".join(f"{name} {value:.2g}" for name, value in row.items()))
    elif options.recipe == "instrument":
        errors = recipes.instrument(path=picture)
        for name in ("one-sided", "symmetric", "richardson"):
            error, beta = min(zip(errors[name], errors["amplitudes"], strict=True))
            _say(f"{name}: best error {error:.1%} at amplitude {beta:.2g}")
        _say(
            f"symmetric, automatic amplitude {errors['auto'][0]:.2g}: error {errors['auto'][1]:.1%}\nwritten: {picture}"
        )
    else:
        distances = recipes.motion(options.steps, seed=options.seed, path=picture)
        _say(f"distance from the target {distances[0]:.0%} -> {distances[-1]:.1%} of the motion\nwritten: {picture}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command.

    Returns:
        Their parser.
    """
    made = argparse.ArgumentParser(prog="torchdeq-ep physics", description="Train and measure physical networks.")
    made.add_argument("recipe", choices=("iris", "moons", "amplifiers", "instrument", "motion"))
    made.add_argument(
        "--simulator",
        choices=("ngspice", "twin"),
        help="what finds the operating points of iris and moons; default: ngspice where it is installed",
    )
    made.add_argument("--steps", type=int, default=80, metavar="N", help="of training (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    made.add_argument("--out", default=".", metavar="DIR", help="where pictures go (default: %(default)s)")
    return made


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
