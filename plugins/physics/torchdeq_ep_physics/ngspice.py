"""ngspice as the solver of a resistive network: a netlist, one process for many operating points."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.diodes import NOMINAL
from torchdeq_ep_physics.resistive import GMIN, ResistiveNetwork
from torchdeq_ep_physics.spice_process import TOLERANCES, SpiceProgram, spice_deck, spice_number, swept_deck
from torchdeq_ep_physics.system import Theta


class Ngspice:
    """A solver for `attach_equilibrium` that hands a network to ngspice.

    The rows of the batch are operating points of one process, or are spread over several. Inputs are voltage sources,
    the nudge is a current source at each node. Parameters and inputs are those at construction. Temperature and
    tolerances are set in the netlist, and nothing of the user's settings is read:
    [`SpiceProgram`][torchdeq_ep_physics.SpiceProgram].

    Args:
        network: The circuit.
        x: Voltages of the input terminals, of shape `(batch, n_inputs)`.
        theta: Physical parameters, by default those of the network.
        command: Name or path of the program.
        timeout: Seconds for one process.
        workers: Processes at a time.

    Raises:
        MissingDependencyError: If there is no such program.
        InvalidOptionError: If an option is not acceptable, `x` has another shape, or a number is not finite.

    Example:
        >>> network = ResistiveNetwork(1, 1, [(0, 1), (0, 2)], torch.tensor([1e-3, 3e-3]).double())
        >>> spice = Ngspice(network, torch.ones(1, 1).double(), command="true")  # any program: it is not started here
        >>> spice.netlist(torch.zeros(1, 1)).splitlines()[2]
        'Vin0 in0 0 DC 1.0'
    """

    def __init__(
        self,
        network: ResistiveNetwork,
        x: Tensor,
        theta: Theta | None = None,
        *,
        command: str = "ngspice",
        timeout: float = 60.0,
        workers: int = 1,
    ) -> None:
        self.x = torch.as_tensor(x).detach().double()
        if self.x.dim() != 2 or self.x.shape[1] != network.n_inputs or not len(self.x):
            raise InvalidOptionError(
                f"x must have shape (batch, {network.n_inputs}) with a row or more, not {tuple(self.x.shape)}."
            )
        self.program = SpiceProgram(command, timeout, workers)
        values = network.physical() if theta is None else theta
        self.network = network
        self.theta = {name: torch.as_tensor(value).detach().double() for name, value in values.items()}
        for name, value in {"x": self.x, **self.theta}.items():
            if not bool(torch.isfinite(value).all()):
                raise InvalidOptionError(f"{name} has entries that are NaN or infinite, and no circuit has them.")
        if bool((self.theta["conductance"] <= 0).any()):
            raise InvalidOptionError("a conductance must be positive: a resistor of 1 / 0 ohm is none. Leave it out.")

    def __call__(self, current: Tensor) -> Tensor:
        """The node voltages of each row under currents injected into the nodes.

        Args:
            current: In amperes; of shape `(batch, n_nodes)`, or anything that broadcasts to it.

        Returns:
            Voltages of shape `(batch, n_nodes)`, in float64.

        Raises:
            NgspiceError: If an operating point was not found.
            NgspiceTimeoutError: If a process took too long; it is also a `subprocess.TimeoutExpired`.
            InvalidOptionError: If a current is not finite.
        """
        injected = torch.as_tensor(current).detach().double().expand(len(self.x), self.network.n_states)
        decks = []
        for rows in self.program.parts(len(self.x)):
            part = copy.copy(self)
            part.x = self.x[rows]
            decks.append((rows, part.netlist(injected[rows])))
        return self.program.operating_points(decks, self._probes)

    def netlist(self, current: Tensor) -> str:
        """The circuit in SPICE's language, with a script that walks through the rows.

        Args:
            current: Injected currents, of shape `(batch, n_nodes)`.

        Returns:
            The text.
        """
        injected = torch.as_tensor(current).detach().double().expand(len(self.x), self.network.n_states)
        rows = [
            _alter("Vin", volts) + _alter("Inudge", amperes)
            for volts, amperes in zip(self.x.tolist(), injected.tolist(), strict=True)
        ]
        return spice_deck(self.circuit(injected), rows, self._probes)

    def sweep(self, deck: str | None = None) -> Tensor:
        """The node voltages of each row without nudges, by one sweep: far faster where circuits are large.

        ngspice orders its matrix anew for each operating point, which takes longest in a large circuit, and but once in
        a sweep. Each point starts from the one before, so a circuit with several operating points may show others.

        Args:
            deck: What [`swept`][torchdeq_ep_physics.Ngspice.swept] gave, if it is at hand.

        Returns:
            Voltages of shape `(batch, n_nodes)`, in float64.

        Raises:
            NgspiceError: If an operating point was not found.
            NgspiceTimeoutError: If it took too long.
        """
        rows = range(len(self.x))
        return self.program.operating_points([(rows, self.swept() if deck is None else deck)], self._probes)

    def swept(self) -> str:
        """The circuit as a netlist that plays all rows in one sweep: `v(row)` counts them, and sets the inputs.

        Returns:
            The text, which `ngspice -b` runs and which prints the voltage of each node in each row.
        """
        count = len(self.x)
        played = [
            f"Bin{k} in{k} 0 V=pwl(v(row), "
            + ", ".join(f"{row}, {spice_number(volts)}" for row, volts in enumerate(column))
            + (", 1, 0.0)" if count == 1 else ")")
            for k, column in enumerate(self.x.T.tolist())
        ]
        title, *lines = (
            line for line in self.circuit(self.x.new_zeros(1, self.network.n_states)) if line[:6] != "Inudge"
        )
        circuit = [title, "Vrow row 0 DC 0", *played, *(line for line in lines if not line.startswith("Vin"))]
        return swept_deck(circuit, f"dc Vrow 0 {max(count - 1, 1)} 1", count, self._probes)

    @property
    def _probes(self) -> list[str]:
        return [f"v(n{k})" for k in range(self.network.n_states)]

    def circuit(self, current: Tensor) -> list[str]:
        """The lines of the netlist, without an end.

        Args:
            current: Injected currents, of shape `(batch, n_nodes)`; the first row stands in the lines.

        Returns:
            The lines, the title first.
        """
        network = self.network
        nodes, inputs = network.n_states, network.n_inputs
        names = [f"n{k}" for k in range(nodes)] + [f"in{k}" for k in range(inputs)]
        names += [f"rail{k}" for k in range(len(network.rails))]
        temperatures = f"temp={network.temperature:g} tnom={NOMINAL:g}"
        lines = ["* resistive network", f".options {TOLERANCES} gmin={GMIN:g} {temperatures}"]
        lines += [f"Vin{k} in{k} 0 DC {spice_number(volts)}" for k, volts in enumerate(self.x[0].tolist())]
        lines += [f"Vrail{k} rail{k} 0 DC {spice_number(volts, 'a rail')}" for k, volts in enumerate(network.rails)]
        lines += [f"Inudge{k} 0 n{k} DC {spice_number(amperes)}" for k, amperes in enumerate(current[0].tolist())]
        for k, ((a, b), siemens) in enumerate(zip(network.resistors, self.theta["conductance"].tolist(), strict=True)):
            lines.append(f"R{k} {names[a]} {names[b]} {spice_number(1 / siemens)}")
        lines += [f"D{k} {names[a]} {names[b]} diode" for k, (a, b) in enumerate(network.diodes)]
        saturation = spice_number(network.saturation, "saturation")
        lines.append(f".model diode D(IS={saturation} N={spice_number(network.ideality, 'ideality')})")
        if network.amplifiers:
            gains = self.theta["transconductance"].tolist()
            for k, (((plus, minus), (into, out)), gain) in enumerate(zip(network.amplifiers, gains, strict=True)):
                lines.append(f"G{k} {names[out]} {names[into]} {names[plus]} {names[minus]} {spice_number(gain)}")
        return lines


def _alter(prefix: str, values: Sequence[float]) -> list[str]:
    return [f"alter {prefix}{k} = {spice_number(value, prefix)}" for k, value in enumerate(values)]
