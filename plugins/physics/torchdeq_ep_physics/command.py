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
from torchdeq_ep_physics.recipes import mnist
from torchdeq_ep_physics.spice_process import SpiceProgram, ngspice_available

_DEFAULTS = {"seed": 0, "workers": 1, "out": ".", "images": 10_000, "epochs": 3}
_TRAINING = frozenset({"steps", "seed"})
_SIMULATING = frozenset({"simulator", "timeout", "workers"})
_OPTIONS = ("simulator", "steps", "seed", "timeout", "workers", "data", "images", "epochs", "netlist", "out")
_COUNTED = {"steps": 1, "workers": 1, "images": 1, "epochs": 1, "seed": 0}


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe of the command.

    Args:
        run: What it does, from the options.
        takes: The options that mean something to it; all others are refused.
        draws: Whether it writes a picture.
        steps: Of training, by default.
        timeout: Of a process of ngspice, by default, in seconds.
    """

    run: Callable[[argparse.Namespace], None]
    takes: frozenset[str] = frozenset()
    draws: bool = False
    steps: int = 80
    timeout: float = 60.0


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
    defaults = {**_DEFAULTS, "steps": entry.steps, "timeout": entry.timeout}
    for name in _OPTIONS:
        if getattr(options, name) is None:
            setattr(options, name, defaults.get(name))
        elif name not in entry.takes:
            raise InvalidOptionError(f"{options.recipe} has no use for --{name}: leave it out.")
    for name, least in _COUNTED.items():
        check_count(f"--{name}", getattr(options, name), least)
    if not 0 < options.timeout < math.inf:
        raise InvalidOptionError(f"--timeout must be a positive number of seconds, not {options.timeout}.")
    if "out" in entry.takes:
        _check_folder("--out", Path(options.out))
    if "data" in entry.takes and options.data is None:
        raise InvalidOptionError(f"{options.recipe} needs --data: a folder with train.parquet and test.parquet.")
    if options.netlist is not None:
        SpiceProgram(timeout=options.timeout)
        _check_folder("--netlist", Path(options.netlist).parent)
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
    made.add_argument("--steps", type=int, metavar="N", help="of training (default: 80; rules, devices: 150)")
    made.add_argument("--seed", type=int, metavar="N", help=f"default: {_DEFAULTS['seed']}")
    made.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="of one process of ngspice (default: 60; mnist: 1800)"
    )
    made.add_argument(
        "--workers", type=int, metavar="N", help=f"processes of ngspice at a time (default: {_DEFAULTS['workers']})"
    )
    made.add_argument("--data", metavar="DIR", help="of mnist: it has train.parquet and test.parquet")
    made.add_argument(
        "--images", type=int, metavar="N", help=f"that mnist trains on (default: {_DEFAULTS['images']:,})"
    )
    made.add_argument(
        "--epochs", type=int, metavar="N", help=f"of mnist, passes over its images (default: {_DEFAULTS['epochs']})"
    )
    made.add_argument("--netlist", metavar="FILE", help="where mnist writes the trained circuit, for ngspice")
    made.add_argument("--out", metavar="DIR", help=f"where pictures and results go (default: {_DEFAULTS['out']})")
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


def _mnist(options: argparse.Namespace) -> None:
    done = mnist.run(
        options.data,
        images=options.images,
        epochs=options.epochs,
        seed=options.seed,
        netlist=options.netlist,
        timeout=options.timeout,
        path=_results(options),
        say=_say,
    )
    if done.export is None:
        _say("ngspice is not installed, so the circuit was not exported")
    _say(f"written: {_results(options)}" + (f", {options.netlist}" if options.netlist else ""))


def _rules(options: argparse.Namespace) -> None:
    rows = recipes.rules(options.steps, range(options.seed, options.seed + 3), path=_results(options))
    _say(recipes.markdown(rows))
    _say(f"written: {_results(options)}")


def _devices(options: argparse.Namespace) -> None:
    seeds = range(options.seed, options.seed + 3)
    found = recipes.devices(seeds=seeds, steps=options.steps, path=_picture(options), results=_results(options))
    for name, values in found.items():
        means = "  ".join(f"{place:g}: {100 * sum(each) / len(each):.1f} %" for place, each in values.items())
        _say(f"{name}  {means}")
    _say(f"written: {_picture(options)}, {_results(options)}")


ENTRIES = {
    "iris": RecipeEntry(_classify, _TRAINING | _SIMULATING),
    "moons": RecipeEntry(_classify, _TRAINING | _SIMULATING),
    "amplifiers": RecipeEntry(_amplifiers, frozenset({"seed"})),
    "instrument": RecipeEntry(_instrument, frozenset({"out"}), draws=True),
    "motion": RecipeEntry(_motion, _TRAINING | {"out"}, draws=True),
    "recall": RecipeEntry(_recall, frozenset({"seed", "out"}), draws=True),
    "rules": RecipeEntry(_rules, _TRAINING | {"out"}, steps=150),
    "devices": RecipeEntry(_devices, _TRAINING | {"out"}, draws=True, steps=150),
    "mnist": RecipeEntry(
        _mnist, frozenset({"data", "images", "epochs", "seed", "netlist", "timeout", "out"}), timeout=1800.0
    ),
}


def _choose_simulator(options: argparse.Namespace) -> None:
    if options.simulator is None:
        options.simulator = "ngspice" if ngspice_available() else "twin"
        if options.simulator == "twin":
            _say("ngspice is not installed, so the differentiable twin takes its place")
    if options.simulator == "ngspice":
        SpiceProgram(timeout=options.timeout, workers=options.workers)


def _check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that nothing can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidOptionError(
            f"{option}: nothing can be written to {folder} ({error}). Name another folder."
        ) from None


def _picture(options: argparse.Namespace) -> str:
    return str(Path(options.out, f"{options.recipe}.svg"))


def _results(options: argparse.Namespace) -> str:
    return str(Path(options.out, f"{options.recipe}.json"))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
