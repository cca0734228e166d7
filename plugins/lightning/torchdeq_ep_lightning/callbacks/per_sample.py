"""The amplitude of the papers: that of the nudge of each sample by its own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from torchdeq_ep import EquilibriumPropagation, NudgeReport, Stencil
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import Derivative, Equilibrium, Mode


@dataclass(frozen=True)
class PerSample(Mode):
    """A mode of equilibrium propagation whose amplitude multiplies the gradient of each sample's own loss.

    The papers nudge every sample by `beta dL_sample/dphi`. Where the loss is a mean over the batch, this is the
    absolute amplitude `beta` times the number of samples.

    The samples are the rows of the state, or of each of its tensors. Several tensors that have not as many rows each,
    two at least, are refused: how many samples they hold, nothing tells.

    Args:
        mode: The mode, with a number for `beta`.
        scale: Returns the factor that multiplies the loss, by which the amplitude is divided.
    """

    mode: EquilibriumPropagation
    scale: Callable[[], float]

    @property
    def derivative(self) -> Derivative | None:
        return self.mode.derivative

    @property
    def assumes_symmetry(self) -> bool:
        return self.mode.assumes_symmetry

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        stencil = cast(Stencil, self.mode.stencil)
        beta = float(stencil.beta) * _samples(equilibrium) / self.scale()
        return replace(self.mode, stencil=stencil.at(beta), scale="absolute").solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return self.solve(equilibrium)


def _samples(equilibrium: Equilibrium) -> int:
    """How many samples a state holds, at least 1: one in a batch without any, whose nudge is zero."""
    if equilibrium.rows is not None:
        return equilibrium.rows.count
    z = equilibrium.z
    if z.dim() == 1 and len(z) > 1:  # one tensor of that shape would have rows
        raise InvalidOptionError(
            "amplitude='per-sample' needs the number of samples, which a state of several or of complex tensors "
            "shows only if each tensor has one row for each sample, and at least two. Give it that form, drop batches "
            "of one sample (drop_last=True), or use amplitude='absolute' with beta times the number of samples."
        )
    return max(z.shape[0], 1) if z.dim() else 1
