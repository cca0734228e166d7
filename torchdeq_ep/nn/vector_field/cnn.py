"""Convolutional vector-field networks with softmax pooling, and independent weights on the way down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdeq_ep._options import check_choice, check_count
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.nn.activations import Activation, shifted_sigmoid
from torchdeq_ep.nn.pooling import softmax_pool, transposed_softmax_pool
from torchdeq_ep.nn.vector_field.base import VectorField
from torchdeq_ep.nn.weights import rounded_angle, weight_at_angle

LastPadding = Literal["same", "valid"]
_WINDOW = (2, 2, 1)  # of height, width and channels


class VectorFieldCNN(VectorField):
    """Convolutional layers with softmax pooling and transposed top-down paths of independent weights; softmax read-out.

    Layer `i` is driven by `pool(conv(s[i-1], w_i))` from below. From above, the activity of layer `i + 1` goes back
    through the transpose of that path at the present activities, with the weight `b` in place of `w`. At an angle of 0
    the field is the gradient of `sum_i <s_i, pool(conv(s[i-1], w_i))>`, and equilibrium propagation with the metric is
    exact.

    Args:
        image: Channels, height and width of the input. Each layer halves height and width, without a rest.
        channels: Channels of each layer, e.g. 32, 64, 128.
        n_classes: Number of classes.
        phi: Activation.
        damping: Share of the old state kept in each step.
        gain: Factor of the initial weights between layers of the state.
        angle: Initial angle between backward and forward weights, in degrees.
        kernel_size: Size of the convolutions, odd.
        temperature: Of the softmax pooling.
        last_padding: `"same"` pads the last convolution as the others. `"valid"` does not, so that it makes the image
            smaller by `kernel_size - 1`, as in the papers: four layers on 32 x 32 then end in 1 x 1.
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
        last_padding: LastPadding = "same",
        **deq_options: Any,
    ) -> None:
        super().__init__(phi, damping, gain, angle, "softmax", deq_options)
        check_count("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise InvalidOptionError(f"kernel_size must be odd, not {kernel_size!r}.")
        for name, count in zip(("channels", "height", "width"), image, strict=True):
            check_count(f"the {name} of an image", count)
        for k, count in enumerate(channels, start=1):
            check_count(f"the channels of layer 'l{k}'", count)
        check_count("n_classes", n_classes)
        check_choice("last_padding", last_padding, get_args(LastPadding))
        self.image = image
        self.temperature = temperature
        self.paddings = [kernel_size // 2] * len(channels)
        if last_padding == "valid" and channels:
            self.paddings[-1] = 0
        self.shapes = _shapes(image, channels, kernel_size, self.paddings)
        widths = [image[0], *channels]
        forward = [
            torch.randn(wide, narrow, kernel_size, kernel_size) / (narrow * kernel_size**2) ** 0.5 * (gain if k else 1)
            for k, (narrow, wide) in enumerate(pairwise(widths))
        ]
        self.forward_weights = nn.ParameterList(nn.Parameter(w) for w in forward)
        self.backward_weights = nn.ParameterList(
            nn.Parameter(weight_at_angle(w, angle, f"the weight from 'l{k + 1}' to 'l{k}'"))
            for k, w in enumerate(forward[1:], start=1)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(c, 1, 1)) for c in channels)
        self.head = nn.Linear(math.prod(self.shapes[-1]), n_classes)
        # LeCun's, as all other weights have.
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)
        nn.init.zeros_(self.head.bias)

    @property
    def state_size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def inject(self, x: Tensor) -> Tensor:
        bottom = self._up(x, self.forward_weights[0], self.paddings[0])
        rest = [x.new_zeros(len(x), *shape) for shape in self.shapes[1:]]
        return self._pack([a + b for a, b in zip([bottom, *rest], self.biases, strict=True)])

    def recurrence(self) -> Activation:
        forward, backward = list(self.forward_weights)[1:], list(self.backward_weights)

        def field(activity: Tensor) -> Tensor:
            states = self.unpack(activity)
            fields = [torch.zeros_like(state) for state in states]
            for k, (w, b, padding) in enumerate(zip(forward, backward, self.paddings[1:], strict=True)):
                below, above = states[k], states[k + 1]
                fields[k + 1] = fields[k + 1] + self._up(below, w, padding)
                fields[k] = fields[k] + self._down(below, above, b, padding)
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

    def linear_read_out(self) -> tuple[slice, Tensor | None, Tensor | None]:
        return slice(self.state_size - self.head.in_features, self.state_size), self.head.weight, self.head.bias

    def connection_angles(self) -> dict[str, float]:
        pairs = zip(list(self.forward_weights)[1:], self.backward_weights, strict=True)
        return {f"l{k}-l{k + 1}": rounded_angle(w, b) for k, (w, b) in enumerate(pairs, start=1)}

    def _up(self, below: Tensor, weight: Tensor, padding: int) -> Tensor:
        convolved = functional.conv2d(below, weight, padding=padding).permute(0, 2, 3, 1)
        return softmax_pool(convolved, _WINDOW, temperature=self.temperature, n_dims=3).permute(0, 3, 1, 2)

    def _down(self, below: Tensor, above: Tensor, weight: Tensor, padding: int) -> Tensor:
        """The transpose of `_up` at `below`, of `above`."""
        convolved = functional.conv2d(below, weight, padding=padding).permute(0, 2, 3, 1)
        cotangent = above.permute(0, 2, 3, 1)
        spread = transposed_softmax_pool(convolved, cotangent, _WINDOW, self.temperature, n_dims=3)
        return functional.conv_transpose2d(spread.permute(0, 3, 1, 2), weight, padding=padding)


def _shapes(
    image: tuple[int, int, int], channels: Sequence[int], kernel_size: int, paddings: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Channels, height and width of each layer."""
    shapes: list[tuple[int, int, int]] = []
    height, width = image[1:]
    for count, padding in zip(channels, paddings, strict=True):
        height, width = (extent - kernel_size + 1 + 2 * padding for extent in (height, width))
        if min(height, width) < 2 or height % 2 or width % 2:
            break
        height, width = height // 2, width // 2
        shapes.append((count, height, width))
    if not channels or len(shapes) < len(channels):
        raise InvalidOptionError(
            f"an image of {image[1]} x {image[2]} cannot be halved once for each of {len(channels)} layers"
            + (
                "."
                if not channels or paddings[-1] == kernel_size // 2
                else f", the last one behind a convolution of {kernel_size} that is not padded."
            )
        )
    return shapes
