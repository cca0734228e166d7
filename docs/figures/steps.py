"""What a training step of the papers' network takes, in calls of its bare map, and beside the papers' own code.

    python docs/figures/steps.py path/to/mnist
    python docs/figures/steps.py path/to/mnist --papers path/to/generalized-holo-ep --jax path/to/python

trains the network of Table 1 for 1,500 steps by exact gradients, times steps of each gradient in turn with calls of the
bare map on the same batch, and writes docs/results/reproduction/steps.json and the tables of docs/reproduction.md. The
second form also runs `steps_papers.py` on a checkout of the papers' public code, by a Python that has jax and flax; the
first leaves out the table of ratios to it, since times of two machines make none. The column "before" is a record:
former code was timed once, by a copy of this script. All times are those of the processor, on one thread, so that other
load matters little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.host import BackwardHandle
from torchdeq_ep.measuring import write_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pages import insert  # noqa: E402

RESULTS = HERE.parent / "results" / "reproduction" / "steps.json"
PAGE = HERE.parent / "reproduction.md"
BEGIN, END = "<!-- The tables are written by docs/figures/steps.py. -->", "<!-- End of the tables. -->"
BATCH, STEPS, ROUNDS, CALLS, PROCESSES = 50, 1500, 25, 40, 3
TARGETS = {"ep-one-sided:beta=0.05": 75, "ep:beta=0.05": 90, "ep:beta=0.5": 160, "hep:n_points=4,beta=0.5": 300}
"""Bare calls of the map that a step should take at most."""
ROWS = {
    "ift": "exact",
    "ep-one-sided:beta=0.05": "one-sided, 0.05",
    "ep:beta=0.05": "symmetric, 0.05",
    "hep:n_points=4,beta=0.05": "four points, 0.05",
    "ep-one-sided:beta=0.5": "one-sided, 0.5",
    "ep:beta=0.5": "symmetric, 0.5",
    "hep:n_points=4,beta=0.5": "four points, 0.5",
}
PAPERS = {"1": "ep-one-sided:beta=0.05", "2": "ep:beta=0.05", "4": "hep:n_points=4,beta=0.05"}
"""Numbers of points of the papers' code, and what they are here."""
PAPERS_BETA = 0.05

Batch = tuple[Tensor, Tensor]
Times = dict[str, list[float]]


class Training:
    """The network of the recipe, and batches."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches

    @classmethod
    def of(cls, batches: list[Batch], steps: int) -> Training:
        """The network after steps with exact gradients: on an untrained one nudges converge sooner."""
        import torchdeq_ep_lightning as lightning

        torch.manual_seed(0)
        options = {"hidden": [256, 256, 10], "damping": 0.5, "gain": 0.5, "free_tol": 1e-3}
        training = cls(lightning.VectorFieldClassifier((1, 28, 28), 10, **options), batches)
        optimizer = torch.optim.SGD(training.model.parameters(), 0.01, 0.9)
        with tep.use_backward(training.model, "ift", tol=1e-2), _quiet():
            for k in range(steps):
                training.step(optimizer, batches[k % len(batches)])
        return training

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """One step, as Lightning makes it."""
        loss = self.model.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        self.model.backward(loss)
        optimizer.step()

    def bare(self, batch: Batch, wrap: Callable[[Any], Any] = lambda f: f) -> Callable[[], None]:
        """Calls of the map itself, or of what it is wrapped in, without autograd."""
        network = self.model.network
        with torch.no_grad():
            f = wrap(network.map(batch[0].flatten(1)))

        @torch.no_grad()
        def run() -> None:
            u = network.initial_state(BATCH)
            for _ in range(CALLS):
                u = f(u)

        return run

    def mode(self, spec: str) -> Any:
        """A mode with the options of the recipe."""
        import torchdeq_ep_lightning as lightning

        options = {"metric": "network.nudge_metric", "amplitude": "per-sample", "on_divergence": "accept"}
        callback = lightning.SwapBackward(spec, max_iter=20, tol=1e-2, **options)
        return callback._mode(spec, self.model.network.nudge_metric, lambda: 1.0)

    @contextmanager
    def timed(self, spec: str) -> Iterator[tuple[Callable[[], None], Times, BackwardHandle]]:
        """A step and bare calls on the same batch, one batch after the other, and the milliseconds they have taken."""
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-12, 0.9)  # the network is to stay what it is
        times: Times = {"step": [], "bare": []}
        batches = itertools.cycle(self.batches)

        def turn() -> None:
            batch = next(batches)
            times["bare"].append(milliseconds(self.bare(batch)) / CALLS)
            times["step"].append(milliseconds(lambda: self.step(optimizer, batch)))

        with tep.use_backward(self.model, self.mode(spec)) as handle, _quiet():
            for _ in range(3):  # in the first passes more is measured
                self.step(optimizer, next(batches))
            yield turn, times, handle

    def time(self, spec: str) -> Times:
        """Milliseconds of steps, and of bare calls in turn with them."""
        with self.timed(spec) as (turn, times, _):
            for _ in range(ROUNDS):
                turn()
        return times


def _quiet() -> warnings.catch_warnings[None]:
    return warnings.catch_warnings(action="ignore")


def milliseconds(call: Callable[[], object]) -> float:
    """Time of the processor that a call takes."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def in_bare_calls(times: Times) -> float:
    """A step in calls of the bare map."""
    return statistics.median(times["step"]) / statistics.median(times["bare"])


def load(folder: str) -> list[Batch]:
    """Batches of the first images of a folder of Parquet files."""
    from torchdeq_ep_lightning.images import load_images

    images, _ = load_images(folder, limits=(100 * BATCH, 1))
    rows = torch.arange(100 * BATCH).split(BATCH)
    scale = 255 if images.pixels.dtype == torch.uint8 else 1
    return [(images.take(k).float() / scale, images.labels[k]) for k in rows]


def measure(folder: str) -> dict[str, Any]:
    """All gradients once: in a process of its own."""
    training = Training.of(load(folder), STEPS)
    found = {}
    for spec in ROWS:
        times = training.time(spec)
        found[spec] = {
            "bare_calls": round(in_bare_calls(times), 1),
            "milliseconds": round(statistics.median(times["step"]), 2),
        }
    return found


def papers(python: str, checkout: str) -> dict[str, float]:
    """Milliseconds of a gradient of the papers' code by its number of points."""
    command = [python, str(HERE / "steps_papers.py"), checkout, str(PAPERS_BETA)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"the papers' code ended with:\n{ended.stderr[-2000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def median(found: Sequence[dict[str, Any]], spec: str, key: str) -> float:
    """Over the processes."""
    return statistics.median(run[spec][key] for run in found)


def tables(record: dict[str, Any]) -> str:
    """The tables of a record, in Markdown: the second where the papers' code was timed on the same machine."""
    lines = ["| gradient | before | now | aim |", "|---|---|---|---|"]
    for spec, name in ROWS.items():
        before, now = (median(record[key], spec, "bare_calls") for key in ("before", "now"))
        lines.append(f"| {name} | {before:.0f} | {now:.0f} | {TARGETS.get(spec, '-')} |")
    if "papers" in record:
        lines += ["", "| gradient | the papers' code, ms | here, ms | ratio |", "|---|---|---|---|"]
    for points, spec in PAPERS.items() if "papers" in record else ():
        theirs, ours = record["papers"][points], median(record["now"], spec, "milliseconds")
        lines.append(f"| {ROWS[spec]} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, keep, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of MNIST as Parquet")
    parser.add_argument("--papers", help="a checkout of the papers' code")
    parser.add_argument("--jax", default=sys.executable, help="a Python with jax and flax")
    parser.add_argument("--once", action="store_true", help="print the figures of one process, and keep nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.once:
        sys.stdout.write(json.dumps(measure(options.data)) + "\n")
        return 0
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, options.data, "--once"]
    runs = [subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True) for _ in range(PROCESSES)]
    record["now"] = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    record["machine"] = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    record.pop("papers", None)
    if options.papers:
        record["papers"] = papers(options.jax, options.papers)
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    write_text(PAGE, insert(PAGE.read_text(encoding="utf-8"), BEGIN, END, tables(record)))
    sys.stdout.write(tables(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
