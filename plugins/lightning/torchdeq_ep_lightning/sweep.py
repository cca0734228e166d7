"""`torchdeq-ep sweep`: a recipe over modes, angles, amplitudes, homeostasis and seeds; one results file, figures."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchdeq_ep import get_backward
from torchdeq_ep.errors import EPError, InvalidOptionError
from torchdeq_ep.extend import write_text
from torchdeq_ep_lightning.report import save_figures, to_markdown
from torchdeq_ep_lightning.training import find_recipe, run

RESULTS = "results.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; `None` where the recipe's own value holds.

    Args:
        backward: Spec of the mode, the amplitude included.
        angle: Initial angle in degrees.
        homeostasis: Weight of homeostasis; 0 is without.
        seed: The seed.
    """

    backward: str
    angle: float | None
    homeostasis: float | None
    seed: int

    @property
    def name(self) -> str:
        """A name for its directory."""
        parts = [self.backward]
        parts += [] if self.angle is None else [f"angle{self.angle:g}"]
        parts += [] if self.homeostasis is None else [f"homeostasis{self.homeostasis:g}"]
        text = "-".join([*parts, f"seed{self.seed}"])
        return "".join(c if c.isalnum() or c in "-._=" else "_" for c in text)

    def overrides(self) -> list[str]:
        """The options of `train` that it stands for."""
        options = ["--backward", self.backward, "--seed", str(self.seed)]
        if self.angle is not None:
            options += ["--model.angle", f"{self.angle:g}"]
        if self.homeostasis is not None:
            enabled = "true" if self.homeostasis else "false"
            options += ["--homeostasis.enabled", enabled, "--homeostasis.weight", f"{self.homeostasis:g}"]
        return options


def cells(
    modes: Sequence[str],
    amplitudes: Sequence[float],
    angles: Sequence[float],
    homeostasis: Sequence[float],
    seeds: Sequence[int],
) -> list[Cell]:
    """Every combination; modes without an amplitude, and those whose spec has one, are taken once.

    Args:
        modes: Specs.
        amplitudes: Values of `beta`; none for that of the recipe.
        angles: Angles in degrees; none for that of the recipe.
        homeostasis: Weights; none for that of the recipe.
        seeds: Seeds.

    Returns:
        The runs, seed by seed.

    Example:
        >>> [cell.backward for cell in cells(["ift", "ep"], [0.05, 0.5], [], [], [0])]
        ['ift', 'ep:beta=0.05', 'ep:beta=0.5']
    """
    specs: list[str] = []
    for mode in modes:
        nudged = hasattr(get_backward(mode), "stencil") and "beta=" not in mode
        joint = "," if ":" in mode else ":"
        specs += [f"{mode}{joint}beta={beta:g}" for beta in amplitudes] if nudged and amplitudes else [mode]
    choices: tuple[Sequence[float | None], Sequence[float | None]] = (angles or [None], homeostasis or [None])
    axes = (seeds, specs, *choices)
    return [Cell(spec, angle, weight, seed) for seed, spec, angle, weight in itertools.product(*axes)]


def main(arguments: Sequence[str]) -> int:
    """Run `torchdeq-ep sweep`.

    Args:
        arguments: What follows `sweep`.

    Returns:
        The exit code: 0, or 1 if a run failed.
    """
    options, overrides = _parser().parse_known_args(arguments)
    find_recipe(options.recipe)
    out = Path(options.out or Path("sweeps") / Path(options.recipe).stem)
    wanted = cells(options.backward, options.beta, options.angle, options.homeostasis, options.seed)
    results = out / RESULTS
    rows: list[dict[str, Any]] = []
    for k, cell in enumerate(wanted, start=1):
        sys.stdout.write(f"[{k}/{len(wanted)}] {cell.name}\n")
        sys.stdout.flush()
        own = [*cell.overrides(), "--out", str(out / "runs" / cell.name), "--quiet", "true"]
        try:
            result = run(options.recipe, [*overrides, *own])
            rows.append(asdict(cell) | {"history": list(result.history), "failure": ""})
        except InvalidOptionError:
            raise
        except EPError as error:  # a nudge that diverges for good is a result too
            rows.append(asdict(cell) | {"history": [], "failure": f"{type(error).__name__}: {error.args[0]}"})
            sys.stdout.write(f"  failed: {error}\n")
        plain = {"name": out.name, "recipe": options.recipe, "overrides": overrides, "command": list(arguments)}
        write_text(results, json.dumps(plain | {"runs": rows}, indent=1) + "\n")
    title = Path(options.recipe).stem
    figures = save_figures(rows, title, out)
    document = out / "results.md"
    write_text(document, to_markdown([json.loads(results.read_text(encoding="utf-8"))]))
    sys.stdout.write(f"written: {'  '.join(map(str, [results, document, *figures]))}\n")
    return int(any(row["failure"] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchdeq-ep sweep",
        description="Train a recipe over modes, amplitudes, angles, homeostasis and seeds. What has been trained is "
        "kept: the same command continues where it was stopped. Further options go to each run, as for train.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or the path of a YAML file")
    parser.add_argument("--backward", nargs="+", default=["ift", "ep"], metavar="MODE", help="default: ift ep")
    parser.add_argument("--beta", nargs="+", type=float, default=[], metavar="B", help="amplitudes of the nudges")
    parser.add_argument("--angle", nargs="+", type=float, default=[], metavar="DEG", help="initial angles")
    parser.add_argument(
        "--homeostasis", nargs="+", type=float, default=[], metavar="W", help="weights; 0 is without homeostasis"
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--out", metavar="DIR", help="default: sweeps/RECIPE")
    return parser
