"""A SPICE netlist as ngspice itself expands it: subcircuits, includes and parameters resolved, an element a line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import unknown_name
from torchdeq_ep_physics.spice_process import NgspiceError, SpiceProgram, keep

GROUND = ("0", "gnd")

# What simulates, prints or plots: the netlist is a circuit here, and operating points are all that is asked of it.
_ANALYSES = (
    *(".tran", ".ac", ".dc", ".op", ".noise", ".tf", ".sens", ".pz", ".disto", ".four", ".fourier", ".print", ".plot"),
    *(".save", ".probe", ".meas", ".measure", ".step", ".width", ".end"),
)
_TERMINALS = dict.fromkeys("rclvibfhd", 2) | dict.fromkeys("egst", 4)
_TITLE = "expanded by ngspice"
_TEMPERATURES = re.compile(r"TEMP = (\S+) and TNOM = (\S+)")
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([a-z]*)", re.IGNORECASE)
_SUFFIXES = {"t": 1e12, "g": 1e9, "meg": 1e6, "k": 1e3, "mil": 25.4e-6, "m": 1e-3}
_SUFFIXES |= {"u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15, "a": 1e-18}


@dataclass(frozen=True)
class SpiceLine:
    """An element or a model of a flat netlist.

    Args:
        place: Which line of the netlist it is.
        tokens: Its words, lower case.
    """

    place: int
    tokens: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the line defines."""
        return self.tokens[1] if self.is_model else self.tokens[0]

    @property
    def is_model(self) -> bool:
        """Whether it is a `.model` card."""
        return self.tokens[0] == ".model"

    @property
    def kind(self) -> str:
        """The letter of the element: `r`, `q`, `m` and so on."""
        return self.tokens[0][0]

    def parameter(self, name: str) -> float | None:
        """The value of `name=value` in the line, or `None`."""
        for token in self.tokens:
            key, equals, value = token.partition("=")
            if equals and key.lstrip("(") == name:
                return spice_value(value)
        return None

    def with_parameter(self, name: str, value: str) -> str:
        """The text of the line with a parameter set."""
        kept = [token for token in self.tokens if token.partition("=")[0] != name]
        return " ".join([*kept, f"{name}={value}"])


@dataclass(frozen=True)
class FlatNetlist:
    """A circuit, one element a line.

    Args:
        lines: The lines after the title.
        celsius: Its temperature.
        nominal: The temperature at which its models were measured.
    """

    lines: tuple[str, ...]
    celsius: float
    nominal: float

    @property
    def elements(self) -> list[SpiceLine]:
        """What has nodes."""
        return [line for line in self._split() if not line.tokens[0].startswith(".")]

    @property
    def models(self) -> list[SpiceLine]:
        """The `.model` cards."""
        return [line for line in self._split() if line.is_model]

    @property
    def nodes(self) -> set[str]:
        """All nodes but ground."""
        return {node for line in self.elements for node in self.terminals(line)} - set(GROUND)

    def terminals(self, element: SpiceLine) -> list[str]:
        """The nodes of an element."""
        model = self.model_of(element)
        if model is not None:
            return list(element.tokens[1:model])
        counted = _TERMINALS.get(element.kind)  # of what is not counted, all words may be nodes
        return [token for token in element.tokens[1 : None if counted is None else counted + 1] if "=" not in token]

    def element(self, name: str) -> SpiceLine | None:
        """The element that a user calls `name`: `r1`, or `x1.r1` for one in a subcircuit."""
        local = name.rpartition(".")[2]
        flat = f"{local[:1]}.{name}" if "." in name else name
        return next((line for line in self.elements if line.name in (name, flat)), None)

    def models_named(self, name: str) -> list[SpiceLine]:
        """The models that a user calls `name`: all copies of one that is defined in a subcircuit."""
        scoped = name.replace(".", ":")
        return [line for line in self.models if line.name in (name, scoped) or line.name.rpartition(":")[2] == name]

    def model_of(self, element: SpiceLine) -> int | None:
        """Which word of an element is its model."""
        names = {line.name for line in self.models} | {line.name.rpartition(".")[0] for line in self.models}
        return next((k for k, token in enumerate(element.tokens) if k > 1 and token in names), None)

    def require_node(self, name: str) -> str:
        """A node, lower case.

        Args:
            name: As the user wrote it.

        Returns:
            Its name.

        Raises:
            InvalidOptionError: If there is none of this name.
        """
        node = name.lower()
        if node not in self.nodes:
            raise InvalidOptionError(
                f"{unknown_name('node', name, sorted(self.nodes))} One in a subcircuit is called x1.node."
            )
        return node

    def _split(self) -> list[SpiceLine]:
        return [as_line(text, place) for place, text in enumerate(self.lines)]


def as_line(text: str, place: int) -> SpiceLine:
    """The words of a line.

    Args:
        text: As ngspice lists it.
        place: Which line of the netlist it is.

    Returns:
        The line.

    Example:
        >>> as_line(".model d1n D(IS= 1e-14 N=1.1)", 0).tokens
        ('.model', 'd1n', 'd', 'is=1e-14', 'n=1.1')
    """
    plain = text.replace("(", " ").replace(")", " ") if text.startswith(".") else text
    return SpiceLine(place, tuple(re.sub(r"\s*=\s*", "=", plain).lower().split()))


def flatten(path: Path, program: SpiceProgram) -> FlatNetlist:
    """Let ngspice expand a netlist.

    Args:
        path: The user's file. Its analyses and control blocks are left out; relative includes start in its folder.
        program: How ngspice is run.

    Returns:
        The circuit.

    Raises:
        InvalidOptionError: If the file cannot be read.
        NgspiceError: If ngspice cannot read the circuit.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidOptionError(f"the netlist {path} cannot be read: {error}.") from None
    script = [".control", "listing r", "op", "quit 0", ".endc", ".end", ""]
    deck = "\n".join([_TITLE, *circuit_only(text.splitlines())[1:], *script])
    out, err = program.run(deck, str(path.resolve().parent))
    rows = [row.strip() for row in out.splitlines()]
    ends = [k for k, row in enumerate(rows) if row.lower() == ".end"]
    starts = [k for k, row in enumerate(rows) if row.lower().startswith("circuit:")]
    if not ends or not starts:
        words = [row.strip() for row in err.splitlines() if row.strip() and not row.startswith("Note")]
        raise NgspiceError(f"ngspice cannot read {path}: {' '.join(words[:6])} {keep(text, out + err)}")
    lines = tuple(row for row in rows[starts[0] + 1 : ends[0]] if row and row != _TITLE and not row.startswith("*"))
    temperatures = _TEMPERATURES.search(out)
    celsius, nominal = map(float, temperatures.groups()) if temperatures else (27.0, 27.0)
    flat = FlatNetlist(lines, celsius, nominal)
    if not flat.elements:
        raise NgspiceError(f"there is no element in {path}: a netlist is a title, then one element a line.")
    return flat


def circuit_only(lines: Sequence[str]) -> list[str]:
    """The lines of a netlist that describe its circuit, without analyses, control blocks and the end.

    Args:
        lines: The title first.

    Returns:
        The others.

    Example:
        >>> circuit_only(["title", "V1 a 0 1", ".tran 1u", "+ 1m", "R1 a 0 1", ".control", "run", ".endc", ".end"])
        ['title', 'V1 a 0 1', 'R1 a 0 1']
    """
    kept, in_control, dropping = list(lines[:1]), False, False
    for line in lines[1:]:
        words = line.strip().lower().split(maxsplit=1)
        first = words[0] if words else ""
        if first in (".control", ".endc"):
            in_control = first == ".control"
            dropping = True
        elif not first.startswith("+"):
            dropping = first in _ANALYSES
        if not (in_control or dropping):
            kept.append(line)
    return kept


def spice_value(text: str) -> float | None:
    """A number as SPICE writes it.

    Args:
        text: Such as `4.7k`, `10meg` or `1e-15`; a unit behind it is ignored.

    Returns:
        Its value, or `None` if it is none.

    Example:
        >>> spice_value("4.7kohm"), spice_value("2meg"), spice_value("npn")
        (4700.0, 2000000.0, None)
    """
    match = _NUMBER.fullmatch(text.strip("(){}"))
    if match is None:
        return None
    letters = match[2].lower()
    suffix = next((name for name in ("meg", "mil") if letters.startswith(name)), letters[:1])
    return float(f"{match[1]}") * _SUFFIXES.get(suffix, 1.0)
