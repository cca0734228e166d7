"""An elastic network that learns a motion."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdeq_ep.extend import check_count
from torchdeq_ep_physics.drawing import TONES, figure, save_figure
from torchdeq_ep_physics.elastic import ElasticNetwork


def motion(steps: int = 200, *, seed: int = 0, backward: str = "ep", path: str | None = None) -> list[float]:
    """An elastic network learns to move one node up when another is pushed to the right.

    Args:
        steps: Steps of Adam on stiffnesses and rest lengths.
        seed: Of the placing of the nodes.
        backward: Backward mode.
        path: Where to draw the network before and after, in both positions.

    Returns:
        The distance of the output node from its target in each step, relative to the motion wanted.

    Raises:
        InvalidOptionError: If there are no steps.
    """
    check_count("steps", steps, 1)
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
                axis.plot(*(place + wanted).tolist(), "*", color=TONES[2], markersize=14)
                axis.plot(*state.reshape(-1, 2)[target_node].tolist(), "o", mfc="none", mec=TONES[2], markersize=14)
                axis.set(title=f"{title}, {position}")
        drawn.suptitle("ring: output node; star: where it is to be when pushed; lines as thick as springs are tense")
        save_figure(drawn, path)
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
