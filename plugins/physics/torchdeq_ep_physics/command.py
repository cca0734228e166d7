"""`torchdeq-ep physics`: the recipes on the command line."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_count
from torchdeq_ep_physics import recipes
from torchdeq_ep_physics.drawing import figure
from torchdeq_ep_physics.spice_process import SpiceProgram, ngspice_available

_DEFAULTS = {"seed": 0, "timeout": 60.0, "workers": 1, "out": "."}
_SIMULATING = ("simulator", "timeout", "workers")


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe of the command.

    Args:
        run: What it does, from the options.
        takes: The options that mean something to it, beside those that all accept: steps, seed and out.
        draws: Whether it writes a picture.
        steps: Of training, by default.
    """

    run: Callable[[argparse.Namespace], None]
    takes: frozenset[str] = frozenset()
    draws: bool = False
    steps: int = 80


def main(arguments: list[str]) -> int:
    """Run a recipe.

    Args:
        arguments: What follows `torchdeq-ep physics`.

    Returns:
        The exit code.

    Raises:
        InvalidOptionError: Before any work, if an option is not acceptable or the picture cannot be written.
        MissingDependencyError: Before any work, if what the recipe needs is not installed.
    """
    options = parser().parse_args(arguments)
    entry = ENTRIES[options.recipe]
    for name in ("simulator", "steps", *_DEFAULTS):
        if getattr(options, name) is None:
            setattr(options, name, entry.steps if name == "steps" else _DEFAULTS.get(name))
        elif name in _SIMULATING and name not in entry.takes:
            raise InvalidOptionError(f"{options.recipe} has no use for --{name}: leave it out.")
    for name in ("steps", "workers"):
        check_count(f"--{name}", getattr(options, name), 1)
    check_count("--seed", options.seed, 0)
    if not 0 < options.timeout < math.inf:
        raise InvalidOptionError(f"--timeout must be a positive number of seconds, not {options.timeout}.")
    _check_folder(options.out)
    if entry.draws:
        figure()
    if "simulator" in entry.takes:
        _choose_simulator(options)
    entry.run(options)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command.

    Returns:
        Their parser.
    """
    made = argparse.ArgumentParser(prog="torchdeq-ep physics", description="Train and measure physical networks.")
    made.add_argument("recipe", choices=tuple(ENTRIES))
    made.add_argument(
        "--simulator",
        choices=("ngspice", "twin"),
        help="what finds the operating points of iris and moons; default: ngspice where it is installed",
    )
    made.add_argument("--steps", type=int, metavar="N", help="of training (default: 80; rules: 40, devices: 30)")
    made.add_argument("--seed", type=int, metavar="N", help=f"default: {_DEFAULTS['seed']}")
    made.add_argument(
        "--timeout", type=float, metavar="SECONDS", help=f"of one process of ngspice (default: {_DEFAULTS['timeout']})"
    )
    made.add_argument(
        "--workers", type=int, metavar="N", help=f"processes of ngspice at a time (default: {_DEFAULTS['workers']})"
    )
    made.add_argument("--out", metavar="DIR", help=f"where pictures go (default: {_DEFAULTS['out']})")
    return made


def _classify(options: argparse.Namespace) -> None:
    done = recipes.classify(
        options.recipe,
        options.simulator,
        steps=options.steps,
        seed=options.seed,
        timeout=options.timeout,
        workers=options.workers,
    )
    _say(
        f"{options.recipe} on {options.simulator}: {done.accuracy:.1%} of unseen samples right, "
        f"loss {done.losses[-1]:.3f}"
    )


def _amplifiers(options: argparse.Namespace) -> None:
    for row in recipes.amplifiers(seed=options.seed):
        _say("  ".join(f"{name} {value:.2g}" for name, value in row.items()))


def _instrument(options: argparse.Namespace) -> None:
    errors = recipes.instrument(path=_picture(options))
    for name in ("one-sided", "symmetric", "richardson"):
        error, beta = min(zip(errors[name], errors["amplitudes"], strict=True))
        _say(f"{name}: best error {error:.1%} at amplitude {beta:.2g}")
    _say(f"symmetric, automatic amplitude {errors['auto'][0]:.2g}: error {errors['auto'][1]:.1%}")
    _say(f"written: {_picture(options)}")


def _motion(options: argparse.Namespace) -> None:
    distances = recipes.motion(options.steps, seed=options.seed, path=_picture(options))
    _say(f"distance from the target {distances[0]:.0%} -> {distances[-1]:.1%} of the motion")
    _say(f"written: {_picture(options)}")


def _recall(options: argparse.Namespace) -> None:
    found = recipes.recall(seed=options.seed, path=_picture(options))
    for letter, before, after in zip("EPX", found.cues, found.recalled, strict=True):
        _say(f"{letter}: overlap of the cue {before:.2f}, of what was recalled {after:.2f}")
    _say(f"written: {_picture(options)}")


def _rules(options: argparse.Namespace) -> None:
    _say(recipes.markdown(recipes.rules(options.steps, range(options.seed, options.seed + 3))))


def _devices(options: argparse.Namespace) -> None:
    seeds = range(options.seed, options.seed + 3)
    for name, values in recipes.devices(seeds=seeds, steps=options.steps, path=_picture(options)).items():
        means = "  ".join(f"{place:g}: {100 * sum(each) / len(each):.1f} %" for place, each in values.items())
        _say(f"{name}  {means}")
    _say(f"written: {_picture(options)}")


ENTRIES = {
    "iris": RecipeEntry(_classify, frozenset(_SIMULATING)),
    "moons": RecipeEntry(_classify, frozenset(_SIMULATING)),
    "amplifiers": RecipeEntry(_amplifiers),
    "instrument": RecipeEntry(_instrument, draws=True),
    "motion": RecipeEntry(_motion, draws=True),
    "recall": RecipeEntry(_recall, draws=True),
    "rules": RecipeEntry(_rules, steps=40),
    "devices": RecipeEntry(_devices, draws=True, steps=30),
}


def _choose_simulator(options: argparse.Namespace) -> None:
    if options.simulator is None:
        options.simulator = "ngspice" if ngspice_available() else "twin"
        if options.simulator == "twin":
            _say("ngspice is not installed, so the differentiable twin takes its place")
    if options.simulator == "ngspice":
        SpiceProgram(timeout=options.timeout, workers=options.workers)


def _check_folder(name: str) -> None:
    """Refuse a folder that no picture can be written to."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=name):
            pass
    except OSError as error:
        raise InvalidOptionError(
            f"--out: no picture can be written to {name} ({error}). Name another folder."
        ) from None


def _picture(options: argparse.Namespace) -> str:
    return str(Path(options.out, f"{options.recipe}.svg"))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
