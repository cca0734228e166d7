"""Recipes: experiments that train or measure physical networks. Each returns its figures, and can draw them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError, MissingDependencyError, TruncationWarning
from torchdeq_ep_physics.drawing import figure
from torchdeq_ep_physics.elastic import ElasticNetwork
from torchdeq_ep_physics.ngspice import Ngspice
from torchdeq_ep_physics.resistive import ResistiveNetwork, differential

Simulator = Literal["twin", "ngspice"]
Task = Literal["iris", "moons"]

VOLTS = 3.0
GAIN = 100.0
AMPLITUDES = tuple(10 ** (-2.5 + 0.25 * k) for k in range(11))


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
    network: ResistiveNetwork, x: Tensor, *, beta: float = 1e-3, writer: Callable[[Any], None] | None = None
) -> Tensor:
    """Node voltages found by ngspice, with the gradient that nudged operating points measure.

    Args:
        network: The circuit; only its force law is differentiated.
        x: Voltages of the inputs.
        beta: How far a nudge moves the voltages, relative to their norm.
        writer: As for `attach_equilibrium`.

    Returns:
        Voltages of shape `(batch, n_nodes)`.
    """
    theta = network.physical()
    stencil = tep.Stencil.symmetric(beta)
    solver = Ngspice(network, x, theta)
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

    Returns:
        The trained network and its accuracies, both found by the simulator.
    """
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
    respond = network if simulator == "twin" else lambda x: simulated(network, x)
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


@dataclass
class NoisyInstrument:
    """A network as an instrument measures it: read noise, and converters for the voltages read and the currents set.

    Args:
        solve: The network.
        noise: Standard deviation of a reading, in volts.
        bits: Of both converters; `None` for ideal ones.
        volts: Largest voltage that is read.
        amperes: Largest current that is set; what is stronger is cut off.
        seed: Of the noise.
    """

    solve: Callable[[Tensor], Tensor]
    noise: float = 0.0
    bits: int | None = None
    volts: float = 1.0
    amperes: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, current: Tensor) -> Tensor:
        """A reading under an injected current."""
        injected = self._converted(current, self.amperes)
        if self.last is None or not torch.equal(self.last[0], injected):  # repeats differ by their noise alone
            self.last = injected, self.solve(injected)
        state = self.last[1]
        noise = torch.randn(state.shape, generator=self.generator, dtype=state.dtype)
        return self._converted(state + self.noise * noise, self.volts)

    def _converted(self, values: Tensor, largest: float) -> Tensor:
        if self.bits is None:
            return values
        step = 2 * largest / 2**self.bits
        return cast(Tensor, (step * (values / step).round()).clamp(-largest, largest))


def instrument(
    amplitudes: Sequence[float] = AMPLITUDES,
    *,
    noise: float = 1e-3,
    bits: int | None = 12,
    repeats: int = 4,
    draws: int = 4,
    path: str | None = None,
) -> dict[str, list[float]]:
    """Which stencil and amplitude give the best gradient on an instrument with read noise and converters.

    Args:
        amplitudes: Relative to the state, in the response scale.
        noise: Standard deviation of a reading, in volts.
        bits: Of the converters.
        repeats: Readings of each state.
        draws: Gradients that an error is averaged over.
        path: Where to draw the errors.

    Returns:
        The relative error of the gradient for each stencil and amplitude; `"auto"`, of the symmetric stencil with the
        automatic amplitude: its amplitude and its error; and `"amplitudes"`.
    """
    data = load("iris")
    x, y = data.x[:10], data.y[:10]
    network = ResistiveNetwork.layered(x.shape[1], 16, 6, generator=torch.Generator().manual_seed(0))
    network.backward = "ift"
    exact = gradients(network, x, y, 3, network(x))
    exact_z = network(x)
    (cotangent,) = torch.autograd.grad(cross_entropy(logits(network, exact_z, 3), y), exact_z)

    def measure(stencil: tep.Stencil, seed: int) -> tuple[float, float]:
        reports: list[tep.EquilibriumReport] = []
        theta = network.physical()

        def solve(current: Tensor) -> Tensor:
            return network.equilibrium(x, current, theta, start=exact_z.detach())

        reading = NoisyInstrument(solve, noise, bits, seed=seed)
        z = tep.attach_equilibrium(
            reading,
            network.force,
            theta,
            x,
            stencil=stencil,
            scale="response",
            repeats=repeats,
            writer=reports.append,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # where readings are cut off is part of the picture
            # One cotangent for all, so that the errors are those of the nudges.
            found = torch.cat(torch.autograd.grad(z, list(network.parameters()), cotangent))
        return float((found - exact).norm() / exact.norm()), reports[0].beta

    makers: dict[str, Callable[[Any], tep.Stencil]] = {
        "one-sided": tep.Stencil.one_sided,
        "symmetric": tep.Stencil.symmetric,
        "richardson": tep.Stencil.richardson,
    }
    errors: dict[str, list[float]] = {"amplitudes": list(amplitudes)}
    for name, make in makers.items():
        errors[name] = [sum(measure(make(beta), seed)[0] for seed in range(draws)) / draws for beta in amplitudes]
    automatic = [measure(tep.Stencil.symmetric("auto"), seed) for seed in range(draws)]
    errors["auto"] = [sum(beta for _, beta in automatic) / draws, sum(error for error, _ in automatic) / draws]
    if path is not None:
        drawn, axes = figure(width=6.5)
        for name in makers:
            axes.loglog(amplitudes, errors[name], "o-", markersize=3, label=name)
        axes.loglog(*([value] for value in errors["auto"]), "k*", markersize=12, label="symmetric, beta='auto'")
        converters = "ideal converters" if bits is None else f"{bits}-bit converters"
        axes.set(xlabel="amplitude, relative to the state", ylabel="relative error of the gradient")
        axes.set_title(f"read noise {1e3 * noise:g} mV, {converters}, {repeats} readings")
        axes.legend()
        drawn.savefig(path, dpi=120)
    return errors


def motion(steps: int = 200, *, seed: int = 0, backward: str = "ep", path: str | None = None) -> list[float]:
    """An elastic network learns to move one node up when another is pushed to the right.

    Args:
        steps: Steps of Adam on stiffnesses and rest lengths.
        seed: Of the placing of the nodes.
        backward: Backward mode.
        path: Where to draw the network before and after, in both positions.

    Returns:
        The distance of the output node from its target in each step, relative to the motion wanted.
    """
    network, target_node = lattice(seed)
    network.backward = backward
    pushed = network.positions[network.n_free] + torch.tensor([0.25, 0.0], dtype=torch.float64)
    x = torch.stack([network.positions[network.n_free : network.n_free + 1], pushed.unsqueeze(0)])
    wanted = torch.tensor([0.0, 0.2], dtype=torch.float64)

    def moved(z: Tensor) -> Tensor:
        places = z.reshape(len(z), -1, 2)[:, target_node]
        return places[1] - places[0]

    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    errors = []
    for _ in range(steps):
        z = network(x)
        miss = moved(z) - wanted
        errors.append(float(miss.detach().norm() / wanted.norm()))
        optimiser.zero_grad()
        torch.autograd.backward(miss.square().sum())
        optimiser.step()
    if path is not None:
        drawn, axes = figure(2, 2, height=8.0)
        trained = {name: value.clone() for name, value in network.state_dict().items()}
        for row, (title, weights) in zip(axes, (("before", before), ("after learning", trained)), strict=True):
            network.load_state_dict(weights)
            states = network.equilibrium(x)
            for axis, state, given, position in zip(row, states, x, ("at rest", "pushed to the right"), strict=True):
                network.sketch(axis, state, given.unsqueeze(0))
                place = states[0].reshape(-1, 2)[target_node]
                axis.plot(*(place + wanted).tolist(), "g*", markersize=14)
                axis.plot(*state.reshape(-1, 2)[target_node].tolist(), "o", mfc="none", mec="g", markersize=14)
                axis.set(title=f"{title}, {position}")
        drawn.suptitle("ring: output node; star: where it is to be when pushed; lines as thick as springs are tense")
        drawn.savefig(path, dpi=110)
    return errors


def lattice(seed: int = 0, side: int = 5) -> tuple[ElasticNetwork, int]:
    """A slightly irregular square lattice with diagonals, its bottom nailed, driven at the left; and its output node.

    Args:
        seed: Of the irregularity.
        side: Nodes along each side.

    Returns:
        The network, and the number of the free node in the middle of the right side.
    """
    generator = torch.Generator().manual_seed(seed)
    jitter = 0.1 * torch.randn(side, side, 2, generator=generator, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), 2) + jitter
    driven, nailed = [(side // 2, 0)], [(0, column) for column in range(side)]
    free = [(row, column) for row in range(side) for column in range(side) if (row, column) not in (*driven, *nailed)]
    order = [*free, *driven, *nailed]
    number = {place: k for k, place in enumerate(order)}
    near = ((0, 1), (1, 0), (1, 1), (1, -1))
    springs = [
        (number[place], number[place[0] + down, place[1] + right])
        for place in order
        for down, right in near
        if (place[0] + down, place[1] + right) in number
    ]
    positions = torch.stack([grid[row, column] for row, column in order])
    network = ElasticNetwork(positions, 1, side, springs, torch.ones(len(springs), dtype=torch.float64))
    return network, number[side // 2, side - 1]
