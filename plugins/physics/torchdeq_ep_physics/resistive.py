"""Nonlinear resistive networks: resistors, diodes, voltage sources, and amplifiers, which are not reciprocal.

Equilibrium propagation in such circuits: Kendall et al. 2020 (arXiv 2006.01981). The energy is the co-content of the
circuit (Millar 1951), the force on a node is the current that flows into it (Kirchhoff's current law).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.diodes import GMIN as GMIN
from torchdeq_ep_physics.diodes import NOMINAL, ZERO_CELSIUS, DiodeLaw
from torchdeq_ep_physics.diodes import THERMAL_VOLTAGE as THERMAL_VOLTAGE
from torchdeq_ep_physics.drawing import circle, graph
from torchdeq_ep_physics.matrices import DenseMatrix, Matrix
from torchdeq_ep_physics.stamps import Assembly, Branch, Branches, Stamps
from torchdeq_ep_physics.system import NoEnergyError, PhysicalSystem, Theta, positive

_PREPARED = "matrix of the linear branches"
_MANY = 1_000_000  # currents of resistors in a batch: beyond it the largest is bounded from below
_FULL = 0.02  # a matrix with so large a share of entries is faster to multiply with than its branches


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
        saturation: Saturation current of the diodes at 27 degrees Celsius, in amperes.
        ideality: Their ideality factor.
        temperature: Of the diodes, in degrees Celsius: their law is then that of SPICE's silicon diode there.
        **options: As for [`PhysicalSystem`][torchdeq_ep_physics.PhysicalSystem]; the capacity is one of capacitances.

    Raises:
        InvalidOptionError: If a terminal does not exist, a node is joined to no source or rail, or a conductance is not
            positive.

    Example:
        >>> divider = ResistiveNetwork(1, 1, [(0, 1), (0, 2)], torch.tensor([1e-3, 3e-3]).double())
        >>> round(divider(torch.ones(1, 1).double()).item(), 6)
        0.25
    """

    advice = "Use smaller inputs or nudges; amplifiers in a loop may have no operating point, or none that is stable."

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
        temperature: float = NOMINAL,
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
        if not (saturation > 0 and ideality > 0 and temperature > -ZERO_CELSIUS):
            raise InvalidOptionError("saturation, ideality and the absolute temperature must be positive.")
        self.saturation, self.ideality, self.temperature = saturation, ideality, temperature
        self.diode_law = DiodeLaw.at(saturation, ideality, temperature)
        self.log_conductance = positive(conductance)
        self.log_transconductance: nn.Parameter | None = (
            None if transconductance is None else positive(transconductance)
        )
        self.register_buffer("_rail", torch.tensor(self.rails, dtype=conductance.dtype), persistent=False)
        self._resistors, self._diodes = Branches.of(self.resistors), Branches.of(self.diodes)
        self._both_held = (torch.minimum(self._resistors.first, self._resistors.second) >= n_nodes).nonzero().squeeze(1)
        self._controls, outputs_of = Branches.of(controls), Branches.of(outputs)
        # The current of an amplifier flows into its first output: minus what flows out of it.
        self._outputs = Branches(outputs_of.second, outputs_of.first)
        self._linear = {
            "conductance": Stamps.of_currents(self._resistors, self._resistors, n_nodes),
            "transconductance": Stamps.of_currents(self._outputs, self._controls, n_nodes),
        }
        self._diode_stamps = Stamps.of_currents(self._diodes, self._diodes, n_nodes).among(n_nodes)
        self._assembly = Assembly([*self._linear.values(), self._diode_stamps], n_nodes, is_symmetric=not amplifiers)
        self._is_full = sum(len(kind.rows) for kind in self._linear.values()) > _FULL * n_nodes * terminals
        self._require_no_floating_node()

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

    def _require_no_floating_node(self) -> None:
        """Raise InvalidOptionError if a node is joined, by whatever branches, to no terminal of fixed voltage."""
        pairs = torch.tensor([*self.resistors, *self.diodes], dtype=torch.long).reshape(-1, 2)
        terminals = self.n_states + self.n_inputs + len(self.rails)
        graph_of = csr_matrix((torch.ones(len(pairs)), pairs.T.numpy()), shape=(terminals, terminals))
        _, group = connected_components(graph_of, directed=False)
        held = set(group[self.n_states :].tolist())
        floating = [node for node, own in enumerate(group[: self.n_states].tolist()) if own not in held]
        if floating:
            shown = ", ".join(str(node) for node in floating[:5]) + (", ..." if len(floating) > 5 else "")
            raise InvalidOptionError(
                f"no resistor or diode joins node {shown} to an input or a rail, not even by way of other nodes, so "
                "its voltage is not determined. Give it a resistor to ground (a large one, 1e12 ohms, does)."
            )

    @property
    def reciprocal(self) -> bool:  # type: ignore[override]
        """Whether there are no amplifiers."""
        return not self.amplifiers

    @property
    def largest_step(self) -> float:  # type: ignore[override]
        """In volts. Without amplifiers the energy is convex, and tells how far a step may go."""
        return 0.5 if self.amplifiers else float("inf")

    def physical(self) -> Theta:
        theta = {"conductance": self.log_conductance.exp()}
        if self.log_transconductance is not None:
            theta["transconductance"] = self.log_transconductance.exp()
        return theta

    def force(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        """The current into each free node, in amperes."""
        u = self.potentials(z, x)
        terminals = u.shape[1]
        out = self._diodes.at_ends(self.diode_current(self._diodes.across(u)), terminals, -1.0)[:, : self.n_states]
        if self._is_full:
            return -(out + u @ self._matrix(theta).T)
        for name, values in theta.items():
            if name in self._linear:
                flows = self._resistors if name == "conductance" else self._outputs
                controls = self._resistors if name == "conductance" else self._controls
                out = out + flows.at_ends(values * controls.across(u), terminals, -1.0)[:, : self.n_states]
        return -out

    def energy(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        if self.amplifiers:
            raise NoEnergyError("a network with amplifiers has no energy: their current does not flow back.")
        u = self.potentials(z, x)
        return self._heat(u, theta) / 2 + self.diode_law.content(self._diodes.across(u)).sum(1)

    def prepared(self, theta: Theta) -> Theta:
        return {**theta, _PREPARED: self._matrix(theta)} if self._is_full else theta

    def _matrix(self, theta: Theta) -> Tensor:
        """Currents out of the nodes by voltages of all terminals, but for the diodes; `(n_nodes, terminals)`."""
        if _PREPARED in theta:
            return theta[_PREPARED]
        terminals = self.n_states + self.n_inputs + len(self.rails)
        matrix = self._linear["conductance"].dense(theta["conductance"], self.n_states, terminals)
        if self.amplifiers:
            matrix = matrix + self._linear["transconductance"].dense(
                theta["transconductance"], self.n_states, terminals
            )
        return matrix

    def _heat(self, u: Tensor, theta: Theta) -> Tensor:
        """The power that the resistors turn into heat, in watts."""
        conductance = theta["conductance"]
        if not self._is_full:
            return (conductance * self._resistors.across(u).square()).sum(1)
        # As a quadratic form: far fewer entries than branches times samples.
        n = self.n_states
        z, held = u[:, :n], u[:, n:]
        matrix = self._matrix(theta)
        among_free = (z * (z @ matrix[:, :n].T + 2 * held @ matrix[:, n:].T)).sum(1)
        at_held = self._resistors.at_ends(conductance.unsqueeze(0), u.shape[1])[:, n:]
        between = self._resistors.pick(self._both_held)
        crossed = u.index_select(1, between.first) * u.index_select(1, between.second)
        at_held_ones = (at_held * held.square()).sum(1) - 2 * (conductance[self._both_held] * crossed).sum(1)
        power: Tensor = among_free + at_held_ones
        return power

    def stiffness(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        slopes = self.diode_law.conductance(self.diode_voltages(z, x))
        terminals = self.n_states + self.n_inputs + len(self.rails)
        return self._conductance_of_nodes(theta) + self._diodes.at_ends(slopes, terminals)[:, : self.n_states]

    def stiffness_matrix(self, z: Tensor, theta: Theta, x: Tensor) -> Matrix:
        slopes = self.diode_law.conductance(self.diode_voltages(z, x))
        if self._is_full and self._assembly.is_dense:
            among = self._matrix(theta)[:, : self.n_states] + self._diode_stamps.dense(
                slopes, self.n_states, self.n_states
            )
            return DenseMatrix(among, None if self.amplifiers else among)
        transconductance = theta["transconductance"] if self.amplifiers else z.new_zeros(0)
        return self._assembly.matrix([theta["conductance"], transconductance, slopes])

    def limited(self, z: Tensor, move: Tensor, theta: Theta, x: Tensor) -> Tensor:
        if not self.diodes:
            return move
        terminals = self.n_states + self.n_inputs + len(self.rails)
        held = move.new_zeros(len(move), terminals - self.n_states)
        change = self._diodes.across(torch.cat([move, held], 1))
        beside = torch.cat([self._conductance_of_nodes(theta), held[:1] + torch.inf], 1)
        parallel = torch.minimum(beside[:, self._diodes.first], beside[:, self._diodes.second])
        shares = self.diode_law.within_reach(self.diode_voltages(z, x), change, parallel)
        return move * self._diodes.least_at_ends(shares, terminals)[:, : self.n_states]

    def _conductance_of_nodes(self, theta: Theta) -> Tensor:
        """That of all resistors at each node, of shape `(1, n_nodes)`."""
        if self._is_full and not self.amplifiers:
            return self._matrix(theta).diagonal().unsqueeze(0)
        terminals = self.n_states + self.n_inputs + len(self.rails)
        return self._resistors.at_ends(theta["conductance"].unsqueeze(0), terminals)[:, : self.n_states]

    def largest_term(self, z: Tensor, theta: Theta, x: Tensor) -> Tensor:
        u = self.potentials(z, x)
        currents = [self.diode_current(self._diodes.across(u))]
        if self._is_full and len(self.resistors) * len(u) > _MANY:
            currents.append(self._typical_current(u, theta))
        else:
            currents.append(theta["conductance"] * self._resistors.across(u))
        if self.amplifiers:
            currents.append(theta["transconductance"] * self._controls.across(u))
        return torch.cat(currents, 1).abs().amax(1)

    def _typical_current(self, u: Tensor, theta: Theta) -> Tensor:
        """At each node less than the largest current of its resistors, from the heat of them all."""
        n = self.n_states
        matrix = self._linear["conductance"].dense(theta["conductance"], n, u.shape[1])
        # At a free node sum_j g_j (u - u_j)^2; the matrix has minus g_j, and the sum of all at the node itself.
        total = matrix[:, :n].diagonal()
        around = matrix.clone()
        around[:, :n].fill_diagonal_(0.0)
        z = u[:, :n]
        heat = total * z.square() + 2 * z * (u @ around.T) - u.square() @ around.T
        count = (matrix != 0).sum(1).clamp_min(1)
        width = (u.amax(1, keepdim=True) - u.amin(1, keepdim=True)).clamp_min(torch.finfo(u.dtype).tiny)
        return heat.clamp_min(0.0) / count / width

    def diode_current(self, v: Tensor) -> Tensor:
        """The current of a diode at a voltage, in amperes, by its [law][torchdeq_ep_physics.DiodeLaw]."""
        return self.diode_law.current(v)

    def diode_voltages(self, z: Tensor, x: Tensor) -> Tensor:
        """The voltage across each diode, of shape `(batch, len(diodes))`."""
        return self._diodes.across(self.potentials(z, x))

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
        current = (conductance * self._resistors.across(u.unsqueeze(0))[0]).abs()
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
