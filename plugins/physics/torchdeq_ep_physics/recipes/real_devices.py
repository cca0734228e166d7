"""What a circuit of real devices still learns: accuracy against the bits of its conductances, and their mismatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch.nn.utils import parametrize

from torchdeq_ep.extend import check_count
from torchdeq_ep_physics.drawing import INK, TONES, figure, save_figure
from torchdeq_ep_physics.hardware import Mismatch, Quantised
from torchdeq_ep_physics.recipes.circuits import load
from torchdeq_ep_physics.recipes.learning_rules import accuracy, initial, train
from torchdeq_ep_physics.recipes.records import write_results

LOW, HIGH = 1e-6, 1e-3
"""Bounds of the conductances, in siemens."""

Accuracies = dict[str, dict[float, list[float]]]

BITS = (2, 4, 6, 8)
SPREADS = (0.1, 0.3, 1.0)


def devices(
    bits: Sequence[int] = BITS,
    spreads: Sequence[float] = SPREADS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    steps: int = 30,
    n_hidden: int = 8,
    batch: int = 15,
    path: str | None = None,
    results: str | None = None,
) -> Accuracies:
    """Train circuits of imperfect devices on iris, by equilibrium propagation.

    Args:
        bits: Of the conductances. `"levels"` keeps the trained numbers apart in full precision and writes the nearest
            of `2^bits` levels; `"pulses"` has nothing but the devices, which a step moves by whole pulses, with as
            many states.
        spreads: Of the devices' mismatch. `"in place"` trains on the devices, `"written"` on ideal ones, and writes the
            result to them.
        seeds: Of the split, the initial conductances, the batches and the devices.
        steps: Of training.
        n_hidden: Hidden nodes.
        batch: Samples in each step.
        path: Where to draw them; by default nowhere.
        results: Where they are written, as JSON; by default nowhere.

    Returns:
        For each of the four, by bits or spread, the part of the unseen samples that is right, for each seed.

    Raises:
        InvalidOptionError: If an option is not acceptable.
    """
    check_count("steps", steps, 1)
    found: Accuracies = {"levels": {}, "pulses": {}, "in place": {}, "written": {}}
    for seed in seeds:
        data = load("iris", seed)
        learn = partial(train, data=data, steps=steps, batch=batch, seed=seed, lr=0.3)
        for count in bits:
            network = initial(n_hidden, seed)
            parametrize.register_parametrization(network, "log_conductance", Quantised(count, LOW, HIGH))
            learn(network)
            found["levels"].setdefault(count, []).append(accuracy(network, data))
            network, bounds = initial(n_hidden, seed), (math.log(LOW), math.log(HIGH))
            pulse = (bounds[1] - bounds[0]) / (2**count - 1)
            learn(network, pulse=pulse, bounds=bounds)
            found["pulses"].setdefault(count, []).append(accuracy(network, data))
        ideal = initial(n_hidden, seed)
        learn(ideal)
        written = {name: value.clone() for name, value in ideal.state_dict().items()}
        for spread in spreads:
            network = initial(n_hidden, seed)
            device = Mismatch(network.log_conductance.numel(), spread, seed)
            parametrize.register_parametrization(network, "log_conductance", device)
            learn(network)
            found["in place"].setdefault(spread, []).append(accuracy(network, data))
            network = initial(n_hidden, seed)
            network.load_state_dict(written)
            parametrize.register_parametrization(network, "log_conductance", device)
            found["written"].setdefault(spread, []).append(accuracy(network, data))
    if path is not None:
        _draw(found, path)
    if results is not None:
        write_results(results, {"steps": steps, "batch": batch, "seeds": list(seeds), "accuracies": found})
    return found


def _draw(found: Accuracies, path: str) -> None:
    """Means over the seeds as lines, each seed as a dot."""
    drawn, axes = figure(1, 2, width=9.0, height=3.6)
    titles = ("bits of a conductance", "mismatch of the devices")
    for axis, title, names in zip(axes, titles, (("levels", "pulses"), ("in place", "written")), strict=True):
        for name, colour, marker in zip(names, TONES, "os", strict=False):
            values = found[name]
            means = [100 * sum(each) / len(each) for each in values.values()]
            axis.plot(list(values), means, color=colour, marker=marker, label=name)
            for place, each in values.items():
                axis.plot([place] * len(each), [100 * value for value in each], marker, color=colour, alpha=0.35, ms=4)
        axis.set_xlabel(title)
        axis.legend(frameon=False, labelcolor=INK)
    axes[0].set_ylabel("unseen samples right (%)")
    save_figure(drawn, path)
