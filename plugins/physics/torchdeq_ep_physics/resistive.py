"""Nonlinear resistive networks: resistors, diodes, voltage sources, and amplifiers, which are not reciprocal.

Equilibrium propagation in such circuits: Kendall et al. 2020 (arXiv 2006.01981). The energy is the co-content of the
circuit (Millar 1951), the force on a node is the current that flows into it (Kirchhoff's current law).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.drawing import circle, graph
from torchdeq_ep_physics.system import NoEnergyError, PhysicalSystem, Theta, positive

THERMAL_VOLTAGE = 1.38064852e-23 * 300.15 / 1.6021766208e-19
"""`k T / q` at 27 degrees Celsius, with the constants of ngspice."""

GMIN = 1e-12
"""Conductance in parallel to each diode, as in SPICE."""

_LARGEST_EXPONENT = 40.0  # beyond it a diode is continued linearly; no circuit gets there, only a search for one

Branch = tuple[int, int]


class ResistiveNetwork(PhysicalSystem):
    """A circuit of resistors and diodes between nodes, held at voltages by sources.

    Terminals are numbered through: `0 .. n_nodes - 1` are the free nodes, whose voltages are the state; then come
    `n_inputs` terminals that sources hold at the voltages `x`; then the rails, held at fixed voltages.

    Args:
        n_nodes: Free nodes.
        n_inputs: Input terminals.
        resistors: Pairs of terminals.
        conductance: That of each resistor, in siemens; trained, as a logarithm.
        diodes: Pairs of terminals, from anode to cathode.
        rails: Fixed voltages; ground first.
        amplifiers: Pairs of pairs `((plus, minus), (into, out_of))`: a current proportional to the voltage between
            `plus` and `minus` flows into the terminal `into`, taken from `out_of`. SPICE's element G.
        transconductance: That of each amplifier, in siemens; trained, as a logarithm.
        saturation: Saturation current of the diodes, in amperes.
        ideality: Their ideality factor.
        **options: As for [`PhysicalSystem`][torchdeq_ep_physics.PhysicalSystem]; the capacity is one of capacitances.

    Raises:
        InvalidOptionError: If a terminal does not exist, or a conductance is not positive.

    Example:
        >>> divider = ResistiveNetwork(1, 1, [(0, 1), (0, 2)], torch.tensor([1e-3, 3e-3]).double())
        >>> round(divider(torch.ones(1, 1).double()).item(), 6)
        0.25
    """

    largest_step = 0.5

    _resistor: Tensor
    _diode: Tensor
    _control: Tensor
    _output: Tensor
    _rail: Tensor

    def __init__(
        self,
        n_nodes: int,
        n_inputs: int,
        resistors: Sequence[Branch],
        conductance: Tensor,
        *,
        diodes: Sequence[Branch] = (),
        rails: Sequence[float] = (0.0,),
        amplifiers: Sequence[tuple[Branch, Branch]] = (),
        transconductance: Tensor | None = None,
        saturation: float = 1e-12,
        ideality: float = 1.5,
        **options: Any,
    ) -> None:
        super().__init__(n_nodes, **options)
        terminals = n_nodes + n_inputs + len(rails)
        controls, outputs = [control for control, _ in amplifiers], [output for _, output in amplifiers]
        for branch in (*resistors, *diodes, *controls, *outputs):
            if len(branch) != 2 or not all(0 <= end < terminals for end in branch) or branch[0] == branch[1]:
                raise InvalidOptionError(f"{branch!r} does not join two of the {terminals} terminals.")
        if len(conductance) != len(resistors):
            raise InvalidOptionError(f"{len(resistors)} resistors need as many conductances, not {len(conductance)}.")
        if (transconductance is None) != (not amplifiers) or len(amplifiers) != len(
            () if transconductance is None else transconductance
        ):
            raise InvalidOptionError("each amplifier needs one transconductance.")
        self.n_inputs = n_inputs
        self.rails = tuple(rails)
        self.resistors, self.diodes = list(resistors), list(diodes)
        self.amplifiers = list(amplifiers)
        self.saturation, self.slope = saturation, ideality * THERMAL_VOLTAGE
        self.ideality = ideality
        self.log_conductance = positive(conductance)
        self.log_transconductance: nn.Parameter | None = (
            None if transconductance is None else positive(transconductance)
        )
        dtype = conductance.dtype
        for name, branches in (("resistor", resistors), ("diode", diodes), ("control", controls), ("output", outputs)):
            self.register_buffer(f"_{name}", _incidence(branches, terminals, dtype), persistent=False)
        self.register_buffer("_rail", torch.tensor(self.rails, dtype=dtype), persistent=False)

    @classmethod
    def layered(
        cls,
        n_inputs: int,
        n_hidden: int,
        n_outputs: int,
        *,
        conductance: float = 1e-4,
        spread: float = 1.0,
        rail: float = -0.3,
        amplification: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> ResistiveNetwork:
        """Inputs, hidden nodes and outputs, fully connected layer by layer, with two diodes at each hidden node.

        Conductances are positive, so inputs should come with both signs: see
        [`differential`][torchdeq_ep_physics.differential].

        Args:
            n_inputs: Input terminals.
            n_hidden: Hidden nodes; each has a diode to the upper rail and one from the lower.
            n_outputs: Output nodes: the last of the state.
            conductance: Mean of the initial conductances, in siemens.
            spread: Standard deviation of their logarithms.
            rail: Voltage of the upper rail; the lower one has the opposite. A hidden node is clamped at about
                `rail + 0.55` volts to either side, so a negative one brings the knees close to zero.
            amplification: Transconductance from each hidden node into each output, in units of `conductance`; without a
                path back, so the network is not reciprocal. 0 leaves the amplifiers out.
            generator: For the initial conductances.
            dtype: Of the parameters.
            **options: As for the class.

        Returns:
            The network.
        """
        nodes = n_hidden + n_outputs
        inputs = range(nodes, nodes + n_inputs)
        ground, upper, lower = (nodes + n_inputs + k for k in range(3))
        hidden, outputs = range(n_hidden), range(n_hidden, nodes)
        resistors = [(h, i) for h in hidden for i in (*inputs, ground)]
        resistors += [(o, h) for o in outputs for h in hidden] + [(o, ground) for o in outputs]
        diodes = [(h, upper) for h in hidden] + [(lower, h) for h in hidden]
        noise = torch.randn(len(resistors), generator=generator, dtype=dtype)
        if amplification:
            amplifiers = [((h, ground), (o, ground)) for o in outputs for h in hidden]
            gains = torch.randn(len(amplifiers), generator=generator, dtype=dtype)
            options["amplifiers"] = amplifiers
            options["transconductance"] = amplification * conductance * torch.exp(spread * gains)
        return cls(
            nodes,
            n_inputs,
            resistors,
            conductance * torch.exp(spread * noise),
            diodes=diodes,
            rails=(0.0, rail, -rail),
            **options,
        )

    @property
    def reciprocal(self) -> bool:  # type: ignore[override]
        """Whether there are no amplifiers."""
        return not self.amplifiers

    def physical(self) -> Theta:
        theta = {"conductance": self.log_conductance.exp()}
        if self.log_transconductance is not None:
            theta["transconductance"] = self.log_transconductance.exp()
        return theta

    def force(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """The current into each free node, in amperes."""
        u = self.potentials(z, x)
        into = -(theta["conductance"] * (u @ self._resistor.T)) @ self._resistor
        into = into - self.diode_current(u @ self._diode.T) @ self._diode
        if self.amplifiers:
            into = into + (theta["transconductance"] * (u @ self._control.T)) @ self._output
        return into[:, : self.n_states]

    def energy(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        if self.amplifiers:
            raise NoEnergyError("a network with amplifiers has no energy: their current does not flow back.")
        u = self.potentials(z, x)
        v = u @ self._diode.T
        bounded = (v / self.slope).clamp_max(_LARGEST_EXPONENT)
        beyond = v - self.slope * bounded
        knee = self.saturation * torch.exp(bounded)
        diodes = self.slope * knee + knee * (beyond + beyond**2 / (2 * self.slope)) - self.saturation * v
        resistors = theta["conductance"] * (u @ self._resistor.T) ** 2 / 2
        return resistors.sum(1) + (diodes + GMIN * v**2 / 2).sum(1)

    def stiffness(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        bounded = (self.potentials(z, x) @ self._diode.T / self.slope).clamp_max(_LARGEST_EXPONENT)
        slopes = self.saturation / self.slope * torch.exp(bounded) + GMIN
        total = theta["conductance"] @ self._resistor.abs() + slopes @ self._diode.abs()
        return total[:, : self.n_states]

    def diode_current(self, v: Tensor) -> Tensor:
        """Shockley's law with SPICE's parallel conductance; ngspice's differs by less than `0.05 saturation`."""
        bounded = (v / self.slope).clamp_max(_LARGEST_EXPONENT)
        knee = torch.exp(bounded)
        return self.saturation * (knee * (1 + v / self.slope - bounded) - 1) + GMIN * v

    def potentials(self, z: Tensor, x: Tensor) -> Tensor:
        """Voltages of all terminals: nodes, inputs, rails."""
        if x.dim() != 2 or x.shape[1] != self.n_inputs:
            raise InvalidOptionError(f"x must have shape (batch, {self.n_inputs}), not {tuple(x.shape)}.")
        return torch.cat([z, x.expand(len(z), -1), self._rail.expand(len(z), -1)], 1)

    def sketch(self, axes: Any, z: Tensor, x: Tensor) -> None:
        u = self.potentials(z.unsqueeze(0), x)[0].detach()
        terminals = [end for branch in (*self.resistors, *self.diodes) for end in branch]
        shown = sorted(set(terminals))
        conductance = self.physical()["conductance"].detach()
        current = (conductance * (u @ self._resistor.T)).abs()
        places = circle(len(u))
        graph(axes, places, shown, self.resistors, current, u, "voltage (V)", arrows=self.diodes)


def differential(x: Tensor) -> Tensor:
    """Each input with both signs, `(x, -x)`: positive conductances can then weigh it by either.

    Args:
        x: Of shape `(batch, n)`.

    Returns:
        Of shape `(batch, 2 n)`.

    Example:
        >>> differential(torch.tensor([[1.0, 2.0]]))
        tensor([[ 1.,  2., -1., -2.]])
    """
    return torch.cat([x, -x], 1)


def _incidence(branches: Sequence[Branch], terminals: int, dtype: torch.dtype) -> Tensor:
    matrix = torch.zeros(len(branches), terminals, dtype=dtype)
    for row, (start, end) in enumerate(branches):
        matrix[row, start], matrix[row, end] = 1.0, -1.0
    return matrix
