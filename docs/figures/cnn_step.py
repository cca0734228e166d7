"""Time and memory of a training step of the papers' CNN, at its full width, for a table of docs/reproduction.md.

    python docs/figures/cnn_step.py path/to/cifar10

takes the network and the swap of the recipe `cifar10-cnn` and 16 images in single precision, measures a step in each of
the backward passes, and with homeostasis, its probes at once or one at a time, and writes
docs/results/reproduction/cnn-step.json and the table. Times are those of the processor, on one thread; peak memory is
what a step allocates beyond the model. The network is as it is initialised: its free phase grows longer in training.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import torchdeq_ep as tep
from torchdeq_ep.measuring import write_text
from torchdeq_ep.measuring.costs import peak_memory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pages import insert  # noqa: E402

RESULTS = HERE.parent / "results" / "reproduction" / "cnn-step.json"
PAGE = HERE.parent / "reproduction.md"
BEGIN, END = "<!-- The table is written by docs/figures/cnn_step.py. -->", "<!-- End of that table. -->"
RECIPE, BATCH, ROUNDS = "cifar10-cnn", 16, 1
ROWS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "exact": ("ift", None),
    "infinitesimal": ("ep-infinitesimal", None),
    "symmetric, 1": ("ep:beta=1", None),
    "four points, 1": ("hep:n_points=4,beta=1", None),
    "infinitesimal, homeostasis with 5 probes": ("ep-infinitesimal", {"probes": 5}),
    "the same, one probe at a time": ("ep-infinitesimal", {"probes": 5, "chunk": 1}),
}


def measure(batch: tuple[Tensor, Tensor], spec: str, homeostasis: dict[str, Any] | None) -> dict[str, float]:
    """Seconds of a step of training as the recipe makes it, peak memory in MiB, and steps of the nudged phase."""
    import torchdeq_ep_lightning as lightning
    from torchdeq_ep_lightning.training import recipes

    settings = yaml.safe_load(recipes()[RECIPE].read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model = lightning.VectorFieldClassifier(tuple(settings["data"]["shape"]), 10, **settings["model"])
    optimizer = torch.optim.SGD(model.parameters(), 1e-12, 0.9)  # the network is to stay what it is
    swap = lightning.SwapBackward(spec, **settings["swap"])
    with ExitStack() as stack, warnings.catch_warnings(action="ignore"):
        handle = stack.enter_context(tep.use_backward(model, swap._mode(spec, model.network.nudge_metric, lambda: 1.0)))
        penalty: Callable[[], Any] = lambda: 0.0  # noqa: E731
        if homeostasis is not None:
            weight, metric = settings["homeostasis"]["weight"], model.network.metric
            registered = tep.register_homeostasis(model, weight, metric=metric, **homeostasis)
            penalty = stack.enter_context(registered).penalty

        def step() -> None:
            loss = model.training_step(batch, 0)["loss"]
            optimizer.zero_grad()
            model.backward(loss + penalty())
            optimizer.step()

        times = []
        for _ in range(1 + ROUNDS):  # in the first passes more is measured
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        return {
            "seconds": statistics.median(times[1:]),
            "mebibytes": peak_memory(step, torch.device("cpu")) / 2**20,
            "nudge_steps": next(iter(handle.last.values())).iterations,
        }


def table(found: dict[str, dict[str, float]]) -> str:
    """The measurements in Markdown, beside those of the exact gradient."""
    exact = found["exact"]
    lines = ["| gradient | seconds | of the exact one | peak memory, MiB | of the exact one |", "|---|---|---|---|---|"]
    for name, row in found.items():
        seconds, size = row["seconds"], row["mebibytes"]
        ratios = seconds / exact["seconds"], size / exact["mebibytes"]
        lines.append(f"| {name} | {seconds:.1f} | {ratios[0]:.2f} | {size:.0f} | {ratios[1]:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Measure if there are images to, and write the table."""
    if arguments:
        from torchdeq_ep_lightning.images import load_images

        torch.set_num_threads(1)
        images, _ = load_images(arguments[0], limits=(BATCH, 1))
        batch = images.pixels.float() / 255, images.labels
        found = {name: measure(batch, *what) for name, what in ROWS.items()}
        write_text(RESULTS, json.dumps({"recipe": RECIPE, "batch": BATCH, "rows": found}, indent=1) + "\n")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    write_text(PAGE, insert(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
