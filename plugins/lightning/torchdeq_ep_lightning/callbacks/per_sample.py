"""The amplitude of the papers: that of the nudge of each sample by its own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from torchdeq_ep import EquilibriumPropagation, NudgeReport, Stencil
from torchdeq_ep.extend import Equilibrium, Mode


@dataclass(frozen=True)
class PerSample(Mode):
    """A mode of equilibrium propagation whose amplitude multiplies the gradient of each sample's own loss.

    The papers nudge every sample by `beta dL_sample/dphi`. Where the loss is a mean over the batch, this is the
    absolute amplitude `beta` times the number of samples.

    Args:
        mode: The mode, with a number for `beta`.
        scale: Returns the factor that multiplies the loss, by which the amplitude is divided.
    """

    mode: EquilibriumPropagation
    scale: Callable[[], float]

    def solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        stencil = cast(Stencil, self.mode.stencil)
        beta = float(stencil.beta) * equilibrium.z.shape[0] / self.scale()
        return replace(self.mode, stencil=stencil.at(beta), scale="absolute").solve(equilibrium)

    def _solve(self, equilibrium: Equilibrium) -> tuple[Tensor, NudgeReport]:
        return self.solve(equilibrium)
