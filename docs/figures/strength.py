"""How strong should homeostasis be? The table of `docs/homeostasis.md`: two small models, two rates of Adam.

    python docs/figures/strength.py

trains each of them three times and writes docs/results/strength.json and the table, in ten minutes.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchdeq
from torch import Tensor, nn
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import EPError
from torchdeq_ep.host import HomeostasisHandle
from torchdeq_ep.measuring import write_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from pages import insert  # noqa: E402

RESULTS, PAGE = HERE.parent / "results" / "strength.json", HERE.parent / "homeostasis.md"
BEGIN, END = "<!-- The table is written by docs/figures/strength.py. -->", "<!-- End of this table. -->"
SAMPLES, INPUTS, STEPS = 64, 16, 100
SEEDS, RATES, LAYERS = (0, 1, 2), (5e-3, 1e-3), (2, 1)

Register = Callable[[nn.Module, torch.optim.Optimizer], HomeostasisHandle | None]
Found = dict[str, Any]


def _random(share: float) -> Register:
    return lambda model, adam: tep.register_homeostasis(model, share, estimator="antisymmetric", descent=adam)


PENALTIES: dict[str, Register] = {
    "none": lambda model, adam: None,
    "random, weight 5": lambda model, adam: tep.register_homeostasis(model, 5.0),
    "random, weight 20": lambda model, adam: tep.register_homeostasis(model, 20.0),
    "random, weight 50": lambda model, adam: tep.register_homeostasis(model, 50.0),
    "random, beside Adam, share 0.1": _random(0.1),
    "random, beside Adam": _random(1.0),
    "error vector": lambda model, adam: tep.register_homeostasis(model),
    "error vector, beside Adam": lambda model, adam: tep.register_homeostasis(model, descent=adam),
}


class Layers(nn.Module):
    """A DEQ of tanh layers: one of 24 units, orthogonal, or two of 48."""

    def __init__(self, count: int) -> None:
        super().__init__()
        width = 24 if count == 1 else 48
        self.read_in, self.read_out = nn.Linear(INPUTS, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        if count == 1:
            nn.init.orthogonal_(self.layers[0].weight, gain=0.6)
        else:
            for layer in self.layers:
                layer.weight.data.mul_(0.7)
        self.deq = torchdeq.get_deq(ift=True, f_tol=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        drive = self.read_in(x)

        def f(z: Tensor) -> Tensor:
            first, *others = self.layers
            z = torch.tanh(first(z) + drive)
            for layer in others:
                z = torch.tanh(layer(z))
            return z

        z, _ = self.deq(f, torch.zeros_like(drive))
        return self.read_out(z[-1])


def train(layers: int, seed: int, rate: float, register: Register) -> Found:
    """The loss after training, and the cosine of the gradients of `ep` and `ift`; NaN where it did not end."""
    torch.manual_seed(seed)
    model, x = Layers(layers), torch.randn(SAMPLES, INPUTS)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    adam = torch.optim.Adam(model.parameters(), rate)
    tep.use_backward(model, "ep")
    homeostasis = register(model, adam)
    try:
        for _ in range(STEPS):
            adam.zero_grad()
            loss = functional.cross_entropy(model(x), labels)
            (loss if homeostasis is None else loss + homeostasis.penalty()).backward()
            adam.step()
        if homeostasis is not None:
            homeostasis.remove()
        return {"loss": loss.item(), "alignment": _alignment(model, x, labels)}
    except EPError as error:
        return {"loss": math.nan, "alignment": math.nan, "failed": type(error).__name__}


def _alignment(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    gradients = []
    for mode in ("ep", "ift"):
        with tep.use_backward(model, mode):
            loss = functional.cross_entropy(model(x), labels)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.cosine_similarity(*gradients, dim=0).item()


def table(record: dict[str, Found]) -> str:
    """A row for each penalty; for each rate, the losses of two layers and of one, and the range of the alignment."""
    heads = [part for rate in RATES for part in (f"loss, rate {rate:g}", "alignment")]
    lines = ["| penalty | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in PENALTIES:
        cells = []
        for rate in RATES:
            runs = {n: [record[f"{name}/{rate:g}/{n}/{seed}"] for seed in SEEDS] for n in LAYERS}
            losses = (statistics.median(run["loss"] for run in of_model) for of_model in runs.values())
            aligned = [run["alignment"] for of_model in runs.values() for run in of_model]
            cells += [", ".join(f"{loss:.3f}" for loss in losses), f"{min(aligned):.2f} to {max(aligned):.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and write the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record: dict[str, Found] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, register in PENALTIES.items():
        for rate in RATES:
            for layers in LAYERS:
                for seed in SEEDS:
                    key = f"{name}/{rate:g}/{layers}/{seed}"
                    if key not in record:
                        record[key] = train(layers, seed, rate, register)
        write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    write_text(PAGE, insert(PAGE.read_text(), BEGIN, END, table(record)))
    sys.stdout.write(table(record) + "\n")


if __name__ == "__main__":
    main()
