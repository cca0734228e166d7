"""What can be trained in a netlist, and the terms of the circuit's law that depend on it.

The unknowns are those of SPICE (modified nodal analysis): voltages of nodes, and currents through voltage sources. The
law of a node is the current that flows into it, that of a voltage source the voltage that is missing across it, so the
Jacobian of a circuit of two-terminal elements is symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.flat_netlist import GROUND, FlatNetlist, SpiceLine, spice_value
from torchdeq_ep_physics.spice_process import spice_number

SOURCES = ("v", "i")
_HELD = ("v", "e")
"""Elements whose current is an unknown of its own."""


@dataclass(frozen=True)
class Trainable:
    """A number in a netlist that is trained.

    Args:
        name: `R1`, `V1`, `I1`, or `E1` and `G1` with a constant gain: the value of an element; `x1.R1` of one in a
            subcircuit. `mymodel.BF`: a parameter of a model, of all the devices that use it. `M1.W`: a parameter of
            one device.
        low: Lower bound, or `None`.
        high: Upper bound, or `None`.
        log: Whether steps are relative: by default for resistors, and for positive parameters of models and devices.
        initial: Where training starts; by default the value in the netlist.

    Raises:
        InvalidOptionError: If the bounds are no interval.

    Example:
        >>> Trainable("R1", 1e2, 1e5).low
        100.0
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool | None = None
    initial: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "initial"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(spice_number(getattr(self, name), f"{name} of {self.name}")))
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise InvalidOptionError(f"the bounds of {self.name} are no interval: {self.low} and {self.high}.")


@dataclass(frozen=True)
class Knob:
    """A trainable number, found in a netlist.

    Args:
        spec: What was asked for, with all its fields filled in.
        lines: The lines that it stands in.
        key: Name of the parameter in them; empty for the value of an element.
        devices: The elements whose current depends on it.
    """

    spec: Trainable
    lines: tuple[SpiceLine, ...]
    key: str
    devices: tuple[SpiceLine, ...]

    @property
    def element(self) -> SpiceLine:
        """The element it is the value of."""
        return self.lines[0]

    @property
    def is_measured(self) -> bool:
        """Whether its effect is measured on the devices alone, because their law is ngspice's."""
        plain = all(token.startswith("m=") for token in self.element.tokens[4:])
        return bool(self.key) or (self.element.kind == "r" and not (plain and spice_value(self.element.tokens[3])))

    def text(self, line: SpiceLine, value: float) -> str:
        """A line with another value."""
        number = spice_number(value, self.spec.name)
        if self.key:
            return line.with_parameter(self.key, number)
        if line.kind in SOURCES:
            return " ".join([*line.tokens[:3], number])
        if line.kind == "r" and line.parameter("r") is not None:
            return line.with_parameter("r", number)
        place = 3 if line.kind == "r" else 5
        return " ".join([*line.tokens[:place], number, *line.tokens[place + 1 :]])

    def value_of(self, raw: Tensor) -> Tensor:
        """The physical value, between its bounds."""
        low, high = self.spec.low, self.spec.high
        if low is not None and high is not None:
            if self.spec.log:
                return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * raw.sigmoid())
            return low + (high - low) * raw.sigmoid()
        if low is not None:
            return low + self.unit * raw.exp()
        if high is not None:
            return high - self.unit * raw.exp()
        return raw.exp() if self.spec.log else self.unit * raw

    def raw_of(self, value: float) -> float:
        """The trained number of a value: the inverse of `value_of`."""
        low, high = self.spec.low, self.spec.high
        if low is not None and high is not None:
            scale = math.log if self.spec.log else float
            share = (scale(value) - scale(low)) / (scale(high) - scale(low))
            return math.log(share / (1 - share))
        if low is not None:
            return math.log((value - low) / self.unit)
        if high is not None:
            return math.log((high - value) / self.unit)
        return math.log(value) if self.spec.log else value / self.unit

    @property
    def unit(self) -> float:
        """A natural size of its changes."""
        return abs(self.spec.initial or 0.0) or 1.0


def find_knob(flat: FlatNetlist, spec: Trainable) -> Knob:
    """Where a trainable number stands.

    Args:
        flat: The circuit.
        spec: What is to be trained.

    Returns:
        Its lines, its value, and the devices that depend on it.

    Raises:
        InvalidOptionError: If there is no such number, or it cannot be trained.
    """
    name = spec.name.lower()
    element = flat.element(name)
    if element is not None:
        if element.kind not in (*SOURCES, "r", "e", "g"):
            raise InvalidOptionError(
                f"{spec.name} has no value of its own: name a parameter of it, such as {name}.area."
            )
        return _filled(spec, (element,), "", (element,), _value_of(element), element.kind == "r")
    owner, _, key = name.rpartition(".")
    element, models = flat.element(owner), tuple(flat.models_named(owner))
    if owner and element is not None:
        if element.kind in (*_HELD, "h", "x"):
            raise InvalidOptionError(f"{spec.name}: of {element.name} only the value can be trained, as {owner!r}.")
        return _filled(spec, (element,), key, (element,), element.parameter(key), True)
    if owner and models:
        names = {model.name for model in models}
        users = tuple(e for e in flat.elements if (k := flat.model_of(e)) is not None and e.tokens[k] in names)
        if not users:
            raise InvalidOptionError(f"{spec.name}: no device uses the model {owner}.")
        return _filled(spec, models, key, users, models[0].parameter(key), True)
    known = [*(line.name for line in flat.elements), *(f"{model.name}.{model.tokens[-1]}" for model in flat.models)]
    raise InvalidOptionError(
        f"there is nothing called {spec.name!r} in the netlist to train. There are {', '.join(known[:40])}. An element "
        "of a subcircuit is called x1.r1, a parameter of a model model.parameter. A parameter of .param is not known "
        "any more when the netlist is expanded: name what it is the value of."
    )


def _value_of(element: SpiceLine) -> float | None:
    words = element.tokens
    if element.kind in SOURCES:
        if "dc" in words[:-1]:
            return spice_value(words[words.index("dc") + 1])
        return spice_value(words[3]) if len(words) > 3 else 0.0
    if element.kind == "r":
        return element.parameter("r") if len(words) < 4 or "=" in words[3] else spice_value(words[3])
    return spice_value(words[5]) if len(words) == 6 else None


def _filled(
    spec: Trainable,
    lines: tuple[SpiceLine, ...],
    key: str,
    devices: tuple[SpiceLine, ...],
    found: float | None,
    is_scale: bool,
) -> Knob:
    initial = found if spec.initial is None else spec.initial
    if initial is None:
        raise InvalidOptionError(
            f"{spec.name} has no number in the netlist ({' '.join(lines[0].tokens)!r}): write one there, or give "
            "Trainable(..., initial=)."
        )
    log = (is_scale and initial > 0 and (spec.low is None or spec.low > 0)) if spec.log is None else spec.log
    least = 0.0 if log else -math.inf
    low, high = least if spec.low is None else spec.low, math.inf if spec.high is None else spec.high
    if log and spec.low is not None and spec.low <= 0:
        raise InvalidOptionError(
            f"{spec.name}: relative steps (log=True) need a lower bound above 0, not {spec.low:g}."
        )
    if not low < initial < high:
        raise InvalidOptionError(
            f"{spec.name} starts at {initial:g}, which does not lie between {low:g} and {high:g}. Give other bounds, "
            "or initial=; log=False if it may be negative."
        )
    return Knob(Trainable(spec.name, spec.low, spec.high, log, initial), lines, key, devices)


def as_trainable(spec: object) -> Trainable:
    """What is to be trained, in whatever form it was given: a name, a `Trainable`, or `(name, low, high)`."""
    if isinstance(spec, Trainable):
        return spec
    if isinstance(spec, str):
        return Trainable(spec)
    if isinstance(spec, Sequence) and len(spec) == 3 and isinstance(spec[0], str):
        return Trainable(*spec)
    raise InvalidOptionError(f"trainable has {spec!r}: give a name, a Trainable, or (name, low, high).")


Added = Callable[[str, Tensor], None]


def unknowns(flat: FlatNetlist, element: SpiceLine) -> list[str]:
    """The entries of the state that the terms of an element refer to: its nodes, and `i(v1)` for its current."""
    if element.kind == "v":
        return [f"i({element.name})"]
    nodes = [node for node in flat.terminals(element) if node not in GROUND]
    return [*nodes, f"i({element.name})"] if element.kind == "e" else nodes


def add_term(element: SpiceLine, value: Tensor, read: Callable[[str], Tensor], add: Added) -> None:
    """Add what an element contributes to the law.

    Args:
        element: A resistor, a source, or a controlled source with a constant gain.
        value: Its value.
        read: From the name of an unknown to its value.
        add: Adds a current to a node, or a voltage to a source.
    """
    plus, minus = element.tokens[1:3]
    if element.kind == "v":
        add(f"i({element.name})", value)
        return
    if element.kind in ("e", "g"):
        value = value * (read(element.tokens[3]) - read(element.tokens[4]))
    if element.kind == "e":
        add(f"i({element.name})", value)
        return
    if element.kind == "r":
        value = (read(plus) - read(minus)) * (element.parameter("m") or 1.0) / value
    add(plus, -value)
    add(minus, value)
