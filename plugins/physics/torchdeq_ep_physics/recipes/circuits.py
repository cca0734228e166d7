"""Resistor-diode networks as classifiers, reciprocal and with amplifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MissingDependencyError
from torchdeq_ep.extend import check_choice, check_count
from torchdeq_ep_physics.ngspice import Ngspice
from torchdeq_ep_physics.resistive import ResistiveNetwork, differential

Simulator = Literal["twin", "ngspice"]


Task = Literal["iris", "moons"]


VOLTS = 3.0


GAIN = 100.0


@dataclass(frozen=True)
class Data:
    """Inputs in volts, and classes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int


@dataclass
class Classification:
    """What a training came to."""

    network: ResistiveNetwork
    accuracy: float
    train_accuracy: float
    losses: list[float] = field(default_factory=list)


def load(task: Task, seed: int = 0) -> Data:
    """A task of scikit-learn as voltages: standardised inputs and a constant, with both signs.

    Args:
        task: `"iris"`: 150 flowers, 3 classes; `"moons"`: two interleaved half moons, 2 classes.
        seed: Of the split into two thirds for training and one for the test.

    Returns:
        The data.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
        InvalidOptionError: If there is no such task.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "the tasks need scikit-learn: pip install 'torchdeq-ep-physics[recipes]'."
        ) from error
    if task == "iris":
        features, labels = datasets.load_iris(return_X_y=True)
    elif task == "moons":
        features, labels = datasets.make_moons(150, noise=0.1, random_state=0)
    else:
        raise InvalidOptionError(f"there is no task {task!r}, only 'iris' and 'moons'.")
    x, y = torch.tensor(features, dtype=torch.float64), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    n = 2 * len(x) // 3
    x = (x - x[:n].mean(0)) / x[:n].std(0)
    volts = VOLTS * differential(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1))
    return Data(volts[:n], y[:n], volts[n:], y[n:], int(y.max()) + 1)


def logits(network: ResistiveNetwork, z: Tensor, n_classes: int) -> Tensor:
    """Differences of pairs of output voltages, amplified."""
    outputs = z[:, network.n_states - 2 * n_classes :]
    return GAIN * (outputs[:, 0::2] - outputs[:, 1::2])


def simulated(
    network: ResistiveNetwork,
    x: Tensor,
    *,
    beta: float = 1e-3,
    writer: Callable[[Any], None] | None = None,
    timeout: float = 60.0,
    workers: int = 1,
) -> Tensor:
    """Node voltages found by ngspice, with the gradient that nudged operating points measure.

    Args:
        network: The circuit; only its force law is differentiated.
        x: Voltages of the inputs.
        beta: How far a nudge moves the voltages, relative to their norm.
        writer: As for `attach_equilibrium`.
        timeout: Seconds for one process of ngspice.
        workers: Processes at a time.

    Returns:
        Voltages of shape `(batch, n_nodes)`.
    """
    theta = network.physical()
    stencil = tep.Stencil.symmetric(beta)
    solver = Ngspice(network, x, theta, timeout=timeout, workers=workers)
    return tep.attach_equilibrium(solver, network.force, theta, x, stencil=stencil, scale="response", writer=writer)


def classify(
    task: Task,
    simulator: Simulator = "twin",
    *,
    n_hidden: int = 16,
    steps: int = 80,
    batch: int = 25,
    lr: float = 0.1,
    seed: int = 0,
    amplification: float = 0.0,
    backward: str = "ep",
    homeostasis: float = 0.0,
    timeout: float = 60.0,
    workers: int = 1,
) -> Classification:
    """Train a resistor-diode network as a classifier.

    Args:
        task: See [`load`][torchdeq_ep_physics.recipes.load].
        simulator: `"ngspice"`, which nothing is differentiated through, or `"twin"`, the network in torch.
        n_hidden: Hidden nodes.
        steps: Steps of Adam.
        batch: Samples in each.
        lr: Its learning rate, of the logarithms of the conductances.
        seed: Of the split, the initial conductances and the batches.
        amplification: See [`layered`][torchdeq_ep_physics.ResistiveNetwork.layered]; not 0 is not reciprocal.
        backward: Mode of the twin.
        homeostasis: Weight of the symmetry penalty on the twin's Jacobian.
        timeout: Seconds for one process of ngspice.
        workers: Its processes at a time.

    Returns:
        The trained network and its accuracies, both found by the simulator.

    Raises:
        InvalidOptionError: If an option is not acceptable.
    """
    check_count("steps", steps, 1)
    check_count("batch", batch, 1)
    check_choice("simulator", simulator, get_args(Simulator))
    data = load(task, seed)
    generator = torch.Generator().manual_seed(seed)
    network = ResistiveNetwork.layered(
        data.x.shape[1],
        n_hidden,
        2 * data.n_classes,
        generator=generator,
        amplification=amplification,
        backward=backward,
    )
    respond = network if simulator == "twin" else lambda x: simulated(network, x, timeout=timeout, workers=workers)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(data.x), (batch,), generator=generator)
        x = data.x[chosen]
        z = respond(x)
        loss = cross_entropy(logits(network, z, data.n_classes), data.y[chosen])
        losses.append(loss.item())
        if homeostasis:
            loss = loss + homeostasis * asymmetry(network, x, z.detach())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()

    def accuracy(x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            found = logits(network, respond(x), data.n_classes).argmax(1)
        return float((found == y).double().mean())

    return Classification(network, accuracy(data.x_test, data.y_test), accuracy(data.x, data.y), losses)


def asymmetry(network: ResistiveNetwork, x: Tensor, z: Tensor) -> Tensor:
    """The symmetry penalty of the force law at a state, in units of the mean conductance squared."""
    theta = network.physical()
    scale = theta["conductance"].detach().mean()
    return tep.symmetry_penalty(lambda z: network.force(z, theta, x) / scale, z)


def gradients(network: ResistiveNetwork, x: Tensor, y: Tensor, n_classes: int, z: Tensor) -> Tensor:
    """The gradient of the loss at an attached state, as one vector."""
    loss = cross_entropy(logits(network, z, n_classes), y)
    parts: Any = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat(parts)


def amplifiers(strengths: Sequence[float] = (0.0, 0.3, 1.0, 3.0), seed: int = 0) -> list[dict[str, float]]:
    """The bias of each mode's gradient in networks with amplifiers, before training.

    Args:
        strengths: Transconductances in units of the conductance.
        seed: Of the conductances.

    Returns:
        For each strength the relative error and the cosine of `ep` against the exact gradient, and the error of `aep`.
    """
    data = load("iris")
    rows = []
    for strength in strengths:
        network = ResistiveNetwork.layered(
            data.x.shape[1], 16, 6, amplification=strength, generator=torch.Generator().manual_seed(seed)
        )
        found = {}
        for mode in ("ift", "ep", "aep"):
            network.backward = mode
            found[mode] = gradients(network, data.x, data.y, 3, network(data.x))
        exact = found["ift"]
        rows.append(
            {
                "amplification": strength,
                "ep error": float((found["ep"] - exact).norm() / exact.norm()),
                "ep cosine": float(torch.cosine_similarity(found["ep"], exact, 0)),
                "aep error": float((found["aep"] - exact).norm() / exact.norm()),
            }
        )
    return rows
