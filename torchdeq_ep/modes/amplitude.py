"""How large the nudges of one solve are: relative to the state, absolute, and beside the rounding of `f`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.modes.stencils import Node, Stencil

ForceScale = Literal["relative", "absolute"]
"""Whether `beta` is in the unit `|z*| / |M g|`, or taken as it is."""

_VISIBLE = 0.5


@dataclass(frozen=True)
class Amplitude:
    """A stencil at an equilibrium, where its `beta` has a size.

    Args:
        stencil: With a number for `beta`.
        scale: How that number is meant.
        unit: `|z*| / |M g|`, by which a relative amplitude is multiplied ([eq. (9)][eq-9]).
        eps: Relative difference of two values of `f` that may be rounding.
        noise: Relative rounding error of one call of `f`, in the mean.

    Example:
        >>> amplitude = Amplitude(Stencil.symmetric(0.1), "relative", unit=20.0, eps=1e-7)
        >>> amplitude.relative, amplitude.absolute, amplitude.nodes
        (0.1, 2.0, (0.1, -0.1))
        >>> f"{amplitude.rounding:.0e}"
        '1e-06'
    """

    stencil: Stencil
    scale: ForceScale
    unit: float
    eps: float
    noise: float = 0.0

    @property
    def relative(self) -> float:
        """`beta` in the unit of relative amplitudes."""
        beta = float(self.stencil.beta)
        return beta if self.scale == "relative" else beta / self.unit

    @property
    def absolute(self) -> float:
        """What the force `M g` is multiplied by at a node of modulus `beta`."""
        return float(self.stencil.beta) * self.factor

    @property
    def factor(self) -> float:
        """What a node of the stencil is multiplied by to be an absolute amplitude."""
        return self.unit if self.scale == "relative" else 1.0

    @property
    def rounding(self) -> float:
        """What rounding of `f` leaves in the estimate at worst, relative to the force."""
        return self.stencil.noise_gain * self.eps / self.relative

    @property
    def expected_rounding(self) -> float:
        """What it leaves in the mean, for errors of the nodes that have nothing to do with each other."""
        return self.stencil.mean_noise_gain * self.noise / self.relative

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that need solving, see [`upper_half`][torchdeq_ep.Stencil.upper_half]."""
        return self.stencil.upper_half()[0]

    @property
    def tol(self) -> float:
        """Residual of a displacement below which rounding is all that is left."""
        return max(2 * self.rounding, 100 * self.eps)

    @property
    def floor(self) -> float:
        """Residual of the displacement at the smallest node that rounding may leave."""
        return 100 * (self.eps / (self.relative * min(abs(node) for node in self.stencil.unit_nodes)))

    def for_displacement(self, growth: float) -> Amplitude:
        """The amplitude that moves the state as far as this one would if the displacement were as large as the force.

        Args:
            growth: `|d| / |M g|`.

        Returns:
            A new amplitude, or this one where the displacement is the smaller of the two.
        """
        return self if growth <= 1 else self.divided(growth)

    def divided(self, factor: float) -> Amplitude:
        """The same at a smaller one.

        Args:
            factor: How many times smaller.

        Returns:
            A new amplitude.
        """
        return replace(self, stencil=self.stencil.at(float(self.stencil.beta) / factor))

    def at(self, relative: float) -> Amplitude:
        """The same at another one.

        Args:
            relative: In the unit of relative amplitudes.

        Returns:
            A new amplitude.
        """
        return self.divided(self.relative / relative)

    def made_visible(self) -> Amplitude:
        """The smallest amplitude that is not lost in the rounding of the state, or this one if it is larger.

        Returns:
            A new amplitude, or this one.
        """
        return self if self.rounding <= _VISIBLE else self.divided(_VISIBLE / self.rounding)

    def require_visible(self) -> None:
        """Refuse a nudge that is lost in the rounding of the state.

        Raises:
            InvalidOptionError: If so.
        """
        if self.rounding >= 1:
            raise InvalidOptionError(
                f"a nudge of relative amplitude {self.relative:.1e} is lost in the rounding of f, which is "
                f"{self.eps:.0e}: the error vector would be noise. Use beta='auto', or at least "
                f"{100 * self.stencil.noise_gain * self.eps:.0e}."
            )
