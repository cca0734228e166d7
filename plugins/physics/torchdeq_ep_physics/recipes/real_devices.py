"""What a circuit of real devices still learns: with few bits, mismatch, noise of readings, and drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchdeq_ep.extend import check_count
from torchdeq_ep_physics.drawing import INK, TONES, figure, save_figure
from torchdeq_ep_physics.hardware import Drift, Mismatch, Quantised
from torchdeq_ep_physics.recipes.circuits import load
from torchdeq_ep_physics.recipes.learning_rules import accuracy, initial, train
from torchdeq_ep_physics.recipes.records import write_results
from torchdeq_ep_physics.resistive import ResistiveNetwork

LOW, HIGH = 1e-6, 1e-3
"""Bounds of the conductances, in siemens."""

Accuracies = dict[str, dict[float, list[float]]]

BITS = (2, 4, 6, 8, 10)
SPREADS = (0.1, 0.3, 1.0)
NOISES = (1e-4, 1e-3, 1e-2)
TIMES = (1.0, 1e2, 1e4, 1e6)
EXPONENT, EXPONENT_SPREAD = 0.05, 0.02
"""Of the drift: those of phase-change memory."""


def devices(
    bits: Sequence[int] = BITS,
    spreads: Sequence[float] = SPREADS,
    noises: Sequence[float] = NOISES,
    times: Sequence[float] = TIMES,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    steps: int = 150,
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
        noises: Of the readings that training compares, in volts: `"noise"`.
        times: Since an ideal circuit was written to devices that drift, in units of `t0`. `"drifted"` is what it does
            then, `"retrained"` what it does after a fifth of the steps more on the drifted devices.
        seeds: Of the split, the initial conductances, the batches and the devices.
        steps: Of training.
        n_hidden: Hidden nodes.
        batch: Samples in each step.
        path: Where to draw them; by default nowhere.
        results: Where they are written, as JSON; by default nowhere.

    Returns:
        For each of the names above, by bits, spread, noise or time, the part of the unseen samples that is right, for
        each seed; and the same of ideal circuits, `"ideal"`, by a tenth, a half and the whole of the steps.

    Raises:
        InvalidOptionError: If an option is not acceptable.
    """
    check_count("steps", steps, 1)
    names = ("levels", "pulses", "in place", "written", "noise", "drifted", "retrained", "ideal")
    found: Accuracies = {name: {} for name in names}

    def note(name: str, place: float, network: ResistiveNetwork) -> None:
        found[name].setdefault(place, []).append(accuracy(network, data))

    for seed in seeds:
        data = load("iris", seed)
        learn = partial(train, data=data, batch=batch, seed=seed, lr=0.3)
        make = partial(initial, n_hidden, seed)
        for part in (10, 2, 1):
            ideal = make()
            learn(ideal, steps=-(-steps // part))
            note("ideal", 1 / part, ideal)
        written = {name: value.clone() for name, value in ideal.state_dict().items()}
        for count in bits:
            note("levels", count, _trained_on(Quantised(count, LOW, HIGH), make(), partial(learn, steps=steps)))
            network, bounds = make(), (math.log(LOW), math.log(HIGH))
            learn(network, steps=steps, pulse=(bounds[1] - bounds[0]) / (2**count - 1), bounds=bounds)
            note("pulses", count, network)
        for spread in spreads:
            device = Mismatch(ideal.log_conductance.numel(), spread, seed)
            note("in place", spread, _trained_on(device, make(), partial(learn, steps=steps)))
            note("written", spread, _trained_on(device, make(), None, written))
        for noise in noises:
            network = make()
            learn(network, steps=steps, noise=noise)
            note("noise", noise, network)
        for time in times:
            drift = Drift(ideal.log_conductance.numel(), EXPONENT, EXPONENT_SPREAD, seed)
            drift.elapsed = time
            network = _trained_on(drift, make(), None, written)
            note("drifted", time, network)
            learn(network, steps=-(-steps // 5))
            note("retrained", time, network)
    if path is not None:
        _draw(found, path)
    if results is not None:
        write_results(results, {"steps": steps, "batch": batch, "seeds": list(seeds), "accuracies": found})
    return found


def _trained_on(
    device: nn.Module,
    network: ResistiveNetwork,
    learn: Callable[[ResistiveNetwork], None] | None,
    written: dict[str, Tensor] | None = None,
) -> ResistiveNetwork:
    """A circuit of such devices: trained as it is, or with what was written to it."""
    if written is not None:
        network.load_state_dict(written)
    parametrize.register_parametrization(network, "log_conductance", device)
    if learn is not None:
        learn(network)
    return network


def _draw(found: Accuracies, path: str) -> None:
    """Means over the seeds as lines, each seed as a dot."""
    drawn, axes = figure(2, 2, width=9.0, height=6.4)
    panels = {
        "bits of a conductance": ("levels", "pulses"),
        "mismatch of the devices": ("in place", "written"),
        "noise of a reading (V)": ("noise",),
        "time since it was written (t0)": ("drifted", "retrained"),
    }
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name, colour, marker in zip(names, TONES, "os", strict=False):
            values = found[name]
            means = [100 * sum(each) / len(each) for each in values.values()]
            axis.plot(list(values), means, color=colour, marker=marker, label=name)
            for place, each in values.items():
                axis.plot([place] * len(each), [100 * value for value in each], marker, color=colour, alpha=0.35, ms=4)
        if title.endswith(")") and found[names[0]]:
            axis.set_xscale("log")
        axis.set_xlabel(title)
        axis.legend(frameon=False, labelcolor=INK)
    for axis in axes[:, 0]:
        axis.set_ylabel("unseen samples right (%)")
    save_figure(drawn, path)
