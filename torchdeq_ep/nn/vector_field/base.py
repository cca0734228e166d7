"""What the vector-field networks of Laborieux & Zenke (arXiv 2309.02214) have in common, as maps for torchdeq.

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdeq import get_deq

from torchdeq_ep._options import check_choice
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.nn.activations import Activation, has_closed_slope, steepness
from torchdeq_ep.nn.losses import ReadoutLoss

Readout = Literal["mse", "softmax"]

_FLATTEST = 1e-4


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
        >>> from torchdeq_ep.nn import VectorFieldMLP
        >>> issubclass(VectorFieldMLP, VectorField)
        True
    """

    def __init__(
        self, phi: Activation, damping: float, gain: float, angle: float, readout: Readout, deq_options: dict[str, Any]
    ) -> None:
        super().__init__()
        if not 0 <= damping < 1:
            raise InvalidOptionError(f"damping must be at least 0 and less than 1, not {damping!r}.")
        if not 0 < gain < math.inf:
            raise InvalidOptionError(f"gain must be positive and finite, not {gain!r}.")
        if not 0 <= angle <= 90:
            raise InvalidOptionError(f"angle must be between 0 and 90 degrees, not {angle!r}.")
        check_choice("readout", readout, ("mse", "softmax"))
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
        return 1 / steepness(self.phi, u, _FLATTEST)

    @property
    def nudge_metric(self) -> NudgeMetric:
        """The same metric for nudges, a function of potentials: see [`NudgeMetric`][torchdeq_ep.nn.NudgeMetric]."""
        return NudgeMetric(self)

    def layer_metric(self, like: Tensor) -> Tensor | None:
        """A factor of the metric for each entry of the state, or `None` for 1.

        Args:
            like: Gives dtype and device.

        Returns:
            Tensor of shape `(D,)`.
        """
        return None

    def linear_read_out(self) -> tuple[slice, Tensor | None, Tensor | None] | None:
        """What `read_out` does, if that is linear in the activities of neighbouring units.

        Returns:
            Those units in the state, weight and bias (`None` for the activities themselves); or `None` if it is not.
        """
        return None

    def loss_of_state(self, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """The loss as a function of the potentials, for [`nudge_loss`][torchdeq_ep.nudge_loss].

        Args:
            labels: Class of each sample.

        Returns:
            A [`ReadoutLoss`][torchdeq_ep.nn.ReadoutLoss], which knows its gradient, if the read-out is linear and the
            slope of the activation known.
        """
        known = self.linear_read_out()
        if known is None or not has_closed_slope(self.phi):
            return lambda u: self.loss(self.read_out(u), labels)
        units, weight, bias = known
        if self.readout == "softmax":
            return ReadoutLoss("cross-entropy", labels, units, self.phi, weight, bias)
        parameter = next(self.parameters())
        target = functional.one_hot(labels, len(range(*units.indices(self.state_size)))).to(parameter.dtype)
        return ReadoutLoss("squared-error", target, units, self.phi, weight, bias)

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


@dataclass(frozen=True)
class NudgeMetric:
    """The metric of a vector-field network for nudges: of saturated units too, and in the scale of the drive.

    It is `(1 - damping) / |phi'(u)|`. A nudge by `beta dL/du` in it is one of the drive by `beta dL/dphi`, the papers',
    and an absolute amplitude means the same whatever the damping. At complex potentials the sign of the slope is that
    at the real part.

    Args:
        network: The network.

    Example:
        >>> from torchdeq_ep.nn import VectorFieldMLP
        >>> network = VectorFieldMLP({"in": 4, "l1": 3, "out": 2}, damping=0.5)
        >>> network.nudge_metric(torch.full((1, 5), 0.5))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000, 0.5000]])
    """

    network: VectorField

    def __call__(self, u: Tensor) -> Tensor:
        """The diagonal of `M`, of the shape of the potentials `u`, real or complex."""
        return self.on_units(slice(None), u)(u)

    def on_units(self, units: slice, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The metric of some units as a function of their potentials alone.

        Args:
            units: Entries of the last dimension of the state.
            like: Gives dtype and device.

        Returns:
            From potentials of shape `(..., units)` to the entries of `M`.
        """
        network = self.network
        layers = network.layer_metric(torch.empty((), dtype=like.dtype.to_real(), device=like.device))

        def metric(x: Tensor) -> Tensor:
            # A slope of zero is one below rounding. Where the cotangent was taken, it may be one above.
            diagonal = (1 - network.damping) / steepness(network.phi, x, torch.finfo(x.dtype).eps)
            return diagonal if layers is None else diagonal * layers[units]

        return metric
