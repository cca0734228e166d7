"""The law of a diode, as SPICE has it: Shockley's, with a parallel conductance, and temperatures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOLTZMANN_PER_CHARGE = 1.38064852e-23 / 1.6021766208e-19
"""`k / q` in volts per kelvin, with the constants of ngspice."""

ZERO_CELSIUS = 273.15

NOMINAL = 27.0
"""The temperature in degrees Celsius at which saturation currents are given, SPICE's `TNOM`."""

THERMAL_VOLTAGE = BOLTZMANN_PER_CHARGE * (NOMINAL + ZERO_CELSIUS)
"""`k T / q` at 27 degrees Celsius."""

GMIN = 1e-12
"""Conductance in parallel to each diode, as in SPICE."""

_GAP, _EXPONENT = 1.11, 3.0  # SPICE's EG in volts, and XTI
_KNEE = 3.0  # in units of the slope: below minus that SPICE has a cubic in place of the exponential


@dataclass(frozen=True)
class DiodeLaw:
    """Current, conductance and co-content of a diode at a voltage.

    `I = IS (exp(v / (N V_T)) - 1) + GMIN v`, and below `-3 N V_T` ngspice's `-IS (1 + (3 N V_T / (e v))^3) + GMIN v`.
    Beyond currents that no circuit has, 1e12 amperes in single and 1e102 in double precision, the exponential goes on
    as a line, so that a search for an equilibrium never overflows.

    Args:
        saturation: `IS` at the temperature of the diode, in amperes.
        slope: `N V_T`, in volts.

    Example:
        >>> law = DiodeLaw.at(saturation=1e-12, ideality=1.0)
        >>> round(law.current(torch.tensor([0.6], dtype=torch.float64)).item(), 4)
        0.0119
    """

    saturation: float
    slope: float

    @classmethod
    def at(cls, saturation: float, ideality: float, temperature: float = NOMINAL) -> DiodeLaw:
        """The law at a temperature.

        Args:
            saturation: Saturation current at 27 degrees Celsius, in amperes.
            ideality: Ideality factor.
            temperature: In degrees Celsius.

        Returns:
            The law, with the saturation current that SPICE's silicon diode has at that temperature.
        """
        ratio = (temperature + ZERO_CELSIUS) / (NOMINAL + ZERO_CELSIUS)
        slope = ideality * THERMAL_VOLTAGE * ratio
        growth = (ratio - 1) * _GAP / slope + _EXPONENT / ideality * math.log(ratio)
        return cls(saturation * math.exp(growth), slope)

    def current(self, v: Tensor) -> Tensor:
        """The current, in amperes, of the shape of the voltages."""
        exponent = v / self.slope
        bounded = exponent.clamp_max(self._largest(v.dtype))
        at_bound = self.saturation * torch.exp(bounded)
        forward = self.saturation * torch.expm1(bounded) + at_bound * (exponent - bounded)
        backward = -self.saturation * (1 + self._cubic(v))
        return torch.where(exponent < -_KNEE, backward, forward) + GMIN * v

    def conductance(self, v: Tensor) -> Tensor:
        """`dI / dv`, in siemens: positive."""
        exponent = v / self.slope
        forward = self.saturation * torch.exp(exponent.clamp_max(self._largest(v.dtype))) / self.slope
        backward = 3 * self._cubic(v) / v.clamp_max(-_KNEE * self.slope)
        return torch.where(exponent < -_KNEE, self.saturation * backward, forward) + GMIN

    def content(self, v: Tensor) -> Tensor:
        """The integral of the current over the voltage, up to a constant, in watts."""
        exponent = v / self.slope
        bounded = exponent.clamp_max(self._largest(v.dtype))
        beyond = exponent - bounded
        forward = self.slope * (self.saturation * torch.exp(bounded)) * (1 + beyond + beyond**2 / 2)
        reach = v.clamp_max(-_KNEE * self.slope)
        backward = (self._cubic(v) * reach - self.slope * math.exp(-_KNEE)) / 2
        content = torch.where(exponent < -_KNEE, self.saturation * backward, forward)
        return content - self.saturation * v + GMIN * v**2 / 2

    def _cubic(self, v: Tensor) -> Tensor:
        """`(3 N V_T / (e v))^3` below the knee, and its value at the knee above it."""
        return (_KNEE * self.slope / math.e / v.clamp_max(-_KNEE * self.slope)) ** 3

    def within_reach(self, v: Tensor, change: Tensor, parallel: Tensor) -> Tensor:
        """How far a step of Newton's method should take a diode, as a share of the step, in (0, 1].

        Above the voltage at which it conducts as well as what is parallel to it, the current of a diode grows by its
        exponential, and its voltage only by a logarithm: SPICE's limit of junction voltages (Nagel 1975), with the
        critical voltage that belongs to the circuit.

        Args:
            v: The voltages before the step.
            change: What the step adds to them, of the same shape.
            parallel: Conductance of the resistors at the diode, in siemens, of a shape that broadcasts.

        Returns:
            The shares.
        """
        critical = self.slope * torch.log(parallel * self.slope / self.saturation)
        base = torch.maximum(v, critical)
        beyond = (v + change - base).clamp_min(0.0)
        excess = beyond - self.slope * torch.log1p(beyond / self.slope)
        return torch.where(beyond > 0, 1 - excess / change, 1.0)

    def _largest(self, dtype: torch.dtype) -> float:
        """The exponent beyond which the law goes on as a line."""
        largest = math.log(torch.finfo(dtype).max)
        return min(largest / 3 - math.log(self.saturation), largest - 2)
