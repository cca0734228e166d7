"""A monitor never ends a training, and never changes one: the module and the random state are what they were."""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchdeq
import torchmetrics
from lightning_problems import fit
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchdeq_ep.errors import InvalidOptionError, MeasurementSkippedWarning
from torchdeq_ep.extend import left_as_found
from torchdeq_ep_lightning import AlignmentMonitor, NudgeStats
from torchdeq_ep_lightning.callbacks.cutting import UncuttableError, first_samples

pytestmark = [
    pytest.mark.filterwarnings("ignore::torchdeq_ep.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


class Tally:
    """A counter of the user's own."""

    def __init__(self) -> None:
        self.steps, self.seen = 0, {"rows": [0]}


class Counted(LightningModule):
    """A module with all kinds of state beside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.read_out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.deq = torchdeq.get_deq(ift=True, f_max_iter=30, f_tol=1e-5)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()
        self.losses: list[float] = []
        self.recent: deque[int] = deque(maxlen=3)
        self.counts: Counter[str] = Counter()
        self.average, self.array = torch.zeros(()), np.zeros(2)
        self.generator = torch.Generator().manual_seed(0)
        self.dice, self.chance = random.Random(0), np.random.default_rng(0)
        self.tally = Tally()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        (z,), _ = self.deq(lambda z: 0.5 * torch.tanh(self.layer(z)) + x, torch.zeros_like(x))
        return self.read_out(z)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x + 0.01 * torch.randn(x.shape, generator=self.generator))
        loss = nn.functional.cross_entropy(logits, y) * (1 + 0.01 * random.random() + 0.01 * np.random.rand())
        self.accuracy(logits, y)
        self.mean(loss.detach())
        self.kept(loss.detach())
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.losses.append(float(loss.detach()))
        self.recent.append(self.steps)
        self.counts["steps"] += 1
        self.average.mul_(0.9).add_(loss.detach())
        self.array += self.dice.random() + self.chance.random()
        self.steps += 1
        self.tally.steps += 1
        self.tally.seen["rows"].append(len(x))
        self.found_on_the_way = True
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def pairs(rows: int = 24) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)
    return DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)


def state_of(module: Counted) -> dict[str, Any]:
    return {
        "weights": [p.tolist() for p in module.parameters()],
        "mean": float(module.mean.compute()),
        "updates": (module.mean.update_count, module.accuracy.update_count),
        "kept": module.kept.compute().tolist(),
        "lists": (module.losses, list(module.recent), dict(module.counts), module.steps),
        "arrays": (module.average.item(), module.array.tolist()),
        "tally": (module.tally.steps, module.tally.seen),
        "drawn": (module.dice.random(), module.chance.random(), torch.rand(1).item()),
    }


def test_metrics_and_counters_are_those_of_a_training_without_the_monitor(tmp_path):
    found = []
    for callbacks in ([], [AlignmentMonitor(every=1, samples=2), NudgeStats()]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = Counted()
        trainer = fit(module, tmp_path, *callbacks, loader=pairs(), max_epochs=2)
        found.append({**state_of(module), "accuracy": float(trainer.callback_metrics["accuracy"])})
    assert found[0] == found[1]
    assert found[0]["tally"][0] == 8


def test_every_kind_of_attribute_is_given_back():
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    found = []
    for measurements in (0, 3):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = Counted()
        module.log = lambda *_, **__: None
        module.training_step(batch, 0)
        del module.found_on_the_way
        with left_as_found(module):
            for _ in range(measurements):
                module.training_step(batch, 0)
                module.new = [1]
        assert not hasattr(module, "found_on_the_way")
        assert not hasattr(module, "new")
        found.append(state_of(module))
    assert found[0] == found[1]


class Graph(Counted):
    """Batches of a graph: features of nodes, pairs of nodes, labels of nodes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, edges, y = batch
        mixed = x.index_add(0, edges[0], 0.1 * x[edges[1]])
        return nn.functional.cross_entropy(self(mixed), y)


class Scaled(Counted):
    """A batch with a scalar, a number and names in it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["x"], batch["y"]
        assert len(batch["names"]) == len(x)
        return nn.functional.cross_entropy(self(x) * batch["scale"] * batch["number"], y)


class Sparse(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x.to_dense()), y)


class Demanding(Counted):
    """Needs a batch of six."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x.reshape(6, 4)), y)


@dataclass
class Pair:
    x: Tensor
    y: Tensor


class Structured(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch.x), batch.y)


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
EDGES = torch.tensor([[0, 1, 2, 3, 5], [1, 2, 3, 4, 0]])


def several(batch: Any) -> DataLoader:
    return DataLoader([batch] * 3, batch_size=None)


@pytest.mark.parametrize(
    ("kind", "batch", "reason"),
    [
        (Graph, (X, EDGES, Y), "2 and 6 rows"),
        (Sparse, (X.to_sparse(), Y), "sparse"),
        (Sparse, "compressed", "sparse"),
        (Demanding, (X, Y), "RuntimeError"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_cannot_be_measured_is_left_out_with_one_warning(tmp_path, kind, batch, reason):
    batch = (X.to_sparse_csr(), Y) if batch == "compressed" else batch  # torch warns of it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MeasurementSkippedWarning)
        trainer = fit(kind(), tmp_path, AlignmentMonitor(every=1, samples=2), loader=several(batch), max_epochs=2)
    said = [str(w.message) for w in caught if issubclass(w.category, MeasurementSkippedWarning)]
    assert len(said) == 1
    assert reason in said[0]
    assert trainer.global_step == 6
    assert "alignment/cosine" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        (Scaled, {"x": X, "y": Y, "scale": torch.tensor(2.0), "number": 0.5, "names": list("abcdef")}),
        (Structured, Pair(X, Y)),
        (Counted, [X, Y]),
    ],
)
def test_scalars_names_and_structures_are_cut_as_they_should(tmp_path, kind, batch):
    trainer = fit(kind(), tmp_path, AlignmentMonitor(every=1, samples=2), loader=several(batch))
    assert trainer.callback_metrics["alignment/cosine"] > 0


def test_a_function_of_ones_own_cuts(tmp_path):
    asked = []

    def cut(batch: Any, samples: int) -> Any:
        asked.append(samples)
        x, edges, y = batch
        return x[:samples], edges[:, (edges < samples).all(0)], y[:samples]

    monitor = AlignmentMonitor(every=1, samples=3, cut=cut)
    trainer = fit(Graph(), tmp_path, monitor, loader=several((X, EDGES, Y)))
    assert asked == [3, 3, 3]
    assert trainer.callback_metrics["alignment/cosine"] > 0
    module = Graph()
    module.whole = lambda batch, samples: batch
    fit(module, tmp_path, AlignmentMonitor(every=1, cut="whole"), loader=several((X, EDGES, Y)))
    with pytest.raises(InvalidOptionError, match="nothing"):
        fit(Graph(), tmp_path, AlignmentMonitor(cut="nothing"), loader=several((X, EDGES, Y)))


@pytest.mark.parametrize("batch", [object(), torch.tensor(1.0), (torch.zeros(3), torch.zeros(4)), {}])
def test_batches_without_rows_are_named(batch):
    with pytest.raises(UncuttableError):
        first_samples(batch, 2)
