"""The field's learning rules on one circuit: equilibrium propagation, coupled learning, contrastive learning.

All three compare the energy of two equilibria and lower that of the one which is nearer to the target. They differ in
how it is brought about: by currents into the outputs that are proportional to the error (EP), by holding the outputs a
little nearer to the target (coupled learning: Stern et al. 2021, Phys. Rev. X 11:021045), or at the target (contrastive
learning: Movellan 1991).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from torchdeq_ep.extend import check_choice, check_count
from torchdeq_ep_physics.hardware import PulsedSGD
from torchdeq_ep_physics.recipes.circuits import Data, load
from torchdeq_ep_physics.recipes.records import write_results
from torchdeq_ep_physics.resistive import ResistiveNetwork

LearningRule = Literal["ep", "coupled", "contrastive"]

TARGET = 0.1
"""Volts at the output of the right class; the others are to have as many with the other sign."""

_NUDGED = 0.1
_SOLVES = {"ep": 3, "coupled": 2, "contrastive": 2}


@dataclass(frozen=True)
class RuleResult:
    """What a learning rule came to.

    Args:
        rule: Its name.
        solves: Equilibria of the batch that a step takes.
        cosine: Between its step and the exact gradient of the squared error, before training; the mean of the seeds.
        accuracy: Part of the unseen samples that is right, for each seed.

    Example:
        >>> round(RuleResult("ep", 3, 0.999, (0.96, 0.94, 0.95)).mean, 3)
        0.95
    """

    rule: str
    solves: int
    cosine: float
    accuracy: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The accuracy, averaged over the seeds."""
        return sum(self.accuracy) / len(self.accuracy)


def rules(
    steps: int = 150,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    n_hidden: int = 8,
    batch: int = 15,
    path: str | None = None,
) -> list[RuleResult]:
    """Train the same circuits on iris by each of the rules.

    Args:
        steps: Of Adam, on the logarithms of the conductances.
        seeds: Of the split, the initial conductances and the batches.
        n_hidden: Hidden nodes.
        batch: Samples in each step.
        path: Where the rows are written, as JSON; by default nowhere.

    Returns:
        A row for each rule.

    Raises:
        InvalidOptionError: If there are no steps.
    """
    check_count("steps", steps, 1)
    rows = []
    for rule in get_args(LearningRule):
        cosines, accuracies = [], []
        for seed in seeds:
            data, network = load("iris", seed), initial(n_hidden, seed)
            x, y = data.x[:batch], targets(data.y[:batch], data.n_classes)
            found = torch.cat(contrast(network, x, y, rule))
            cosines.append(float(torch.cosine_similarity(found, exact(network, x, y), 0)))
            train(network, data, rule, steps=steps, batch=batch, seed=seed)
            accuracies.append(accuracy(network, data))
        rows.append(RuleResult(rule, _SOLVES[rule], sum(cosines) / len(cosines), tuple(accuracies)))
    if path is not None:
        write_results(path, {"steps": steps, "batch": batch, "rows": [asdict(row) for row in rows]})
    return rows


def initial(n_hidden: int, seed: int) -> ResistiveNetwork:
    """A circuit for iris, before training: an output for each class."""
    generator = torch.Generator().manual_seed(seed)
    return ResistiveNetwork.layered(10, n_hidden, 3, generator=generator, backward="ift")


def targets(y: Tensor, n_classes: int) -> Tensor:
    """Voltages that the outputs are to have.

    Args:
        y: Classes, of shape `(batch,)`.
        n_classes: How many there are.

    Returns:
        Of shape `(batch, n_classes)`.

    Example:
        >>> targets(torch.tensor([1]), 2)
        tensor([[-0.1000,  0.1000]], dtype=torch.float64)
    """
    return TARGET * (2 * nn.functional.one_hot(y, n_classes).double() - 1)


def contrast(
    network: ResistiveNetwork,
    x: Tensor,
    target: Tensor,
    rule: LearningRule = "ep",
    *,
    nudge: float = _NUDGED,
    bias: Tensor | float = 0.0,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The direction in which a rule changes the parameters: the difference of two energies, by each of them.

    In hardware such as that of Dillavou et al. 2022 (Phys. Rev. Applied 18:014040) each resistor compares the squares
    of its own voltage in the two states. With a bias of the comparator it finds `dV_near^2 - dV_far^2 + bias`. The rule
    divides by the share of the nudge, so the bias pulls each conductance by `bias / (2 share)`, and where learning ends
    it has left an error of the outputs that is, to first order, in proportion to `bias / share`.

    Args:
        network: The circuit; its last nodes are the outputs.
        x: Voltages of the inputs.
        target: Voltages that the outputs are to have, of shape `(batch, n_outputs)`.
        rule: How the second equilibrium is brought about.
        nudge: How far the outputs are moved towards the target, as a share of what is missing: exactly in coupled
            learning, about in `"ep"`. Contrastive learning moves them all the way.
        bias: Of each resistor's comparison, in square volts; broadcasts to the resistors.
        noise: Standard deviation of a reading of a node in either state, in volts.
        generator: Draws the noise.

    Returns:
        For each parameter a tensor of its shape, averaged over the batch. That of `"ep"` is the gradient of half the
        squared error.

    Raises:
        InvalidOptionError: If there is no such rule.
    """
    check_choice("rule", rule, get_args(LearningRule))
    theta = network.physical()
    held = {name: value.detach() for name, value in theta.items()}
    free = network.equilibrium(x, theta=held)
    missing = target - free[:, -target.shape[1] :]
    if rule == "ep":
        stiffness = network.stiffness(free, held, x).expand_as(free)[:, -target.shape[1] :].mean()
        current = torch.zeros_like(free)
        current[:, -target.shape[1] :] = nudge * stiffness * missing
        near, far = (network.equilibrium(x, sign * current, held, start=free) for sign in (1, -1))
        share = 2 * nudge * float(stiffness)
    else:
        share = 1.0 if rule == "contrastive" else nudge
        near, far = _clamped(network, x, target - (1 - share) * missing, free), free
    if noise:
        near, far = (z + noise * torch.randn(z.shape, dtype=z.dtype, generator=generator) for z in (near, far))
    change = (network.energy(near, theta, x) - network.energy(far, theta, x)).mean()
    biased = change + (theta["conductance"] * bias).sum() / 2
    return list(torch.autograd.grad(biased / share, list(network.parameters())))


def exact(network: ResistiveNetwork, x: Tensor, target: Tensor) -> Tensor:
    """The gradient of half the squared error by implicit differentiation, as one vector."""
    z = network(x)
    loss = (z[:, -target.shape[1] :] - target).square().sum(1).mean() / 2
    return torch.cat(torch.autograd.grad(loss, list(network.parameters())))


def train(
    network: ResistiveNetwork,
    data: Data,
    rule: LearningRule = "ep",
    *,
    steps: int,
    batch: int,
    seed: int,
    lr: float = 0.1,
    pulse: float | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    noise: float = 0.0,
) -> None:
    """Train a circuit by one of the rules.

    Args:
        network: Changed in place.
        data: The task.
        rule: Which.
        steps: How many.
        batch: Samples in each.
        seed: Of the batches.
        lr: Rate of Adam, or how far the most wanted device moves in a step of pulses.
        pulse: By how much a pulse moves a trained number; without it the steps are Adam's.
        bounds: Of the trained numbers, if there are pulses.
        noise: Of the readings, in volts.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(network.parameters())
    optimiser: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=lr)
    if pulse is not None:
        optimiser = PulsedSGD(parameters, lr, pulse, low=bounds[0], high=bounds[1], seed=seed)
    for step in range(steps):
        chosen = torch.randint(len(data.x), (batch,), generator=generator)
        wanted = targets(data.y[chosen], data.n_classes)
        found = contrast(network, data.x[chosen], wanted, rule, noise=noise, generator=generator)
        largest = max(float(each.abs().max()) for each in found) or 1.0
        for parameter, each in zip(parameters, found, strict=True):
            parameter.grad = each
        for group in optimiser.param_groups:
            rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = rate if pulse is None else rate / largest
        optimiser.step()


def accuracy(network: ResistiveNetwork, data: Data) -> float:
    """The part of the unseen samples whose class has the largest voltage."""
    outputs = network.equilibrium(data.x_test)[:, -data.n_classes :]
    return float((outputs.argmax(1) == data.y_test).double().mean())


def _clamped(network: ResistiveNetwork, x: Tensor, outputs: Tensor, start: Tensor) -> Tensor:
    """The equilibrium with the outputs held by sources: those of a network in which they are inputs."""
    hidden = network.n_states - outputs.shape[1]
    if not hidden:
        return outputs
    theta = {name: value.detach() for name, value in network.physical().items()}
    held = ResistiveNetwork(
        hidden,
        network.n_inputs + outputs.shape[1],
        network.resistors,
        theta["conductance"],
        diodes=network.diodes,
        rails=network.rails,
        saturation=network.saturation,
        ideality=network.ideality,
        temperature=network.temperature,
    )
    state = held.equilibrium(torch.cat([outputs, x], 1), theta=theta, start=start[:, :hidden])
    return torch.cat([state, outputs], 1)


def markdown(rows: Iterable[RuleResult]) -> str:
    """The results as a table.

    Args:
        rows: Those of `rules`.

    Returns:
        Markdown.

    Example:
        >>> print(markdown([RuleResult("ep", 3, 0.9991, (0.96, 0.94))]))
        | rule | solves a step | cosine with the gradient | unseen samples right |
        | --- | --- | --- | --- |
        | ep | 3 | 0.999 | 95.0 % (94 to 96) |
    """
    lines = ["| rule | solves a step | cosine with the gradient | unseen samples right |", "| --- | --- | --- | --- |"]
    for row in rows:
        least, most = 100 * min(row.accuracy), 100 * max(row.accuracy)
        lines.append(
            f"| {row.rule} | {row.solves} | {row.cosine:.3f} | {100 * row.mean:.1f} % ({least:.0f} to {most:.0f}) |"
        )
    return "\n".join(lines)
