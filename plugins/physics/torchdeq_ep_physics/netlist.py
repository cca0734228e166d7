"""A user's own netlist as a layer: any circuit that ngspice can simulate, trained through its operating points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_choice
from torchdeq_ep_physics.device_bench import DeviceBench
from torchdeq_ep_physics.flat_netlist import GROUND, SpiceLine, as_line, flatten
from torchdeq_ep_physics.netlist_gradient import AtOperatingPoint, NetlistReport, NetlistRule
from torchdeq_ep_physics.netlist_terms import SOURCES, add_term, as_trainable, find_knob, unknowns
from torchdeq_ep_physics.spice_process import TOLERANCES, SpiceProgram, spice_deck, spice_number
from torchdeq_ep_physics.system import Theta

_VOLTS, _AMPERES = 0.1, 1e-6
"""Natural steps of sources: a transistor is as good as linear over a thousandth of them."""


class Netlist(nn.Module):
    r"""A circuit in a SPICE file as a layer: inputs are sources, outputs are operating-point voltages.

    Anything that ngspice simulates may be in it: transistors, macros of operational amplifiers, subcircuits, `.model`,
    `.include`, `.param`. Analyses and control blocks are ignored, and so are the user's settings of ngspice. The
    temperature is that of the file, or 27 degrees.

    The gradient comes from currents that are injected at the outputs (equilibrium propagation), if the circuit is
    reciprocal. Two more solves test that in each backward pass. A circuit with one-way elements, such as a transistor
    that is driven at its gate or base, is found out, and its gradient comes from forward derivatives from then on: two
    solves for each parameter and input.

    Args:
        path: The netlist.
        trainable: What is trained: names such as `"R1"`, `"x1.R1"`, `"V1"`, `"mymodel.BF"` or `"M1.W"`;
            [`Trainable`][torchdeq_ep_physics.Trainable] for bounds and scale, or `(name, low, high)`.
        inputs: Voltage or current sources that the input sets.
        outputs: Nodes, or `"i(V1)"` for the current through a voltage source, from its plus to its minus.
        gradient: `"auto"` as described; `"ep"` always by nudges, with an
            [`AsymmetryWarning`][torchdeq_ep.errors.AsymmetryWarning] where that is wrong; `"forward"` always by forward
            derivatives.
        command: Name or path of ngspice.
        timeout: Seconds for one process.
        workers: Processes at a time; the rows of the batch are spread over them.
        compatibility: Dialect of the netlist, such as `"psa"` or `"ltpsa"`: ngspice's `ngbehavior`.

    Raises:
        InvalidOptionError: If the file cannot be read, or a name is not in it.
        MissingDependencyError: If ngspice is not installed.
        NgspiceError: If ngspice cannot read the netlist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torchdeq_ep_physics import ngspice_available
        >>> folder = TemporaryDirectory()
        >>> path = Path(folder.name, "divider.cir")
        >>> _ = path.write_text("divider\nVin in 0 1\nR1 in out 1k\nR2 out 0 3k\n.end\n")
        >>> if ngspice_available():
        ...     divider = Netlist(path, trainable=["R1"], inputs=["Vin"], outputs=["out"])
        ...     assert abs(divider(torch.tensor([[2.0]])).item() - 1.5) < 1e-6
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        trainable: Sequence[Any] = (),
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        *,
        gradient: NetlistRule = "auto",
        command: str = "ngspice",
        timeout: float = 60.0,
        workers: int = 1,
        compatibility: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("gradient", gradient, ("auto", "ep", "forward"))
        for name, given in (("trainable", trainable), ("inputs", inputs), ("outputs", outputs)):
            if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
                raise InvalidOptionError(f"{name} must be a list, not {given!r}.")
        if not outputs:
            raise InvalidOptionError("outputs is empty: name the nodes whose voltages the layer returns.")
        flags = () if compatibility is None else ("-D", f"ngbehavior={compatibility}")
        self.gradient: NetlistRule = gradient
        self.program = SpiceProgram(command, timeout, workers, flags)
        self.flat = flatten(Path(path), self.program)
        self.knobs = [find_knob(self.flat, as_trainable(each)) for each in trainable]
        self.inputs = [self._source(name) for name in inputs]
        used = [knob.spec.name.lower() for knob in self.knobs] + [line.name for line in self.inputs]
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise InvalidOptionError(f"{', '.join(twice)} is given twice: each is trained once, or an input.")
        self.outputs = [self._output(name) for name in outputs]
        wanted = list(self.outputs)
        for element in (*(device for knob in self.knobs for device in knob.devices), *self.inputs):
            wanted += unknowns(self.flat, element)
        self.unknowns = list(dict.fromkeys(wanted))
        start = [knob.raw_of(cast(float, knob.spec.initial)) for knob in self.knobs]
        self.raw = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.reciprocal: bool | None = None
        self.last: NetlistReport | None = None
        self.generator = torch.Generator().manual_seed(0)

    def physical(self) -> Theta:
        """The trained numbers by name, in SPICE's units, with their graph to the parameter `raw`.

        Returns:
            A dictionary of tensors without dimensions.
        """
        return {knob.spec.name: knob.value_of(raw) for knob, raw in zip(self.knobs, self.raw.unbind(), strict=True)}

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The outputs at an operating point for each row, with their gradient.

        Args:
            x: Volts and amperes of the inputs, of shape `(batch, n_inputs)`; not needed without inputs.

        Returns:
            Voltages, in volts, and currents, in amperes, of shape `(batch, n_outputs)`, in the dtype of `x`.

        Raises:
            NgspiceError: If an operating point was not found.
        """
        given = self._rows(x)
        theta = torch.stack([*self.physical().values()]) if self.knobs else self.raw
        free = self.operating_points(given, theta)
        state: Tensor = AtOperatingPoint.apply(self, free, theta, given)  # type: ignore[no-untyped-call]
        outputs = state[:, : len(self.outputs)]
        return outputs.to(x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else outputs

    def solver(self, x: Tensor | None = None, theta: Theta | None = None) -> Callable[[Tensor], Tensor]:
        """A solver for `attach_equilibrium` and `sensitivities`.

        Args:
            x: As for the layer.
            theta: Physical values, by default those of the layer.

        Returns:
            From an added force to the state, the values of `unknowns`: amperes into the nodes, volts in series with
            sources.
        """
        values = self.physical() if theta is None else theta
        numbers = torch.tensor([float(values[knob.spec.name].detach()) for knob in self.knobs], dtype=torch.float64)
        return partial(self.operating_points, self._rows(x).detach(), numbers)

    def force(self, z: Tensor, theta: Theta | Tensor, x: Tensor | None = None) -> Tensor:
        """The terms of the circuit's law that depend on the parameters and the inputs: say `check=False` with it.

        Those of models and devices are measured at `z`, on each device alone, and are linear about `theta`.

        Args:
            z: The free state, of shape `(batch, len(unknowns))`.
            theta: Physical values, from [`physical`][torchdeq_ep_physics.Netlist.physical].
            x: As for the layer.

        Returns:
            Amperes into the nodes and volts across the sources, of the shape of `z`.
        """
        numbers = theta
        if not isinstance(numbers, Tensor):
            held = cast(Theta, theta)
            numbers = (
                torch.stack([held[knob.spec.name].double() for knob in self.knobs], -1) if self.knobs else self.raw
            )
        numbers = numbers.expand(len(z), -1)
        place = {name: k for k, name in enumerate(self.unknowns)}
        columns = list(torch.zeros_like(z).unbind(1))

        def read(name: str) -> Tensor:
            return torch.zeros_like(z[:, 0]) if name in GROUND else z[:, place[name]]

        def add(name: str, value: Tensor) -> None:
            if name not in GROUND:
                columns[place[name]] = columns[place[name]] + value

        for knob, value in zip(self.knobs, numbers.unbind(1), strict=True):
            if not knob.is_measured:
                add_term(knob.element, value, read, add)
        for source, value in zip(self.inputs, self._rows(x).unbind(1), strict=True):
            add_term(source, value, read, add)
        for k, node, slope in self._measured(numbers.detach(), lambda name: read(name).detach()):
            add(node, -slope.to(z) * numbers[:, k])
        return torch.stack(columns, 1)

    def operating_points(self, x: Tensor, theta: Tensor, current: Tensor | float = 0.0) -> Tensor:
        """The state of each row under an added force.

        Args:
            x: Of shape `(batch, n_inputs)`.
            theta: Physical values, in the order of `trainable`.
            current: Amperes into the nodes and volts in series with the sources among `unknowns`; broadcasts.

        Returns:
            Of shape `(batch, len(unknowns))`, in float64.
        """
        lines = self._circuit(theta)
        added = torch.as_tensor(current).detach().double().expand(len(x), len(self.unknowns))
        rows = [
            [
                *(f"alter {s.name} = {spice_number(v, s.name)}" for s, v in zip(self.inputs, given, strict=True)),
                *(
                    f"alter {_nudge(name, k)} = {spice_number(v)}"
                    for k, (name, v) in enumerate(zip(self.unknowns, b, strict=True))
                ),
            ]
            for given, b in zip(x.tolist(), added.tolist(), strict=True)
        ]
        probes = [f"v(tepz{k})" for k in range(len(self.unknowns))]
        decks = [(part, spice_deck(lines, [rows[k] for k in part], probes)) for part in self.program.parts(len(rows))]
        return self.program.operating_points(decks, probes)

    def steps(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Natural sizes of changes of the parameters and of the inputs: what nudges in their place are measured in.

        Args:
            theta: Physical values.
            x: Of shape `(batch, n_inputs)`.

        Returns:
            Of the shapes of `theta`, and of one row of `x`.
        """
        parameters = [
            theta[k].abs() if knob.spec.log else theta.new_tensor(self._step(knob.element, knob.key, knob.unit))
            for k, knob in enumerate(self.knobs)
        ]
        inputs = [self._step(source, "", float(x[:, k].abs().max())) for k, source in enumerate(self.inputs)]
        return torch.stack(parameters) if parameters else theta, x.new_tensor(inputs)

    @staticmethod
    def _step(element: SpiceLine, key: str, size: float) -> float:
        if key or element.kind not in SOURCES:
            return size
        return _VOLTS if element.kind == "v" else max(_VOLTS * size, _AMPERES)

    def netlist(self) -> str:
        """The circuit with the values as they are now, expanded, for ngspice.

        Returns:
            The text.
        """
        return "\n".join(["* trained circuit", *self._trained_lines(self._numbers()), *self._settings(), ".end", ""])

    def extra_repr(self) -> str:
        values = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in self.physical().items())
        return f"{values}; {', '.join(s.name for s in self.inputs)} -> {', '.join(self.outputs)}"

    def _numbers(self) -> Tensor:
        return torch.stack([*self.physical().values()]).detach() if self.knobs else self.raw.detach()

    def _rows(self, x: Tensor | None) -> Tensor:
        given = torch.zeros(1, 0) if x is None else torch.as_tensor(x)
        if given.dim() != 2 or given.shape[1] != len(self.inputs) or not len(given):
            raise InvalidOptionError(f"x must have shape (batch, {len(self.inputs)}), not {tuple(given.shape)}.")
        return given.double()

    def _source(self, name: str) -> SpiceLine:
        element = self.flat.element(name.lower())
        if element is None or element.kind not in SOURCES:
            known = [line.name for line in self.flat.elements if line.kind in SOURCES]
            raise InvalidOptionError(
                f"the input {name!r} is no voltage or current source: there are {', '.join(known)}."
            )
        return element

    def _output(self, name: str) -> str:
        text = name.lower().replace(" ", "")
        if text.startswith("i(") and text.endswith(")"):
            element = self.flat.element(text[2:-1])
            if element is None or element.kind != "v":
                raise InvalidOptionError(f"the output {name!r}: there is no voltage source {text[2:-1]!r}.")
            return f"i({element.name})"
        return self.flat.require_node(text[2:-1] if text.startswith("v(") and text.endswith(")") else text)

    def _settings(self) -> list[str]:
        return [f".options {TOLERANCES} temp={self.flat.celsius:g} tnom={self.flat.nominal:g}"]

    def _trained_lines(self, theta: Tensor) -> list[str]:
        lines = list(self.flat.lines)
        for knob, value in zip(self.knobs, theta.tolist(), strict=True):
            for line in knob.lines:
                now = as_line(lines[line.place], line.place)  # other trained numbers may stand in it
                lines[line.place] = knob.text(now, value)
        return lines

    def _circuit(self, theta: Tensor) -> list[str]:
        """The lines with values, nudges and readings."""
        lines = self._trained_lines(theta)
        for source in self.inputs:
            lines[source.place] = " ".join([*source.tokens[:3], "0"])
        extra = []
        for k, name in enumerate(self.unknowns):
            if not name.startswith("i("):
                extra += [f"{_nudge(name, k)} 0 {name} 0", f"etepz{k} tepz{k} 0 {name} 0 1"]
                continue
            element = cast(SpiceLine, self.flat.element(name[2:-1]))
            words = lines[element.place].split()
            lines[element.place] = " ".join([words[0], f"teps{k}", *words[2:]])
            extra += [f"{_nudge(name, k)} {words[1]} teps{k} 0", f"htepz{k} tepz{k} 0 {_nudge(name, k)} 1"]
        return ["* netlist", *lines, *extra, *self._settings()]

    def _measured(self, theta: Tensor, read: Callable[[str], Tensor]) -> list[tuple[int, str, Tensor]]:
        chosen = [k for k, knob in enumerate(self.knobs) if knob.is_measured]
        if not chosen:
            return []
        trained = replace(self.flat, lines=tuple(self._trained_lines(theta[0])))
        bench = DeviceBench(trained, [self.knobs[k] for k in chosen], self._settings(), self.program)
        found = bench.slopes(theta[0, chosen].tolist(), read)
        return [(chosen[k], node, slope) for k, node, slope in found]


def _nudge(name: str, k: int) -> str:
    return f"vtepb{k}" if name.startswith("i(") else f"itepb{k}"
