"""A measurement leaves a model bit for bit as it was found, whatever it holds, and also where it fails."""

from __future__ import annotations

import functools
import random
from array import array
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchdeq
from torch import Tensor, nn

import torchdeq_ep as tep
from torchdeq_ep.measuring.restoring import Found, left_as_found


class Metric(nn.Module):
    """As torchmetrics has it: states are attributes, reset to copies of the defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.correct, self.values = torch.tensor(0), [torch.ones(1)]
        self._computed: float | None = 1.0

    def update(self, rows: Tensor) -> None:
        self.correct += len(rows)
        self.values.append(rows.detach().sum())
        self._computed = None


@dataclass(slots=True)
class Slotted:
    steps: int = 0


class Seen:
    """What a hook is a method of."""

    def __init__(self) -> None:
        self.calls, self.log = 0, {"sizes": [0]}

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        self.log["sizes"].append(self.calls)


class Cache(dict[int, Tensor]):
    """A dictionary that counts what it is asked for."""

    hits = 0

    def __setitem__(self, key: int, value: Tensor) -> None:
        self.hits += 1
        super().__setitem__(key, value)


class Laden(nn.Module):
    """A model with all kinds of state, every one of which its forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.read_out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.deq = torchdeq.get_deq(ift=True, f_max_iter=60, f_tol=1e-6)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.register_buffer("average", torch.zeros(()))
        self.metric, self.hidden = Metric(), [Metric()]
        self.steps, self.losses, self.recent = 0, [0.5], deque([7], maxlen=2)
        self.counts, self.order, self.groups = Counter(a=1), OrderedDict(a=1, b=2), defaultdict(list, {"a": [1]})
        self.names, self.cache, self.user = {"a"}, Cache(), UserDict(a=1)
        self.cache[0] = torch.zeros(2)
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.numbers, self.bytes = array("i", [1]), bytearray(b"a")
        self.slotted, self.namespace = Slotted(), SimpleNamespace(calls=0)
        self.generator = torch.Generator().manual_seed(0)
        self.dice, self.chance, self.state = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)
        self.seen, self.before = Seen(), Seen()
        self.layer.register_forward_hook(self.seen)
        self.layer.register_forward_pre_hook(functools.partial(self.before.__call__))
        self.fails_at = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self._change(x)
        drive = self.norm(x) + 0.01 * torch.randn(x.shape, generator=self.generator)
        (z,), _ = self.deq(lambda z: 0.5 * torch.tanh(self.layer(z)) + drive, torch.zeros_like(x))
        if self.steps == self.fails_at:
            raise KeyboardInterrupt
        noise = random.random() + np.random.rand() + self.dice.random() + self.chance.random() + self.state.rand()
        return self.read_out(z) * (1 + 0.1 * self.steps) + 0.01 * noise + self.average

    def _change(self, x: Tensor) -> None:
        self.adjacency.mul_(2)
        self.average = self.average + 1  # another buffer
        for metric in (self.metric, *self.hidden):
            metric.update(x)
        self.losses.append(1.0)
        self.recent.append(8)
        self.counts["a"] += 1
        self.order.move_to_end("a")
        self.groups["b"].append(2)
        self.names.add("b")
        self.cache[0].add_(1)
        self.cache[1] = torch.ones(1)
        self.user["b"] = 2
        self.tensor += 1
        self.array += 1
        self.numbers.append(2)
        self.bytes.extend(b"b")
        self.slotted.steps += 1
        self.namespace.calls += 1
        self.found_on_the_way = True

    def train(self, mode: bool = True) -> Laden:
        self.phase = "training" if mode else "evaluation"
        return super().train(mode)


def everything(model: Laden) -> dict[str, Any]:
    """All that the model holds, as plain values."""
    plain = lambda metric: (int(metric.correct), [value.tolist() for value in metric.values], metric._computed)  # noqa: E731
    return {
        "buffers": [buffer.to_dense().tolist() for buffer in model.buffers()],
        "metrics": [plain(metric) for metric in (model.metric, *model.hidden)],
        "lists": (model.losses, list(model.recent), list(model.numbers), bytes(model.bytes), sorted(model.names)),
        "mappings": [list(m.items()) for m in (model.counts, model.order, model.groups, model.user)],
        "cache": ({key: value.tolist() for key, value in model.cache.items()}, model.cache.hits),
        "tensors": (model.tensor.tolist(), model.array.tolist()),
        "counts": (model.steps, model.slotted.steps, model.namespace.calls),
        "hooks": [(seen.calls, seen.log["sizes"]) for seen in (model.seen, model.before)],
        "attributes": sorted(vars(model)),
        "training": ([module.training for module in model.modules()], getattr(model, "phase", None)),
        "generators": (model.generator.get_state().tolist(), model.dice.getstate(), repr(model.state.get_state())),
        "chance": model.chance.bit_generator.state,
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4), torch.randn(3, 1)


def comparing(model: nn.Module, data: Any, loss: Callable[..., Tensor]) -> object:
    return tep.compare(model, data, loss, ["ift", "ep"], repeats=1)


MEASUREMENTS = {"compare": comparing, "diagnose": lambda *given: tep.diagnose(*given, "ep-one-sided")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_two_measurements_leave_a_model_bit_for_bit_as_it_was_found(measure: Any, training: bool) -> None:
    model, data = Laden().train(training), batch()
    before = everything(model)
    first, second = (measure(model, data, nn.functional.mse_loss) for _ in range(2))
    assert everything(model) == before
    if measure is comparing:  # and are of one loss, so that counters and random numbers were those of the start
        assert [row.gradient_error for row in first.rows] == [row.gradient_error for row in second.rows]
        assert first.rows[0].gradient_error < 1e-4


@pytest.mark.parametrize(("name", "call"), [("compare", 1), ("compare", 3), ("diagnose", 1)])
def test_a_forward_pass_that_fails_leaves_the_model_as_it_was_found(name: str, call: int) -> None:
    model, data = Laden().eval(), batch()
    forward, calls = model.deq.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        model.fails_at = model.steps if len(calls) == call else 0
        return forward(*args, **kwargs)

    model.deq.forward = counted
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        MEASUREMENTS[name](model, data, nn.functional.mse_loss)
    assert everything(model) == before


class Loss(nn.Module):
    """A loss with a running mean, as of losses that balance themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(outputs, targets)
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean.clone()


def test_a_loss_with_a_state_is_left_as_it_was_found() -> None:
    loss, model, data = Loss(), Laden(), batch()
    first, second = (tep.compare(model, data, loss, ["ift", "ep"], repeats=1) for _ in range(2))
    assert (loss.mean.item(), loss.calls) == (1.0, 0)
    assert first.rows[1].gradient_error == second.rows[1].gradient_error


def test_parameters_and_what_shares_their_memory_are_not_copied() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000))
    model.flat = model[0].weight.detach().view(-1)
    model.averages = {"weight": [model[0].weight.data]}
    copied: list[int] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "clone":
                copied.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Watched():
        Found.on(model)
    assert sum(copied) == 2001  # the statistics of the batch norm


class Shelf(MutableMapping[str, int]):
    """A file with the methods of a dictionary, as of h5py and shelve: what it returns is another object every time."""

    def __init__(self) -> None:
        self.emptied, self.content = False, {"a": 1000}

    def __getitem__(self, key: str) -> int:
        return int(str(self.content[key]))

    def __setitem__(self, key: str, value: int) -> None:
        self.content[key] = value

    def __delitem__(self, key: str) -> None:
        self.emptied = True
        del self.content[key]

    def __iter__(self) -> Iterator[str]:
        return map("".join, self.content)

    def __len__(self) -> int:
        return len(self.content)


def test_files_are_never_emptied(tmp_path: Any) -> None:
    model = nn.Linear(2, 2)
    model.shelf, model.images = Shelf(), np.memmap(tmp_path / "images", np.uint8, "w+", shape=(4,))
    with left_as_found(model):
        model.images[0] = 7
    assert not model.shelf.emptied
    assert model.images[0] == 7  # a data set on disk is no state, and may be larger than memory


def test_a_lazy_module_stays_what_its_first_call_made_of_it() -> None:
    model = Laden()
    model.read_out = nn.LazyLinear(1)
    data = batch()
    assert tep.compare(model, data, nn.functional.mse_loss, ["ift"], repeats=1).rows[0].gradient_error < 1e-4
    assert model(data[0]).shape == (3, 1)


def test_a_graph_that_saved_a_buffer_can_still_be_differentiated() -> None:
    model = Laden()
    scale = nn.Parameter(torch.ones(2))
    loss = (scale * model.tensor).sum()
    with left_as_found(model):
        pass
    loss.backward()
    assert scale.grad is not None


def test_circular_and_deep_containers_end() -> None:
    model = nn.Linear(2, 2)
    model.ring = [1]
    model.ring.append(model.ring)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    model.deep = deep
    with left_as_found(model):
        model.ring.append(2)
        deep[0].append(3)
    assert len(model.ring) == 2
    assert len(deep[0]) == 1


def test_a_trial_begins_every_pass_with_the_state_of_a_model_in_training() -> None:
    model, data = Laden().eval(), batch()
    phases: list[tuple[str, int]] = []
    model.register_forward_pre_hook(lambda *_: phases.append((model.phase, model.steps)))
    tep.compare(model, data, nn.functional.mse_loss, ["ift"], repeats=1)
    assert set(phases) == {("training", 0)}
    assert len(phases) > 2
    assert model.phase == "evaluation"
