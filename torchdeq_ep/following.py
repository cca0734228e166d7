"""The autograd node of modes that differentiate steps: the layer's value, with the gradient of the end of a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.modes import NudgeReport
from torchdeq_ep.modes.steps import Path, StepwiseMode
from torchdeq_ep.recording import Recording, recorded, recording_of
from torchdeq_ep.relaxation.reversing import ReversibleRun
from torchdeq_ep.state import FrozenStatistics, Map, Memory, Packing, norm


@dataclass
class Followed:
    """One backward pass through steps, for its report.

    What arrives at the state that the steps started from is what the gradient leaves out. Relative to the cotangent it
    is the adjoint residual: `v = sum_(i < k) B^i g` leaves `v - J^T v - g = -B^k g`, which is just that.

    Args:
        mode: The mode.
        packing: Of the state.
        memory: Of the layer.
        recordings: Of the state, through the first value and beside it.
        writer: Called with the report.
        history: What the solver left.
        calls: Further calls of the map that the mode made.
    """

    mode: StepwiseMode
    packing: Packing
    memory: Memory
    recordings: tuple[Recording | None, ...]
    writer: Callable[[NudgeReport], None] | None
    history: object = None
    calls: int = 0
    size: float = 0.0
    arrived: list[Tensor] = field(default_factory=list)

    def begin(self, cotangent: Tensor) -> None:
        """At the start of the pass: whoever sees what arrives is to keep it.

        Args:
            cotangent: `g`.
        """
        self.size = norm(cotangent)
        self.arrived.clear()
        self.memory.passes += 1
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
        self.arrived.append(first if len(cotangents) == 1 else self.packing.pack(cotangents, "J^T v"))

    def deliver(self) -> None:
        """At the end of the pass: hand the report out."""
        residual = math.nan
        if self.arrived and self.size > 0:
            residual = norm(torch.stack([t.flatten() for t in self.arrived]).sum(0)) / self.size
            self.memory.certify(residual)
        self.arrived.clear()
        if self.writer is not None:
            steps, error = self.calls, 0.0
            if isinstance(self.history, ReversibleRun):
                steps, error = 2 * self.history.steps, self.history.error
            report = NudgeReport(repr(self.mode), calls=2 * steps, iterations=steps, residual=error, solved=error)
            self.writer(replace(report, adjoint_residual=residual))


def follow(
    path: Path,
    returned: Tensor,
    mode: StepwiseMode,
    packing: Packing,
    memory: Memory,
    recording: Recording | None,
    writer: Callable[[NudgeReport], None] | None,
) -> Tensor:
    """The value of a layer, with the gradient of the state that a mode comes to.

    Args:
        path: Where the mode starts; its `z` detached.
        returned: The value of the layer.
        mode: The mode.
        packing: Of the state.
        memory: Of the layer.
        recording: Of the state at which the value of the path was taken, if any.
        writer: Called with the report of each backward pass.

    Returns:
        A new tensor.
    """
    start = path.z if recording is None else recorded(path.z)
    counted = _Counted(path.f)
    with FrozenStatistics():
        end = mode.follow(Path(counted, start, path.value, path.history, memory))
    followed = Followed(mode, packing, memory, (recording, recording_of(start)), writer, path.history, counted.calls)
    connected: Tensor = _ValueOf.apply(followed, returned.detach(), end)  # type: ignore[no-untyped-call]
    return connected


class _Counted:
    def __init__(self, f: Map) -> None:
        self._f = f
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self._f(z)


class _ValueOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, followed: Followed, returned: Tensor, end: Tensor) -> Tensor:
        ctx.followed = followed
        return returned.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, Tensor]:
        ctx.followed.begin(cotangent)
        return None, None, cotangent
