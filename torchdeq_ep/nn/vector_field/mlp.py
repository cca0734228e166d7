"""Fully connected vector-field networks in any wiring: layers by name, and connections between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.nn.activations import Activation, shifted_sigmoid
from torchdeq_ep.nn.vector_field.base import Readout, VectorField
from torchdeq_ep.nn.weights import rounded_angle, weight_at_angle

INPUT, OUTPUT = "in", "out"
BackwardNorm = Literal["forward", "fan-in"]


@dataclass(frozen=True)
class Connection:
    """A directed connection between two layers.

    Example:
        >>> Connection.parse("l1-l2")
        Connection(source='l1', target='l2')
    """

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Connection:
        """Read `"source-target"`.

        Args:
            text: The spelling.

        Returns:
            The connection.

        Raises:
            InvalidOptionError: If it is spelt otherwise.
        """
        source, dash, target = text.partition("-")
        if not (source and dash and target) or "-" in target:
            raise InvalidOptionError(f"cannot read the connection {text!r}: it is written source-target, e.g. 'l1-l2'.")
        return cls(source, target)

    @property
    def reverse(self) -> Connection:
        """The connection the other way."""
        return Connection(self.target, self.source)

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"


class VectorFieldMLP(VectorField):
    """Fully connected layers in any wiring, cycles without reciprocal connections included.

    Args:
        sizes: Units of each layer by name; `"in"` and `"out"` are the first and the last.
        connections: Pairs `"source-target"`; by default `sizes` in order, with a backward connection for each
            forward one between layers of the state. The first-named of two reciprocal ones counts as forward.
        phi: Activation; it must rise for the metric to exist.
        damping: Share of the old state kept in each step, at least 0 and less than 1.
        gain: Factor of the initial recurrent weights, which have the standard deviation `gain / sqrt(source size)`.
        angle: Initial angle in degrees, 0 to 90, between a backward weight and the transposed forward one; the norms
            are equal. It must be 0 where two layers of one unit are connected both ways.
        feedback: Strength of backward relative to forward weights for which `metric` makes EP exact: it divides `M` of
            each layer by this number relative to the layer below. Homeostasis with that metric then shrinks backward
            weights to `feedback` times the transposed forward ones; at the start the norms are equal all the same.
        backward_norm: Initial norm of backward weights. `"forward"`: that of the forward ones. `"fan-in"`: at 90
            degrees that of any weight from their source, `gain / sqrt(source size)` an entry, as in the papers' code,
            which at other angles mixes such a weight with the transposed forward one. Where layers differ in size,
            `angle` is then nominal, and `connection_angles()` has the actual ones.
        readout: `"mse"`: the output layer is part of the state, and learns by half the squared error. `"softmax"`: it
            is a linear function of its sources outside the state, and learns by cross-entropy.
        **deq_options: Options of `torchdeq.get_deq`, e.g. `f_solver="anderson"`.

    Raises:
        InvalidOptionError: If an option is out of range, or a connection impossible.

    Example:
        >>> model = VectorFieldMLP({"in": 4, "l1": 8, "l2": 8, "out": 3}, angle=90.0)
        >>> model(torch.zeros(2, 4)).shape, model.connection_angles()
        (torch.Size([2, 3]), {'l1-l2': 90.0, 'l2-out': 90.0})
        >>> loop = VectorFieldMLP(
        ...     {"in": 4, "l1": 8, "l2": 8, "out": 3}, ["in-l1", "l1-l2", "l2-out", "out-l1"]
        ... )
        >>> loop.connection_angles()
        {}
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        connections: Sequence[str] | None = None,
        *,
        phi: Activation = shifted_sigmoid,
        damping: float = 0.5,
        gain: float = 0.5,
        angle: float = 0.0,
        feedback: float = 1.0,
        backward_norm: BackwardNorm = "forward",
        readout: Readout = "mse",
        **deq_options: Any,
    ) -> None:
        super().__init__(phi, damping, gain, angle, readout, deq_options)
        if not 0 < feedback < math.inf:
            raise InvalidOptionError(f"feedback must be positive and finite, not {feedback!r}.")
        check_choice("backward_norm", backward_norm, get_args(BackwardNorm))
        self.feedback = feedback
        self.backward_norm = backward_norm
        self.sizes = dict(sizes)
        _check_sizes(self.sizes)
        outside = {INPUT} | ({OUTPUT} if readout == "softmax" else set())
        self.layers = tuple(name for name in self.sizes if name not in outside)
        spelt = chain(self.sizes, self.layers) if connections is None else connections
        self.connections = tuple(Connection.parse(text) for text in spelt)
        self._check_connections()
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(size)) for name, size in self.sizes.items() if name != INPUT}
        )
        self._draw_weights()

    @property
    def state_size(self) -> int:
        return sum(self.sizes[name] for name in self.layers)

    def slices(self) -> dict[str, slice]:
        """Where each layer lies in the packed state.

        Returns:
            A slice of the last dimension for each layer.
        """
        ends = accumulate(self.sizes[name] for name in self.layers)
        return {name: slice(end - self.sizes[name], end) for name, end in zip(self.layers, ends, strict=True)}

    def inject(self, x: Tensor) -> Tensor:
        def drive(layer: str) -> Tensor:
            bias: Tensor = self.biases[layer]
            key = f"{INPUT}-{layer}"
            return functional.linear(x, self.weights[key], bias) if key in self.weights else bias.expand(len(x), -1)

        return torch.cat([drive(layer) for layer in self.layers], dim=1)

    def recurrence(self) -> Activation:
        weight = self.dense_weight()
        return lambda activity: functional.linear(activity, weight)

    def dense_weight(self) -> Tensor:
        """All recurrent weights as one matrix of the packed state, `(D, D)`, with zeros where nothing connects.

        Returns:
            The matrix, with a graph to the weights.
        """
        zeros = next(self.parameters()).new_zeros

        def block(target: str, source: str) -> Tensor:
            key = f"{source}-{target}"
            return self.weights[key] if key in self.weights else zeros(self.sizes[target], self.sizes[source])

        return torch.cat([torch.cat([block(row, column) for column in self.layers], dim=1) for row in self.layers])

    def read_out(self, u: Tensor) -> Tensor:
        slices = self.slices()
        if self.readout == "mse":
            return self.phi(u[:, slices[OUTPUT]])
        sources = [c.source for c in self.connections if c.target == OUTPUT]
        parts = [functional.linear(self.phi(u[:, slices[s]]), self.weights[f"{s}-{OUTPUT}"]) for s in sources]
        logits: Tensor = torch.stack(parts).sum(0) + self.biases[OUTPUT]
        return logits

    def linear_read_out(self) -> tuple[slice, Tensor | None, Tensor | None]:
        slices = self.slices()
        if self.readout == "mse":
            return slices[OUTPUT], None, None
        sources = [c.source for c in self.connections if c.target == OUTPUT]
        places = {source: slices[source] for source in sources}
        units = slice(min(place.start for place in places.values()), max(place.stop for place in places.values()))
        # Zeros for layers between the sources that have no part in it.
        weight = self.biases[OUTPUT].new_zeros(self.sizes[OUTPUT], units.stop - units.start)
        for source, place in places.items():
            weight[:, place.start - units.start : place.stop - units.start] = self.weights[f"{source}-{OUTPUT}"]
        return units, weight, self.biases[OUTPUT]

    def metric(self, u: Tensor) -> Tensor:
        layers = self.layer_metric(u)
        return super().metric(u) if layers is None else super().metric(u) * layers

    def layer_metric(self, like: Tensor) -> Tensor | None:
        """The factor of the metric that depends on the layer alone, 1 in the last one; `None` if it is 1 in all.

        Args:
            like: Gives dtype and device.

        Returns:
            Tensor of shape `(D,)`.
        """
        if self.feedback == 1:
            return None
        depth = range(len(self.layers) - 1, -1, -1)
        sizes = [self.sizes[name] for name in self.layers]
        return torch.cat([like.new_full((n,), self.feedback**k) for k, n in zip(depth, sizes, strict=True)])

    def connection_angles(self) -> dict[str, float]:
        return {
            str(pair): rounded_angle(self.weights[str(pair)], self.weights[str(pair.reverse)].T)
            for pair in self._reciprocal()
        }

    def _reciprocal(self) -> list[Connection]:
        """The forward connection of each reciprocal pair."""
        placed = {connection: k for k, connection in enumerate(self.connections)}
        return [c for c in self.connections if placed.get(c.reverse, -1) > placed[c]]

    def _draw_weights(self) -> None:
        backward = {pair.reverse for pair in self._reciprocal()}
        for connection in self.connections:
            source, target = self.sizes[connection.source], self.sizes[connection.target]
            if connection in backward:
                forward = self.weights[str(connection.reverse)].detach().T
                # Of `target * source` entries of the size that any weight from this source has.
                own = self.gain * target**0.5 if self.backward_norm == "fan-in" else None
                weight = weight_at_angle(forward, self.angle, f"the weight of connection '{connection}'", own)
            else:
                recurrent = {connection.source, connection.target} <= set(self.layers)
                weight = torch.randn(target, source) * ((self.gain if recurrent else 1.0) / source**0.5)
            self.weights[str(connection)] = nn.Parameter(weight.contiguous())

    def _check_connections(self) -> None:
        if len(set(self.connections)) < len(self.connections):
            raise InvalidOptionError(f"a connection is named twice in {[str(c) for c in self.connections]}.")
        for connection in self.connections:
            for name in (connection.source, connection.target):
                if name not in self.sizes:
                    raise InvalidOptionError(f"connection '{connection}': {unknown_name('layer', name, self.sizes)}")
            if connection.target == INPUT:
                raise InvalidOptionError(f"connection '{connection}': the input is not part of the state.")
            if self.readout == "softmax" and (
                connection.source == OUTPUT or (connection.target == OUTPUT and connection.source == INPUT)
            ):
                raise InvalidOptionError(
                    f"connection '{connection}': with readout='softmax' the output is outside the state, a linear "
                    "function of layers in it. Use readout='mse' to have it in the state."
                )
        if not any(c.target == OUTPUT for c in self.connections):
            raise InvalidOptionError(f"no connection leads to {OUTPUT!r}.")


def chain(sizes: Mapping[str, int], layers: Sequence[str]) -> list[str]:
    """The default wiring: each layer to the next, and back where both are in the state.

    Args:
        sizes: Layers, in order.
        layers: Those that are part of the state.

    Returns:
        The connections, forward before backward.

    Example:
        >>> chain({"in": 4, "l1": 3, "out": 2}, ["l1", "out"])
        ['in-l1', 'l1-out', 'out-l1']
    """
    names = list(sizes)
    steps = list(pairwise(names))
    return [f"{a}-{b}" for a, b in steps] + [f"{b}-{a}" for a, b in steps if a in layers and b in layers]


def _check_sizes(sizes: dict[str, int]) -> None:
    names = list(sizes)
    if len(names) < 3 or names[0] != INPUT or names[-1] != OUTPUT:
        raise InvalidOptionError(
            f"sizes must name the layers in order, from '{INPUT}' over at least one hidden one to '{OUTPUT}', "
            f"not {names}."
        )
    for name, size in sizes.items():
        check_count(f"the size of layer {name!r}", size)
        if "-" in name or "." in name:
            raise InvalidOptionError(f"the name of layer {name!r} must not contain '-' or '.'.")
