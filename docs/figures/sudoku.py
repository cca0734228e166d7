"""Trains a looped transformer on 4 x 4 Sudoku with each gradient of the menu: docs/sudoku.md.

    python docs/figures/sudoku.py            # all runs that docs/results/sudoku.json does not have yet
    python docs/figures/sudoku.py --rank     # how far each gradient is from that of the steps, at the start and the end
    python docs/figures/sudoku.py --steps 50 # a short trial, which is written nowhere

A run is named by gradient and seed. Each is written as soon as it is done, with its accuracy over time, so that the
script may be stopped and started at will; weights at the start and the end are in build/sudoku.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchdeq_ep as tep

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "sudoku.json"
RANKING = ROOT / "docs" / "results" / "sudoku-ranking.json"
WEIGHTS = ROOT / "build" / "sudoku"

GRADIENTS = ("unrolled", "unrolled:k=4", "unrolled:k=2", "one-step", "neumann:k=4", "phantom:k=4", "ift", "aep", "ep")
SEEDS = (0, 1, 2)
STEPS, BATCH, LOOP = 600, 32, 8
HELD_OUT = 64


def grids() -> Tensor:
    """All 288 solutions, of shape (288, 16), with the digits 1 to 4."""
    permutations = list(itertools.permutations((1, 2, 3, 4)))
    found = []
    for one, two in itertools.product(permutations, repeat=2):
        if set(one[:2]) & set(two[:2]) or any(a == b for a, b in zip(one, two, strict=True)):
            continue  # a box or a column has a digit twice
        for three, four in itertools.product(permutations, repeat=2):
            columns = zip(one, two, three, four, strict=True)
            if not set(three[:2]) & set(four[:2]) and all(len(set(column)) == 4 for column in columns):
                found.append(one + two + three + four)
    return torch.tensor(found)


class Puzzles:
    """Puzzles with 6 to 10 clues and one solution, drawn at random."""

    def __init__(self, everything: Tensor, own: Tensor, seed: int) -> None:
        self.everything, self.own = everything, own
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Puzzles, with 0 for an empty cell, and their solutions."""
        grid = self.own[torch.randint(len(self.own), (2 * count,), generator=self.generator)]
        clues = torch.randint(6, 11, (2 * count, 1), generator=self.generator)
        shown = torch.rand(2 * count, 16, generator=self.generator).argsort(1).argsort(1) < clues
        puzzle = torch.where(shown, grid, 0)
        agrees = ((self.everything == puzzle[:, None]) | (puzzle[:, None] == 0)).all(2).sum(1)
        unique = agrees == 1
        assert int(unique.sum()) >= count
        return puzzle[unique][:count], grid[unique][:count]


class Reasoner(nn.Module):
    """One transformer block, looped: `z <- block(z + x)`, where `x` embeds the puzzle."""

    def __init__(self, width: int = 48, backward: str = "unrolled") -> None:
        super().__init__()
        self.backward, self.width = backward, width
        self.digits, self.cells = nn.Embedding(5, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.read_out = nn.Linear(width, 4)
        self.report: tep.LoopReport | None = None
        self.memory = tep.Memory(lasting=True)

    def forward(self, puzzle: Tensor) -> Tensor:
        x = self.digits(puzzle) + self.cells
        options = {"on_stop": self.stopped, "memory": self.memory}
        return self.read_out(tep.loop(lambda z: self.block(z + x), torch.zeros_like(x), LOOP, self.backward, **options))

    def stopped(self, report: tep.LoopReport) -> None:
        self.report = report


def loss_of(scores: Tensor, solution: Tensor) -> Tensor:
    """Cross-entropy over all cells."""
    return functional.cross_entropy(scores.flatten(0, 1), solution.flatten() - 1)


def accuracy(model: Reasoner, puzzles: Tensor, solutions: Tensor) -> float:
    """Share of puzzles with every cell right."""
    with torch.no_grad():
        return float((model(puzzles).argmax(2) + 1 == solutions).all(1).double().mean())


def say(line: str) -> None:
    """Progress, a line at a time."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def train(gradient: str, seed: int, steps: int) -> dict[str, object]:
    """One run."""
    torch.manual_seed(seed)
    everything = grids()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(100))
    train_set = Puzzles(everything, everything[order[HELD_OUT:]], seed)
    test = Puzzles(everything, everything[order[:HELD_OUT]], 1000).draw(500)
    model = Reasoner(backward=gradient)
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    name = f"{gradient.replace(':', '-')}-{seed}"
    torch.save(model.state_dict(), WEIGHTS / f"{name}-start.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    curve, residuals = [], []
    begin = time.perf_counter()
    error = ""
    for step in range(steps):
        puzzles, solutions = train_set.draw(BATCH)
        optimizer.zero_grad()
        try:
            loss = loss_of(model(puzzles), solutions)
            loss.backward()
        except tep.errors.EPError as problem:
            error = f"step {step}: {type(problem).__name__}"
            break
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            curve.append((step + 1, accuracy(model, *test)))
            assert model.report is not None
            residuals.append(model.report.residual)
            say(f"{gradient} / {seed}: {curve[-1]} loss {float(loss.detach()):.3f} {seconds:.0f} s, {model.report}")
    torch.save(model.state_dict(), WEIGHTS / f"{name}-end.pt")
    return {
        "accuracy": accuracy(model, *test),
        "curve": curve,
        "residuals": residuals,
        "seconds": time.perf_counter() - begin,
        "error": error,
    }


def rank(seed: int) -> dict[str, dict[str, list[float]]]:
    """Each gradient beside backpropagation through all steps, at the start and at the end of its run: error, cosine."""
    everything = grids()
    batch = Puzzles(everything, everything, 2000 + seed).draw(BATCH)
    found = {}
    for when in ("start", "end"):
        model = Reasoner()
        model.load_state_dict(torch.load(WEIGHTS / f"unrolled-{seed}-{when}.pt"))
        table = tep.compare(model, batch, loss_of, GRADIENTS, exact="steps", repeats=1)
        found[when] = {
            row.backward: [row.gradient_error, row.gradient_cosine, row.step_milliseconds] for row in table.rows
        }
        say(f"{seed} {when}: {table.sentence()}")
    return found


def tables() -> str:
    """The tables of the page."""
    runs, ranking = json.loads(RESULTS.read_text()), json.loads(RANKING.read_text())
    lines = ["| gradient | puzzles solved, seed by seed | steps a second |", "|---|---|---:|"]
    for gradient in GRADIENTS:
        own = [runs[key] for key in (f"{gradient} / {seed}" for seed in SEEDS) if key in runs]
        if own:
            solved = ", ".join(f"{100 * run['accuracy']:.0f} %" for run in own)
            speed = STEPS / min(run["seconds"] for run in own)
            lines.append(f"| `{gradient}` | {solved} | {speed:.1f} |")
    lines += ["", "| gradient | error, cosine before training | error, cosine after training |", "|---|---|---|"]
    for gradient in GRADIENTS:
        cells = []
        for when in ("start", "end"):
            found = [of[when][gradient] for of in ranking.values() if when in of]
            error, cosine = (sum(row[k] for row in found) / len(found) for k in (0, 1))
            cells.append(f"{error:.2g}, {cosine:.2f}")
        lines.append(f"| `{gradient}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rank", action="store_true", help="the ranking, of weights that are there")
    parser.add_argument("--tables", action="store_true", help="print the tables of the page")
    parser.add_argument("--gradient", action="append")
    parser.add_argument("--seed", action="append", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", tep.errors.EPWarning)
    if given.tables:
        say(tables())
        return
    if given.rank:
        known = json.loads(RANKING.read_text()) if RANKING.exists() else {}
        for seed in given.seed or SEEDS:
            known[str(seed)] = rank(seed)
            RANKING.write_text(json.dumps(known, indent=1) + "\n")
        return
    is_trial = given.steps != STEPS
    for seed, gradient in itertools.product(given.seed or SEEDS, given.gradient or GRADIENTS):
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        key = f"{gradient} / {seed}"
        if key in known and not is_trial:
            continue
        run = train(gradient, seed, given.steps)
        say(f"{key}: {run}")
        if not is_trial:
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps({**known, key: run}, indent=1) + "\n")


if __name__ == "__main__":
    main()
