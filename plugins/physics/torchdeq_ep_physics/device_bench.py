"""How the currents of devices depend on their parameters, measured: each device alone, its terminals held.

The law of a transistor is ngspice's, and only its derivative by what is trained is needed, at the voltages of the free
state. So the devices are simulated apart from the circuit, with the parameter a little larger and a little smaller: two
small operating points in place of a derivative of the model's equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep_physics.flat_netlist import GROUND, FlatNetlist, SpiceLine, as_line
from torchdeq_ep_physics.netlist_terms import Knob
from torchdeq_ep_physics.spice_process import SpiceProgram, spice_deck, spice_number

_STEP = 1e-4


@dataclass(frozen=True)
class BenchCopy:
    """A device in the bench: twice, with its parameter raised and lowered."""

    knob: int
    device: SpiceLine
    up: float
    down: float


@dataclass(frozen=True)
class DeviceBench:
    """Derivatives of device currents by parameters.

    Args:
        flat: The circuit that the devices are from.
        knobs: What is trained of them.
        settings: The lines that set temperature and tolerances.
        program: How ngspice is run.
    """

    flat: FlatNetlist
    knobs: Sequence[Knob]
    settings: Sequence[str]
    program: SpiceProgram

    def slopes(self, values: Sequence[float], read: Callable[[str], Tensor]) -> list[tuple[int, str, Tensor]]:
        """Derivatives of the currents into the terminals of the devices.

        Args:
            values: Those of the knobs.
            read: From the name of a node to its voltage in each row, of shape `(batch,)`.

        Returns:
            For each knob and terminal: the number of the knob, the node, and the derivative, of shape `(batch,)`.

        Raises:
            NgspiceError: If ngspice cannot simulate a device alone.
        """
        copies = [
            BenchCopy(k, device, value + step, value - step)
            for k, (knob, value) in enumerate(zip(self.knobs, values, strict=True))
            for step in (_STEP * knob_size(knob, value),)
            for device in knob.devices
        ]
        nodes = sorted({node for copy in copies for node in self.flat.terminals(copy.device) if node not in GROUND})
        held = {node: f"tepn{k}" for k, node in enumerate(nodes)} | dict.fromkeys(GROUND, "0")
        lines = [*self._surroundings(), *(f"vtephold{k} tepn{k} 0 0" for k in range(len(nodes)))]
        probes: list[str] = []
        for number, copy in enumerate(copies):
            for side, value in (("u", copy.up), ("d", copy.down)):
                lines += self._copy(number, side, copy, value, held, probes)
        voltages = torch.stack([read(node) for node in nodes], 1).tolist() if nodes else []
        rows = [[f"alter vtephold{k} = {spice_number(volts)}" for k, volts in enumerate(row)] for row in voltages]
        decks = [(part, spice_deck(lines, [rows[k] for k in part], probes)) for part in self.program.parts(len(rows))]
        currents = iter(self.program.operating_points(decks, probes).unbind(1))
        found = []
        for copy in copies:
            ends = self.flat.terminals(copy.device)
            raised, lowered = ([next(currents) for _ in ends] for _ in range(2))
            for node, more, less in zip(ends, raised, lowered, strict=True):
                found.append((copy.knob, node, (more - less) / (copy.up - copy.down)))
        return found

    def _surroundings(self) -> list[str]:
        """Title, models and options: all of the circuit but its elements and where it starts."""
        kept = [line for line in self.flat.lines if line.startswith((".model", ".opt", ".param", ".func"))]
        return ["* devices alone", *kept, *self.settings]

    def _copy(
        self, number: int, side: str, copy: BenchCopy, value: float, held: dict[str, str], probes: list[str]
    ) -> list[str]:
        """A device with another parameter, an ammeter at each terminal; its readings are appended to the probes."""
        knob, device = self.knobs[copy.knob], copy.device
        mark = f"{side}{number}"
        model = self.flat.model_of(device)
        now = as_line(self.flat.lines[device.place], device.place)
        words = list(now.tokens)
        lines = []
        if knob.lines[0].is_model:
            for card in knob.lines:
                if model is not None and card.name == words[model]:
                    written = as_line(self.flat.lines[card.place], card.place).tokens
                    lines.append(knob.text(SpiceLine(card.place, (written[0], f"tepm{mark}", *written[2:])), value))
                    words[model] = f"tepm{mark}"
        else:
            words = knob.text(now, value).split()
        ends = self.flat.terminals(device)
        for k, node in enumerate(ends):
            inner, reading = f"tepc{mark}x{k}", f"tepi{mark}x{k}"
            lines += [f"v{reading} {held[node]} {inner} 0", f"h{reading} {reading} 0 v{reading} 1"]
            words[1 + k] = inner
            probes.append(f"v({reading})")
        words[0] = f"{device.kind}tep{mark}"
        return [*lines, " ".join(words)]


def knob_size(knob: Knob, value: float) -> float:
    """What the step of a finite difference is relative to: the value, or its natural size where it is near zero."""
    return abs(value) if knob.spec.log else max(abs(value), 1e-3 * knob.unit)
