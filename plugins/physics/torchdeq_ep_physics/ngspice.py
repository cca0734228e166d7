"""ngspice as the solver of a resistive network: a netlist, one process for many operating points."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from torchdeq_ep.errors import EPError, InvalidOptionError, MissingDependencyError
from torchdeq_ep_physics.resistive import GMIN, ResistiveNetwork
from torchdeq_ep_physics.system import Theta

_VALUE = re.compile(r"^v\(n(\d+)\) = (\S+)", re.MULTILINE)
_COMPLAINT = re.compile(r"error|warning|singular|failed|no convergence|iteration limit|no such|cannot|timestep", re.I)
_ROW = "@row "
_OPTIONS = f".options reltol=1e-10 vntol=1e-13 abstol=1e-18 gmin={GMIN:g} itl1=1000"


class NgspiceError(EPError, RuntimeError):
    """ngspice did not find an operating point; the message holds its own words."""


class Ngspice:
    """A solver for `attach_equilibrium` that hands a network to ngspice.

    All rows of the batch are operating points of one process. Inputs are voltage sources, the nudge is a current source
    at each node. Parameters and inputs are those at construction.

    Args:
        network: The circuit.
        x: Voltages of the input terminals, of shape `(batch, n_inputs)`.
        theta: Physical parameters, by default those of the network.
        command: Name or path of the program.
        timeout: Seconds for one process.

    Raises:
        MissingDependencyError: If there is no such program.

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
    ) -> None:
        if x.dim() != 2 or x.shape[1] != network.n_inputs:
            raise InvalidOptionError(f"x must have shape (batch, {network.n_inputs}), not {tuple(x.shape)}.")
        if not ngspice_available(command):
            raise MissingDependencyError(
                f"ngspice is needed to simulate the circuit, and {command!r} was not found. Install it (Debian, "
                "Ubuntu: apt-get install ngspice; macOS: brew install ngspice), or use the network itself, its "
                "differentiable twin."
            )
        values = network.physical() if theta is None else theta
        self.network = network
        self.x = x.detach().double()
        self.theta = {name: value.detach().double() for name, value in values.items()}
        self.command, self.timeout = command, timeout

    def __call__(self, current: Tensor) -> Tensor:
        """The node voltages of each row under currents injected into the nodes.

        Args:
            current: In amperes; of shape `(batch, n_nodes)`, or anything that broadcasts to it.

        Returns:
            Voltages of shape `(batch, n_nodes)`, in float64.

        Raises:
            NgspiceError: If an operating point was not found.
            subprocess.TimeoutExpired: If the process took too long.
        """
        rows, nodes = len(self.x), self.network.n_states
        injected = torch.as_tensor(current).double().expand(rows, nodes)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "network.cir")
            path.write_text(self.netlist(injected))
            done = subprocess.run(
                [self.command, "-b", str(path)], capture_output=True, text=True, timeout=self.timeout, cwd=directory
            )
        states = []
        for row, part in enumerate(done.stdout.split(_ROW)[1:]):
            found = {int(node): float(value) for node, value in _VALUE.findall(part)}
            if len(found) != nodes:
                raise NgspiceError(f"ngspice found no operating point for row {row}: {_words(part + done.stderr)}")
            states.append([found[node] for node in range(nodes)])
        if len(states) != rows:
            raise NgspiceError(
                f"ngspice stopped after {len(states)} of {rows} rows: {_words(done.stderr + done.stdout)}"
            )
        return torch.tensor(states, dtype=torch.float64)

    def netlist(self, current: Tensor) -> str:
        """The circuit in SPICE's language, with a script that walks through the rows.

        Args:
            current: Injected currents, of shape `(batch, n_nodes)`.

        Returns:
            The text.
        """
        network = self.network
        nodes, inputs = network.n_states, network.n_inputs
        names = [f"n{k}" for k in range(nodes)] + [f"in{k}" for k in range(inputs)]
        names += [f"rail{k}" for k in range(len(network.rails))]
        first_x, first_current = self.x[0].tolist(), current[0].tolist()
        lines = ["* resistive network", _OPTIONS]
        lines += [f"Vin{k} in{k} 0 DC {volts!r}" for k, volts in enumerate(first_x)]
        lines += [f"Vrail{k} rail{k} 0 DC {volts!r}" for k, volts in enumerate(network.rails)]
        lines += [f"Inudge{k} 0 n{k} DC {amperes!r}" for k, amperes in enumerate(first_current)]
        for k, ((a, b), siemens) in enumerate(zip(network.resistors, self.theta["conductance"].tolist(), strict=True)):
            lines.append(f"R{k} {names[a]} {names[b]} {1 / siemens!r}")
        lines += [f"D{k} {names[a]} {names[b]} diode" for k, (a, b) in enumerate(network.diodes)]
        lines.append(f".model diode D(IS={network.saturation!r} N={network.ideality!r})")
        if network.amplifiers:
            gains = self.theta["transconductance"].tolist()
            for k, (((plus, minus), (into, out)), gain) in enumerate(zip(network.amplifiers, gains, strict=True)):
                lines.append(f"G{k} {names[out]} {names[into]} {names[plus]} {names[minus]} {gain!r}")
        lines += [".control", "set numdgt=16", "set width=200"]
        for row, (volts, amperes) in enumerate(zip(self.x.tolist(), current.tolist(), strict=True)):
            if row:
                lines += [f"alter Vin{k} = {value!r}" for k, value in enumerate(volts)]
                lines += [f"alter Inudge{k} = {value!r}" for k, value in enumerate(amperes)]
            lines += [f"echo {_ROW}{row}", "op"]
            lines += [f"print v(n{k})" for k in range(nodes)]
            lines.append("destroy all")
        return "\n".join([*lines, "quit", ".endc", ".end", ""])


def ngspice_available(command: str = "ngspice") -> bool:
    """Whether the program is installed.

    Args:
        command: Its name or path.

    Returns:
        Whether it can be found.
    """
    return shutil.which(command) is not None


def _words(output: str) -> str:
    """The lines of the output in which something is complained about."""
    lines = [line.strip() for line in output.splitlines() if _COMPLAINT.search(line)]
    kept = list(dict.fromkeys(line for line in lines if line))[:5]
    return "; ".join(kept) or "it gave no reason."
