"""Elastic networks: nodes in the plane that springs join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.drawing import graph
from torchdeq_ep_physics.matrices import Matrix
from torchdeq_ep_physics.stamps import Assembly, Branches, Stamps
from torchdeq_ep_physics.system import PhysicalSystem, Theta, positive


class ElasticNetwork(PhysicalSystem):
    """Springs between nodes in the plane; some nodes are free, some are moved by the input, some are nailed down.

    Nodes are numbered through: the free ones first, whose positions `(x0, y0, x1, y1, ...)` are the state; then the
    driven ones, whose positions are the input; then the nailed ones. The energy is `sum k (r - l)^2 / 2`.

    Args:
        positions: All nodes at rest, of shape `(n, 2)`, in the order above.
        n_driven: Driven nodes.
        n_nailed: Nailed nodes.
        springs: Pairs of nodes.
        stiffness: That of each spring; trained, as a logarithm.
        length: Rest length of each spring; trained, as a logarithm. By default those of `positions`.
        **options: As for [`PhysicalSystem`][torchdeq_ep_physics.PhysicalSystem]; the capacity is one of viscosities.

    Raises:
        InvalidOptionError: If a spring joins nodes that do not exist, or a value is not positive.
    """

    largest_step = 0.3

    positions: Tensor
    _ends: Tensor

    def __init__(
        self,
        positions: Tensor,
        n_driven: int,
        n_nailed: int,
        springs: Sequence[tuple[int, int]],
        stiffness: Tensor,
        length: Tensor | None = None,
        **options: Any,
    ) -> None:
        n_free = len(positions) - n_driven - n_nailed
        super().__init__(2 * n_free, **options)
        for a, b in springs:
            if a == b or not (0 <= a < len(positions) and 0 <= b < len(positions)):
                raise InvalidOptionError(f"({a}, {b}) does not join two of the {len(positions)} nodes.")
        if len(stiffness) != len(springs):
            raise InvalidOptionError(f"{len(springs)} springs need as many stiffnesses, not {len(stiffness)}.")
        self.springs = list(springs)
        self.n_free, self.n_driven = n_free, n_driven
        ends = torch.tensor(self.springs).T
        at_rest = (positions[ends[0]] - positions[ends[1]]).norm(dim=1)
        self.log_stiffness = positive(stiffness)
        self.log_length = positive(at_rest if length is None else length)
        self.register_buffer("positions", positions)
        self.register_buffer("_ends", ends, persistent=False)
        self._assembly = Assembly([_spring_stamps(ends, 2 * n_free)], 2 * n_free, is_symmetric=True)

    def physical(self) -> Theta:
        return {"stiffness": self.log_stiffness.exp(), "length": self.log_length.exp()}

    def start(self, x: Tensor) -> Tensor:
        at_rest = self.positions[: self.n_free].reshape(1, -1)
        return at_rest.expand(len(x), -1).clone()

    def places(self, z: Tensor, x: Tensor) -> Tensor:
        """Positions of all nodes, of shape `(batch, n, 2)`."""
        if x.dim() != 3 or x.shape[1:] != (self.n_driven, 2):
            raise InvalidOptionError(f"x must have shape (batch, {self.n_driven}, 2), not {tuple(x.shape)}.")
        nailed = self.positions[self.n_free + self.n_driven :].expand(len(z), -1, -1)
        return torch.cat([z.reshape(len(z), -1, 2), x.expand(len(z), -1, -1), nailed], dim=1)

    def force(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        places = self.places(z, x)
        along = places[:, self._ends[0]] - places[:, self._ends[1]]
        distance = along.norm(dim=2, keepdim=True)
        pull = (theta["stiffness"].unsqueeze(-1)) * (1 - theta["length"].unsqueeze(-1) / distance) * along
        total = torch.zeros_like(places).index_add(1, self._ends[0], -pull).index_add(1, self._ends[1], pull)
        force: Tensor = total[:, : self.n_free].reshape(len(z), -1)
        return force

    def energy(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        places = self.places(z, x)
        distance = (places[:, self._ends[0]] - places[:, self._ends[1]]).norm(dim=2)
        energy: Tensor = (theta["stiffness"] * (distance - theta["length"]).square()).sum(1) / 2
        return energy

    def stiffness(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        total = z.new_zeros(len(self.positions))
        for end in self._ends:
            total = total.index_add(0, end, theta["stiffness"])
        both: Tensor = total[: self.n_free].repeat_interleave(2)
        return both

    def stiffness_matrix(self, z: Tensor, theta: Theta, x: Tensor) -> Matrix:
        places = self.places(z, x)
        along = places[:, self._ends[0]] - places[:, self._ends[1]]
        distance = along.norm(dim=2)
        tension = (theta["length"] / distance).unsqueeze(-1).unsqueeze(-1)
        direction = along / distance.unsqueeze(-1)
        unit = torch.eye(2, dtype=z.dtype, device=z.device)
        across = unit - direction.unsqueeze(-1) * direction.unsqueeze(-2)
        blocks = theta["stiffness"].reshape(-1, 1, 1) * (unit - tension * across)
        return self._assembly.matrix([blocks.permute(0, 2, 3, 1).flatten(1)])

    def largest_term(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        places = self.places(z, x)
        distance = (places[:, self._ends[0]] - places[:, self._ends[1]]).norm(dim=2)
        return (theta["stiffness"] * torch.maximum(distance, theta["length"])).amax(1)

    def sketch(self, axes: Any, z: Tensor, x: Tensor) -> None:
        theta = self.physical()
        places = self.places(z.unsqueeze(0), x)[0].detach()
        distance = (places[self._ends[0]] - places[self._ends[1]]).norm(dim=1)
        tension = (theta["stiffness"] * (distance - theta["length"])).detach().abs()
        graph(axes, places, range(self.n_free), self.springs, tension)
        first_nailed = self.n_free + self.n_driven
        driven, nailed = places[self.n_free : first_nailed], places[first_nailed:]
        axes.plot(*driven.T.tolist(), ">", color="tab:orange", markersize=10, zorder=3)
        axes.plot(*nailed.T.tolist(), "^", color="black", markersize=8, zorder=3)


def _spring_stamps(ends: Tensor, size: int) -> Stamps:
    """Those of springs, which have a value for each pair of coordinates, pair by pair."""
    first, second = ends
    parts = []
    for pair, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        outputs = Branches(2 * first + row, 2 * second + row)
        stamps = Stamps.of_currents(outputs, Branches(2 * first + column, 2 * second + column), size)
        parts.append((stamps, pair * ends.shape[1]))
    return Stamps(
        torch.cat([stamps.rows for stamps, _ in parts]),
        torch.cat([stamps.columns for stamps, _ in parts]),
        torch.cat([stamps.signs for stamps, _ in parts]),
        torch.cat([stamps.branch + offset for stamps, offset in parts]),
    )
