"""The autograd node of modes that differentiate steps: the layer's value, with the gradient of the end of a path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.closing import is_in_batch
from torchdeq_ep.layer import Layer
from torchdeq_ep.modes import NudgeReport
from torchdeq_ep.modes.steps import Path, StepwiseMode
from torchdeq_ep.recording import Recording, recorded, recording_of
from torchdeq_ep.relaxation.reversing import ReversibleRun
from torchdeq_ep.state import CountedMap, FrozenStatistics, norm


@dataclass
class Followed:
    """One backward pass through steps, for its report.

    What arrives at the state that the steps started from is what the gradient leaves out. Relative to the cotangent it
    is the adjoint residual: `v = sum_(i < k) B^i g` leaves `v - J^T v - g = -B^k g`, which is just that.

    Args:
        layer: The layer.
        recordings: Of the state, through the first value and beside it.
        calls: Further calls of the map that the mode made.
    """

    layer: Layer
    recordings: tuple[Recording | None, ...]
    calls: int
    size: float = 0.0
    arrived: list[Tensor] = field(default_factory=list)

    def begin(self, cotangent: Tensor) -> None:
        """At the start of the pass: whoever sees what arrives is to keep it.

        Args:
            cotangent: `g`.
        """
        self.size = norm(cotangent)
        self.arrived.clear()
        self.layer.memory.passes += 1
        for recording in self.recordings:
            if recording is not None:
                recording.taker = self.take
        torch.autograd.Variable._execution_engine.queue_callback(self.deliver)

    def take(self, cotangents: Sequence[Tensor]) -> None:
        """Keep what arrived.

        Args:
            cotangents: As the state has them.
        """
        first = cotangents[0]
        self.arrived.append(first if len(cotangents) == 1 else self.layer.packing.pack(cotangents, "J^T v"))

    def deliver(self) -> None:
        """At the end of the pass: hand the report out."""
        residual = math.nan
        if self.arrived and self.size > 0:
            residual = norm(torch.stack([t.flatten() for t in self.arrived]).sum(0)) / self.size
            self.layer.memory.certify(residual)
        self.arrived.clear()
        if self.layer.writer is not None:
            steps, error, history = self.calls, 0.0, self.layer.history
            if isinstance(history, ReversibleRun):
                steps, error = 2 * history.steps, history.error
            report = NudgeReport(repr(self.layer.mode), calls=2 * steps, iterations=steps, residual=error, solved=error)
            self.layer.writer(replace(report, adjoint_residual=residual))


def follow(
    layer: Layer, mode: StepwiseMode, free_state: Tensor, value: Tensor, returned: Tensor, recording: Recording | None
) -> Tensor:
    """The value of a layer, with the gradient of the state that its mode comes to.

    Args:
        layer: The layer.
        mode: Its mode.
        free_state: Packed `z*`, detached.
        value: `f(z*)`, with its graph to parameters and inputs.
        returned: The tensor whose values the result has.
        recording: Of the state at which the value was taken, if any.

    Returns:
        A new tensor.
    """
    start = free_state if recording is None else recorded(free_state)
    counted = CountedMap(layer.f)
    with FrozenStatistics():
        end = mode.follow(Path(counted, start, value, layer.history, layer.memory))
    followed = Followed(layer, (recording, recording_of(start)), counted.calls)
    connected: Tensor = _ValueOf.apply(followed, returned.detach(), end)  # type: ignore[no-untyped-call]
    return connected


class _ValueOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, followed: Followed, returned: Tensor, end: Tensor) -> Tensor:
        ctx.followed = followed
        return returned.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, Tensor]:
        if not is_in_batch(cotangent):  # a stack of passes has no one residual
            ctx.followed.begin(cotangent)
        return None, None, cotangent
