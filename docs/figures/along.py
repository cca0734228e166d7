"""Accuracy against alignment for two kinds of homeostasis, over two decades of weights: a figure of `homeostasis.md`.

`make along` runs this. Each run is kept in `docs/results/along.json`, and those that are there are not repeated, so it
can be stopped at any time. The models are those of `ordinary.md`, trained on scikit-learn's digits.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchdeq.loss import jac_reg

import torchdeq_ep as tep
from torchdeq_ep.errors import EPError
from torchdeq_ep.extend import Equilibrium
from torchdeq_ep.host import HomeostasisHandle
from torchdeq_ep.measuring import COLOURS, dress, new_figure, save, write_text
from torchdeq_ep.state import Memory

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "benchmarks"), str(Path(__file__).parent)]
import ordinary  # noqa: E402
from pages import insert  # noqa: E402

RESULTS, FIGURE, PAGE = (
    ROOT / "docs" / "results" / "along.json",
    ROOT / "docs" / "figures" / "along.svg",
    ROOT / "docs" / "homeostasis.md",
)
OPENING, CLOSING = "<!-- The table is written by `make along`. -->", "<!-- End of the table. -->"
WEIGHTS = {
    "error-vector": (1.5, 5.0, 15.0, 50.0, 150.0),
    "antisymmetric": (3.0, 10.0, 30.0, 100.0, 300.0),
}
NORM_WEIGHTS = ("0.1", "1", "10")
EPOCHS = {"cnn": 20, "cnn-gelu": 20, "pre-norm": 30, "two-scale": 20}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        kind: Of `ordinary.MODELS`.
        mode: The backward mode, `"torchdeq"` for its own.
        estimator: Of homeostasis, `"jac_reg"` for torchdeq's penalty on the norm of the Jacobian, or an empty text.
        weight: Its weight, a number as text, `"auto"`, or `"auto:0.9"` with its target.
        seed: Of weights and batches.
        epochs: If not those of `EPOCHS`.
    """

    kind: str
    mode: str
    estimator: str = ""
    weight: str = ""
    seed: int = 0
    epochs: int = 0

    @property
    def key(self) -> str:
        """Its name in the results."""
        parts = [self.kind, self.mode, self.estimator, self.weight, str(self.seed)]
        return "/".join([*parts, f"{self.epochs} epochs"] if self.epochs else parts)

    def regularised(self, model: nn.Module) -> HomeostasisHandle | _JacobianNorm | None:
        """What has a penalty to be added to the loss."""
        if not self.estimator:
            return None
        name, _, target = self.weight.partition(":")
        if self.estimator == "jac_reg":
            return _JacobianNorm(model, float(name))
        options: dict[str, Any] = {"target": float(target)} if target else {}
        weight: Any = name if name == "auto" else float(name)
        return tep.register_homeostasis(model, weight, 1, self.estimator, **options)  # type: ignore[arg-type]

    def train(self) -> dict[str, Any]:
        """Train, and measure what came out."""
        model = ordinary.make(self.kind, self.seed)
        if self.mode != "torchdeq":
            tep.use_backward(model, self.mode)
        homeostasis = self.regularised(model)
        start = time.process_time()
        optimizer = torch.optim.Adam(model.parameters(), lr=ordinary.RATES.get(self.kind, 1e-3))
        model.train()
        failed = ""
        try:
            for images, labels in ordinary.digits().batches(self.seed, self.epochs or EPOCHS[self.kind]):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images), labels)
                (loss if homeostasis is None else loss + homeostasis.penalty()).backward()
                optimizer.step()
        except EPError as error:
            failed = type(error).__name__
        seconds = time.process_time() - start
        last = homeostasis.last if isinstance(homeostasis, HomeostasisHandle) else None
        return {
            "accuracy": ordinary.accuracy(model),
            "free_residual": free_residual(model),
            "alignment": alignment(model),
            "seconds": seconds,
            "weight_at_the_end": None if last is None else max(last.weights.values()),
            "failed": failed,
        }


class _JacobianNorm:
    """torchdeq's `jac_reg` at each equilibrium: `E |J^T e|^2 / n` for one Gaussian `e`."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        self._weight, self._term = weight, torch.zeros(())
        tep.register_fixed_point_hook(model, self._measure)

    def _measure(self, f: Any, z: Any, _: nn.Module) -> None:
        state = z.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            self._term = jac_reg(f(state), state)

    def penalty(self) -> Tensor:
        """The weighted penalty of the last forward pass."""
        return self._weight * self._term


@dataclass(frozen=True)
class _Kept(tep.ImplicitDifferentiation):
    """Implicit differentiation that keeps the equilibrium."""

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, tep.NudgeReport]:
        object.__setattr__(self, "kept", equilibrium)
        return super().solve(equilibrium)


def free_residual(model: nn.Module) -> float:
    """`|f(z) - z| / |z|` where the model's own solver stops, on the batch that comes next."""
    return _at_next_batch(model).residual


def _at_next_batch(model: nn.Module) -> Equilibrium:
    mode = _Kept()
    images, labels = next(ordinary.digits().batches(seed=100, epochs=1))
    with tep.use_backward(model, mode):
        functional.cross_entropy(model(images), labels).backward()
    return replace(vars(mode)["kept"], memory=Memory())


def alignment(model: nn.Module) -> float:
    """The mean over the samples of the cosine of the two error vectors, on the batch that comes next."""
    kept = _at_next_batch(model)
    options: dict[str, Any] = {"tol": 1e-3, "max_iter": 200}
    vectors = [m(**options).solve(kept)[0].reshape(ordinary.BATCH, -1) for m in (_Kept, tep.InfinitesimalEP)]
    return float(torch.cosine_similarity(*vectors, dim=1).mean())


def plan() -> list[Run]:
    """The most telling first."""
    runs = []
    for seed in (0, 1, 2):
        for kind, mode in (("cnn", "ep"), ("pre-norm", "ep"), ("cnn-gelu", "hep"), ("two-scale", "ep")):
            runs += [Run(kind, "torchdeq", seed=seed), Run(kind, mode, "error-vector", "auto", seed)]
        runs += [Run("cnn", "torchdeq", seed=seed, epochs=3), Run("cnn", "ep", "error-vector", "auto", seed, 3)]
    for kind in ("cnn", "pre-norm"):
        runs.append(Run(kind, "ep"))
        for estimator, weights in WEIGHTS.items():
            runs += [Run(kind, "ep", estimator, f"{weight:g}") for weight in weights]
    for kind in ("pre-norm", "cnn"):
        runs += [Run(kind, "ift", "jac_reg", weight) for weight in NORM_WEIGHTS]
        runs.append(Run(kind, "ift", "error-vector", "auto"))
        runs += [Run(kind, "ep", "error-vector", "auto:0.9", seed) for seed in (0, 1, 2)]
    return runs


def picture(results: dict[str, dict[str, Any]]) -> None:
    """One panel for each model that has a sweep."""
    figure = new_figure(9.4, 4.2)
    panels = figure.subplots(1, 2)
    styles = {"error-vector": (COLOURS[2], "o", "error vector"), "antisymmetric": (COLOURS[7], "s", "random probe")}
    for axes, kind in zip(panels, ("cnn", "pre-norm"), strict=True):
        dress(axes)
        for estimator, (colour, shape, label) in styles.items():
            found = [(w, results.get(Run(kind, "ep", estimator, f"{w:g}").key)) for w in WEIGHTS[estimator]]
            points = [(w, r) for w, r in found if r is not None and math.isfinite(r["alignment"])]
            style = {"color": colour, "marker": shape, "linewidth": 0.8, "label": label}
            axes.plot([r["alignment"] for _, r in points], [100 * r["accuracy"] for _, r in points], **style)
            for weight, result in points:
                place = (result["alignment"], 100 * result["accuracy"])
                axes.annotate(f"{weight:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour)
        for key, label, shape in ((Run(kind, "ep").key, "no homeostasis", "X"), (_auto(kind), "automatic weight", "*")):
            if key in results:
                place = [results[key]["alignment"]], [100 * results[key]["accuracy"]]
                axes.plot(*place, color=COLOURS[0], marker=shape, markersize=9, linestyle="none", label=label)
        if Run(kind, "torchdeq").key in results:
            exact = 100 * results[Run(kind, "torchdeq").key]["accuracy"]
            axes.axhline(exact, color=COLOURS[5], linewidth=0.8, linestyle="--", label="exact gradients")
        axes.set_title(f"{kind}, {EPOCHS[kind]} epochs", loc="left", fontsize=11)
        axes.set_xlabel("alignment of error vectors after training")
        axes.set_ylabel("test accuracy, %")
    panels[1].legend(frameon=False, fontsize=8, loc="best")
    figure.tight_layout()
    save(figure, FIGURE)


def _auto(kind: str) -> str:
    return Run(kind, "ep", "error-vector", "auto").key


def table(results: dict[str, dict[str, Any]]) -> str:
    """Automatic homeostasis beside exact gradients and torchdeq's regulariser, for each model and mode."""
    lines = [
        "| model | epochs | mode | penalty | test accuracy by seed, % | alignment after training |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[Run, list[dict[str, Any]]] = {}
    for run in plan():
        if run.key in results and (run.weight.startswith("auto") or run.estimator in ("", "jac_reg")):
            groups.setdefault(replace(run, seed=0), []).append(results[run.key])
    for run, rows in sorted(groups.items(), key=lambda item: (item[0].kind, item[0].epochs, item[0].key)):
        accuracies = ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
        alignments = ", ".join(f"{row['alignment']:.2f}" for row in rows)
        name = "torchdeq's IFT" if run.mode == "torchdeq" else f"`{run.mode}`"
        cells = f"`{run.kind}`", run.epochs or EPOCHS[run.kind], name, _penalty_of(run), accuracies, alignments
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _penalty_of(run: Run) -> str:
    if run.estimator == "jac_reg":
        return f"torchdeq's `jac_reg`, {run.weight}"
    target = run.weight.partition(":")[2]
    return f"automatic, target {target}" if target else "automatic" if run.weight else "none"


def write(results: dict[str, dict[str, Any]]) -> None:
    """Figure and table of what there is."""
    picture(results)
    write_text(PAGE, insert(PAGE.read_text(), OPENING, CLOSING, table(results)))


def main() -> None:
    """Run what is missing, and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for run in plan() if "--draw" not in sys.argv else []:
        if run.key not in results:
            results[run.key] = run.train()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(f"{run.key}: {results[run.key]}\n")
            sys.stdout.flush()
    write(results)


if __name__ == "__main__":
    main()
