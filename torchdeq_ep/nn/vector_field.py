"""Vector-field networks of Laborieux & Zenke (arXiv 2309.02214) as maps for torchdeq.

Neurons have a potential `u` and an activity `phi(u)`, and connections carry activity to potentials:

    f(u) = damping * u + (1 - damping) * (W phi(u) + drive),        drive = U x + b.

Forward and backward weights between two layers are independent parameters. With `D = diag phi'(u)`, the Jacobian
`damping I + (1 - damping) W D` is not symmetric even if `W` is. With the metric `M = D^-1`, what counts for equilibrium
propagation is `J M`: `(1 - damping) W` and a diagonal. `metric` of a network is this `M`. `nudge_metric`, the same for
nudges, makes EP the papers', who nudge potentials by `dL/dphi`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdeq import get_deq

from torchdeq_ep.errors import InvalidOptionError, unknown_name
from torchdeq_ep.nn.activations import shifted_sigmoid, steepness
from torchdeq_ep.nn.pooling import softmax_pool, transposed_softmax_pool

Activation = Callable[[Tensor], Tensor]
Readout = Literal["mse", "softmax"]

_INPUT, _OUTPUT = "in", "out"
_FLATTEST = 1e-4
_WINDOW = (2, 2, 1)  # of height, width and channels


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


def weight_at_angle(weight: Tensor, degrees: float) -> Tensor:
    """A random tensor of the same shape and norm as another, at a given angle to it.

    Args:
        weight: The other one; of at least two entries unless the angle is 0.
        degrees: The angle between the two as vectors.

    Returns:
        `cos(a) w + sin(a) n`, with a Gaussian `n` made orthogonal to `w` and given its norm.

    Example:
        >>> weight = torch.randn(4, 3)
        >>> angle_between(weight, weight_at_angle(weight, 30.0))
        30.0
    """
    wide = weight.double()
    noise = torch.randn_like(wide)
    for _ in range(2):  # a second time for what rounding left
        noise = noise - (noise * wide).sum() / wide.square().sum() * wide
    noise = noise * (wide.norm() / noise.norm()) if degrees else torch.zeros_like(wide)
    radians = math.radians(degrees)
    return (math.cos(radians) * wide + math.sin(radians) * noise).to(weight.dtype)


def angle_between(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors as vectors, in degrees, rounded to a thousandth.

    Args:
        a: One.
        b: The other, of the same shape.

    Returns:
        0 to 180.

    Example:
        >>> angle_between(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
        45.0
    """
    a, b = a.detach().double() / a.detach().double().norm(), b.detach().double() / b.detach().double().norm()
    # Unlike the arc cosine, exact at small angles too.
    return round(math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm()))), 3)


class VectorField(nn.Module, ABC):
    """Base class: a packed state, damping, a torchdeq DEQ, and a read-out.

    A network derives from it by defining `state_size`, `inject`, `recurrence`, `read_out` and `connection_angles`.

    Args:
        phi: Activation.
        damping: Share of the old state kept in each step, at least 0 and less than 1.
        gain: Factor of the initial recurrent weights.
        angle: Initial angle in degrees, 0 to 90, between backward and forward weights.
        readout: `"mse"` or `"softmax"`.
        deq_options: Options of `torchdeq.get_deq`.

    Raises:
        InvalidOptionError: If an option is out of range.

    Example:
        >>> issubclass(VectorFieldMLP, VectorField)
        True
    """

    def __init__(
        self, phi: Activation, damping: float, gain: float, angle: float, readout: Readout, deq_options: dict[str, Any]
    ) -> None:
        super().__init__()
        if not 0 <= damping < 1:
            raise InvalidOptionError(f"damping must be at least 0 and less than 1, not {damping!r}.")
        if not gain > 0:
            raise InvalidOptionError(f"gain must be positive, not {gain!r}.")
        if not 0 <= angle <= 90:
            raise InvalidOptionError(f"angle must be between 0 and 90 degrees, not {angle!r}.")
        if readout not in ("mse", "softmax"):
            raise InvalidOptionError(unknown_name("readout", readout, ("mse", "softmax")))
        self.phi = phi
        self.damping = damping
        self.gain = gain
        self.angle = angle
        self.readout = readout
        self.deq = get_deq(**{"f_max_iter": 60, "f_tol": 1e-4, "f_stop_mode": "rel", "ift": True} | deq_options)

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Entries of the state of one sample."""

    @abstractmethod
    def inject(self, x: Tensor) -> Tensor:
        """The drive of all potentials, computed once: what inputs and biases contribute. Of shape `(B, D)`.

        Args:
            x: Inputs.
        """

    @abstractmethod
    def recurrence(self) -> Activation:
        """What the recurrent connections contribute to all potentials, as a function of all activities."""

    @abstractmethod
    def read_out(self, u: Tensor) -> Tensor:
        """Logits of potentials: activities of the output layer, or a linear function of those of the layers below.

        Args:
            u: Potentials.

        Returns:
            Tensor of shape `(B, classes)`.
        """

    @abstractmethod
    def connection_angles(self) -> dict[str, float]:
        """Angle in degrees between the forward weight and the transposed backward weight of each reciprocal pair."""

    def initial_state(self, batch: int) -> Tensor:
        """Potentials of zero.

        Args:
            batch: Number of samples.

        Returns:
            Tensor of shape `(B, D)`.
        """
        return next(self.parameters()).new_zeros(batch, self.state_size)

    def map(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The map of the state for a batch of inputs, to be iterated by any solver.

        Args:
            x: Inputs.

        Returns:
            `f(u)`, of shape `(B, D)` for `u` of that shape.
        """
        drive, recurrence = self.inject(x), self.recurrence()

        def f(u: Tensor) -> Tensor:
            target = recurrence(self.phi(u)) + drive
            return target if self.damping == 0 else torch.lerp(target, u, self.damping)

        return f

    def metric(self, u: Tensor) -> Tensor:
        """Diagonal of the metric `M = 1 / |phi'(u)|`, for homeostasis and the limit of small nudges.

        With it equilibrium propagation is exact if every connection has a reverse one of transposed weight, for a `phi`
        that rises everywhere. Flat parts of `phi` are taken for a slope of 1e-4, since larger entries would drown the
        others in rounding.

        Args:
            u: Potentials.

        Returns:
            Tensor of the same shape, positive.
        """
        return 1 / steepness(self.phi, u.detach(), _FLATTEST)

    def nudge_metric(self, u: Tensor) -> Tensor:
        """The same metric for nudges: of saturated units too, and in the scale of the drive.

        It is `(1 - damping) / |phi'(u)|`. A nudge by `beta dL/du` in it is one of the drive by `beta dL/dphi`, the
        papers', and an absolute amplitude means the same whatever the damping. At complex potentials the sign of the
        slope is that at the real part.

        Args:
            u: Potentials, real or complex.

        Returns:
            Tensor of the same shape.
        """
        # A slope of zero is one below rounding. Where the cotangent was taken, it may be one above.
        return (1 - self.damping) / steepness(self.phi, u.detach(), torch.finfo(u.dtype).eps)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss that the read-out stands for, averaged over the batch.

        Args:
            logits: What `forward` returned.
            labels: Class of each sample.

        Returns:
            Cross-entropy, or half the squared distance from the one-hot label.
        """
        if self.readout == "softmax":
            return functional.cross_entropy(logits, labels)
        target = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return 0.5 * (logits - target).square().sum() / len(logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the equilibrium.

        Args:
            x: Inputs.

        Returns:
            Tensor of shape `(B, classes)`.
        """
        states, _ = self.deq(self.map(x), self.initial_state(len(x)))
        return self.read_out(states[-1])


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
            are equal.
        feedback: Strength of backward relative to forward weights for which `metric` makes EP exact: it divides `M` of
            each layer by this number relative to the layer below. Homeostasis with that metric then shrinks backward
            weights to `feedback` times the transposed forward ones; at the start the norms are equal all the same.
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
        readout: Readout = "mse",
        **deq_options: Any,
    ) -> None:
        super().__init__(phi, damping, gain, angle, readout, deq_options)
        if not feedback > 0:
            raise InvalidOptionError(f"feedback must be positive, not {feedback!r}.")
        self.feedback = feedback
        self.sizes = dict(sizes)
        _check_sizes(self.sizes)
        outside = {_INPUT} | ({_OUTPUT} if readout == "softmax" else set())
        self.layers = tuple(name for name in self.sizes if name not in outside)
        spelt = chain(self.sizes, self.layers) if connections is None else connections
        self.connections = tuple(Connection.parse(text) for text in spelt)
        self._check_connections()
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(size)) for name, size in self.sizes.items() if name != _INPUT}
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
            key = f"{_INPUT}-{layer}"
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
            return self.phi(u[:, slices[_OUTPUT]])
        sources = [c.source for c in self.connections if c.target == _OUTPUT]
        parts = [functional.linear(self.phi(u[:, slices[s]]), self.weights[f"{s}-{_OUTPUT}"]) for s in sources]
        logits: Tensor = torch.stack(parts).sum(0) + self.biases[_OUTPUT]
        return logits

    def metric(self, u: Tensor) -> Tensor:
        return super().metric(u) * self.layer_metric(u)

    def nudge_metric(self, u: Tensor) -> Tensor:
        return super().nudge_metric(u) * self.layer_metric(u)

    def layer_metric(self, like: Tensor) -> Tensor:
        """The factor of the metric that depends on the layer alone, 1 in the last one: a row of the state's size.

        Args:
            like: Gives dtype and device.

        Returns:
            Tensor of shape `(D,)`.
        """
        depth = range(len(self.layers) - 1, -1, -1)
        sizes = [self.sizes[name] for name in self.layers]
        return torch.cat([like.new_full((n,), self.feedback**k) for k, n in zip(depth, sizes, strict=True)])

    def connection_angles(self) -> dict[str, float]:
        return {
            str(pair): angle_between(self.weights[str(pair)], self.weights[str(pair.reverse)].T)
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
                weight = weight_at_angle(forward, self.angle)
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
            if connection.target == _INPUT:
                raise InvalidOptionError(f"connection '{connection}': the input is not part of the state.")
            if self.readout == "softmax" and (
                connection.source == _OUTPUT or (connection.target == _OUTPUT and connection.source == _INPUT)
            ):
                raise InvalidOptionError(
                    f"connection '{connection}': with readout='softmax' the output is outside the state, a linear "
                    "function of layers in it. Use readout='mse' to have it in the state."
                )
        if not any(c.target == _OUTPUT for c in self.connections):
            raise InvalidOptionError(f"no connection leads to {_OUTPUT!r}.")


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
    if len(names) < 3 or names[0] != _INPUT or names[-1] != _OUTPUT:
        raise InvalidOptionError(
            f"sizes must name the layers in order, from '{_INPUT}' over at least one hidden one to '{_OUTPUT}', "
            f"not {names}."
        )
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise InvalidOptionError(f"layer {name!r} must have a whole number of at least 1 unit, not {size!r}.")
        if "-" in name or "." in name:
            raise InvalidOptionError(f"the name of layer {name!r} must not contain '-' or '.'.")


class VectorFieldCNN(VectorField):
    """Convolutional layers with softmax pooling and transposed top-down paths of independent weights; softmax read-out.

    Layer `i` is driven by `pool(conv(s[i-1], w_i))` from below. From above, the activity of layer `i + 1` goes back
    through the transpose of that path at the present activities, with the weight `b` in place of `w`. At an angle of 0
    the field is the gradient of `sum_i <s_i, pool(conv(s[i-1], w_i))>`, and equilibrium propagation with the metric is
    exact.

    Args:
        image: Channels, height and width of the input; height and width are divisible by 2 for each layer.
        channels: Channels of each layer, e.g. 32, 64, 128.
        n_classes: Number of classes.
        phi: Activation.
        damping: Share of the old state kept in each step.
        gain: Factor of the initial weights between layers of the state.
        angle: Initial angle between backward and forward weights, in degrees.
        kernel_size: Size of the convolutions, odd.
        temperature: Of the softmax pooling.
        **deq_options: Options of `torchdeq.get_deq`.

    Raises:
        InvalidOptionError: If an option is out of range.

    Example:
        >>> model = VectorFieldCNN((1, 8, 8), (4, 6), 10, angle=90.0)
        >>> model(torch.zeros(2, 1, 8, 8)).shape, model.connection_angles()
        (torch.Size([2, 10]), {'l1-l2': 90.0})
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        channels: Sequence[int] = (32, 64, 128),
        n_classes: int = 10,
        *,
        phi: Activation = shifted_sigmoid,
        damping: float = 0.5,
        gain: float = 0.5,
        angle: float = 0.0,
        kernel_size: int = 3,
        temperature: float = 1.0,
        **deq_options: Any,
    ) -> None:
        super().__init__(phi, damping, gain, angle, "softmax", deq_options)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InvalidOptionError(f"kernel_size must be odd and at least 1, not {kernel_size!r}.")
        if not channels or any(extent % 2 ** len(channels) for extent in image[1:]):
            raise InvalidOptionError(
                f"an image of {image[1]} x {image[2]} cannot be halved once for each of {len(channels)} layers."
            )
        self.image = image
        self.temperature = temperature
        self.shapes = [(c, image[1] >> k, image[2] >> k) for k, c in enumerate(channels, start=1)]
        widths = [image[0], *channels]
        forward = [
            torch.randn(wide, narrow, kernel_size, kernel_size) / (narrow * kernel_size**2) ** 0.5 * (gain if k else 1)
            for k, (narrow, wide) in enumerate(pairwise(widths))
        ]
        self.forward_weights = nn.ParameterList(nn.Parameter(w) for w in forward)
        self.backward_weights = nn.ParameterList(nn.Parameter(weight_at_angle(w, angle)) for w in forward[1:])
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(c, 1, 1)) for c in channels)
        self.head = nn.Linear(math.prod(self.shapes[-1]), n_classes)

    @property
    def state_size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def inject(self, x: Tensor) -> Tensor:
        bottom = self._up(x, self.forward_weights[0])
        rest = [x.new_zeros(len(x), *shape) for shape in self.shapes[1:]]
        return self._pack([a + b for a, b in zip([bottom, *rest], self.biases, strict=True)])

    def recurrence(self) -> Activation:
        forward, backward = list(self.forward_weights)[1:], list(self.backward_weights)

        def field(activity: Tensor) -> Tensor:
            states = self.unpack(activity)
            fields = [torch.zeros_like(state) for state in states]
            for k, (w, b) in enumerate(zip(forward, backward, strict=True)):
                below, above = states[k], states[k + 1]
                fields[k + 1] = fields[k + 1] + self._up(below, w)
                fields[k] = fields[k] + self._down(below, above, b)
            return self._pack(fields)

        return field

    def unpack(self, state: Tensor) -> list[Tensor]:
        """The packed state as one tensor of shape `(B, C, H, W)` for each layer.

        Args:
            state: Of shape `(B, D)`.

        Returns:
            The layers in order.
        """
        parts = torch.split(state, [math.prod(shape) for shape in self.shapes], dim=1)
        return [
            part.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
            for part, (channels, height, width) in zip(parts, self.shapes, strict=True)
        ]

    def _pack(self, layers: Sequence[Tensor]) -> Tensor:
        # Channels last, since convolutions and pooling are faster so.
        return torch.cat([layer.permute(0, 2, 3, 1).flatten(1) for layer in layers], dim=1)

    def read_out(self, u: Tensor) -> Tensor:
        logits: Tensor = self.head(self.phi(u[:, -math.prod(self.shapes[-1]) :]))
        return logits

    def connection_angles(self) -> dict[str, float]:
        pairs = zip(list(self.forward_weights)[1:], self.backward_weights, strict=True)
        return {f"l{k}-l{k + 1}": angle_between(w, b) for k, (w, b) in enumerate(pairs, start=1)}

    def _up(self, below: Tensor, weight: Tensor) -> Tensor:
        convolved = functional.conv2d(below, weight, padding="same").permute(0, 2, 3, 1)
        return softmax_pool(convolved, _WINDOW, temperature=self.temperature, n_dims=3).permute(0, 3, 1, 2)

    def _down(self, below: Tensor, above: Tensor, weight: Tensor) -> Tensor:
        """The transpose of `_up` at `below`, of `above`."""
        convolved = functional.conv2d(below, weight, padding="same").permute(0, 2, 3, 1)
        cotangent = above.permute(0, 2, 3, 1)
        spread = transposed_softmax_pool(convolved, cotangent, _WINDOW, self.temperature, n_dims=3)
        return functional.conv_transpose2d(spread.permute(0, 3, 1, 2), weight, padding=weight.shape[-1] // 2)
