"""Losses of a linear read-out of the state, whose gradient is known in closed form, for nudges by the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from torchdeq_ep._options import check_choice
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.holomorphic.linear import linear, matmul
from torchdeq_ep.holomorphic.normalization import softmax
from torchdeq_ep.nn.activations import Activation, has_closed_slope, value_and_slope

LossKind = Literal["cross-entropy", "squared-error"]
_IGNORED = -100
"""The label that `torch.nn.functional.cross_entropy` leaves out."""


@dataclass(frozen=True, eq=False)
class ReadoutLoss:
    """The loss of a linear read-out of some units of a state of shape `(B, D)`, to be given to `nudge_loss`.

    It is an ordinary function from the state to a scalar, and knows its gradient in closed form besides. So a
    [nudge by the loss][torchdeq_ep.nudge_loss] takes neither autograd nor a pass through units that the loss does not
    depend on. Without `weight` the units themselves are the read-out.

    Args:
        kind: `"cross-entropy"`, the mean over the batch; or `"squared-error"`, half the squared distance from the
            target, the mean over the batch.
        target: Labels of shape `(B,)`, or probabilities or values of shape `(B, outputs)`.
        units: Which entries of the last dimension of the state are read.
        phi: Activation between state and read-out; one whose slope is known:
            [`shifted_sigmoid`][torchdeq_ep.nn.shifted_sigmoid], [`dsilu`][torchdeq_ep.nn.dsilu],
            [`shifted_dsilu`][torchdeq_ep.nn.shifted_dsilu], `torch.tanh`, `torch.sigmoid`, or `None`.
        weight: Of shape `(outputs, units)`.
        bias: Of shape `(outputs,)`.

    Raises:
        InvalidOptionError: If an argument is not acceptable.

    Example:
        >>> loss = ReadoutLoss("squared-error", torch.tensor([[1.0, 0.0]]), units=slice(1, 3))
        >>> state = torch.tensor([[5.0, 3.0, 4.0]])
        >>> loss(state), loss.gradient(state[:, 1:3])
        (tensor(10.), tensor([[2., 4.]]))
    """

    kind: LossKind
    target: Tensor
    units: slice = field(default_factory=partial(slice, None))
    phi: Activation | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    _made: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(LossKind))
        if self.phi is not None and not has_closed_slope(self.phi):
            raise InvalidOptionError(
                f"the slope of {self.phi!r} is not known in closed form: give nudge_loss a function of the state "
                "instead."
            )
        if self.kind == "squared-error" and not self.target.is_floating_point():
            raise InvalidOptionError(
                f"the target of a squared error is made of values, not of {self.target.dtype}: for labels, use "
                "functional.one_hot(labels, classes).to(z.dtype)."
            )
        if self.weight is not None and self.weight.dim() != 2:
            raise InvalidOptionError(f"weight must be of shape (outputs, units), not {tuple(self.weight.shape)}.")
        if self.bias is not None and self.weight is None:
            raise InvalidOptionError("a bias is that of a read-out with a weight, and there is none.")

    def __call__(self, z: Tensor) -> Tensor:
        """The loss of a state, with its graph."""
        x = z[..., self.units]
        outputs = x if self.phi is None else self.phi(x)
        if self.weight is not None:
            outputs = functional.linear(outputs, self.weight, self.bias)
        if self.kind == "cross-entropy":
            return functional.cross_entropy(outputs, self.target)
        return 0.5 * (outputs - self.target).square().sum() / len(outputs)

    def gradient(self, x: Tensor) -> Tensor:
        """The derivative by the units that are read, in closed form: at complex states the holomorphic one.

        Args:
            x: The units, of shape `(..., B, units)`, real or complex.

        Returns:
            Tensor of the same shape, without a graph.
        """
        x = x.detach()
        value, slope = (x, None) if self.phi is None else value_and_slope(self.phi, x)
        weight, bias = (None if t is None else t.detach().to(x.dtype.to_real()) for t in (self.weight, self.bias))
        outputs = value if weight is None else linear(value, weight, bias)
        share, wanted = self._weighted_target(outputs)
        if self.kind == "squared-error":
            error = outputs * share - wanted
        else:
            error = (softmax(outputs, -1) if outputs.is_complex() else torch.softmax(outputs, -1)) * share - wanted
        if weight is not None:
            error = matmul(error, weight) if error.is_complex() else error @ weight
        return error if slope is None else error * slope

    def _weighted_target(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each sample in the loss, of shape `(B, 1)`, and the targets times that: made once."""
        key = (outputs.shape[-1], outputs.dtype.to_real())
        if key not in self._made:
            classes, dtype = key
            if self.target.is_floating_point():
                target, weights = self.target.detach().to(dtype), torch.ones_like(self.target[..., :1], dtype=dtype)
            else:
                kept = self.target != _IGNORED
                weights = kept.to(dtype).unsqueeze(-1)
                target = functional.one_hot(self.target.masked_fill(~kept, 0), classes).to(dtype) * weights
            share = weights / weights.sum()
            wanted = target * share
            # The gradient of soft labels that do not sum to 1 is what cross_entropy's is.
            self._made[key] = (wanted.sum(-1, keepdim=True) if self.kind == "cross-entropy" else share), wanted
        return self._made[key]
