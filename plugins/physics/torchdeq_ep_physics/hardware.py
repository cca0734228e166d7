"""What real devices do to conductances: levels, bounds, pulses, mismatch, drift.

Each is a parametrisation of the trained logarithms, to be registered with torch's own
`torch.nn.utils.parametrize.register_parametrization(network, "log_conductance", ...)`. They compose in the order in
which they are registered, and fit every parameter that is kept as a logarithm. The noise of readings is
[`NoisyInstrument`][torchdeq_ep_physics.recipes.NoisyInstrument]'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.extend import check_count


class Quantised(nn.Module):
    """Conductances of `2^bits` levels, evenly spaced between two bounds. The gradient passes straight through.

    What lies beyond a bound is at it, and has no gradient that leads further out.

    Args:
        bits: Of each conductance.
        low: The lowest level, in siemens.
        high: The highest.

    Raises:
        InvalidOptionError: If there is no level, or the bounds are no interval of positive numbers.

    Example:
        >>> levels = Quantised(2, 1.0, 4.0)
        >>> levels(torch.tensor([0.1, 1.4, 2.6, 9.0]).log()).exp().round()
        tensor([1., 1., 3., 4.])
    """

    def __init__(self, bits: int, low: float, high: float) -> None:
        super().__init__()
        check_count("bits", bits, 1)
        self.bits, (self.low, self.high) = bits, _interval(low, high)

    def forward(self, log_conductance: Tensor) -> Tensor:
        bounded = log_conductance.clamp(math.log(self.low), math.log(self.high))
        step = (self.high - self.low) / (2**self.bits - 1)
        level = self.low + step * ((bounded.exp() - self.low) / step).round()
        written: Tensor = bounded + (level.clamp(self.low, self.high).log() - bounded).detach()
        return written


class Mismatch(nn.Module):
    """Devices that are made unequal: each conductance is what it is set to times a factor of its own, for ever.

    The factors are log-normal: the spread is the standard deviation of their logarithms.

    Args:
        count: How many devices there are.
        spread: About the relative standard deviation.
        seed: Of the factors.

    Raises:
        InvalidOptionError: If the spread is negative.

    Example:
        >>> device = Mismatch(3, 0.1)
        >>> torch.equal(device(torch.zeros(3)), device(torch.zeros(3)))
        True
    """

    factor: Tensor

    def __init__(self, count: int, spread: float, seed: int = 0) -> None:
        super().__init__()
        _not_negative("spread", spread)
        drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("factor", spread * drawn)

    def forward(self, log_conductance: Tensor) -> Tensor:
        return log_conductance + self.factor.to(log_conductance)


class Drift(nn.Module):
    """Conductances that decay after they were written, as `g(t) = g (t / t0)^-nu`: phase-change memory.

    Args:
        count: How many devices there are.
        exponent: Mean of `nu`.
        spread: Its standard deviation from device to device.
        seed: Of the devices.

    Raises:
        InvalidOptionError: If an exponent or a spread is negative.

    Example:
        >>> drift = Drift(1, 0.5)
        >>> drift.elapsed = 4.0  # in units of t0
        >>> drift(torch.zeros(1)).exp()
        tensor([0.5000])
    """

    exponents: Tensor

    def __init__(self, count: int, exponent: float, spread: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        _not_negative("exponent", exponent)
        _not_negative("spread", spread)
        drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("exponents", exponent + spread * drawn)
        self.elapsed = 1.0
        """Time since the devices were written, in units of `t0`; before `t0` nothing has drifted."""

    def forward(self, log_conductance: Tensor) -> Tensor:
        return log_conductance - self.exponents.to(log_conductance) * math.log(max(self.elapsed, 1.0))


class PulsedSGD(torch.optim.Optimizer):
    """Gradient descent by whole pulses: a device moves by so many times the same step, or not at all.

    A step of `lr * gradient` is rounded to whole pulses, by chance: so that small gradients count on average
    (Gokmen & Vlasov 2016, Front. Neurosci. 10:333). The parameter stays between its bounds.

    Args:
        parameters: What is trained, in its own units: logarithms of conductances, for instance.
        lr: Learning rate.
        pulse: By how much a pulse moves a parameter.
        low: Lower bound of the parameters.
        high: Upper bound.
        most: Largest number of pulses of a device in one step.
        seed: Of the rounding; `None` rounds to the nearest.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> weight = nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> weight.grad = torch.tensor([-0.26, 9.0])
        >>> PulsedSGD([weight], lr=1.0, pulse=0.1, low=-1.0, high=1.0, most=5, seed=None).step()
        >>> weight.data
        tensor([ 0.3000, -0.5000])
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        pulse: float,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        most: int = 31,
        seed: int | None = 0,
    ) -> None:
        for name, value in (("lr", lr), ("pulse", pulse)):
            if not 0 < value < math.inf:
                raise InvalidOptionError(f"{name} must be a positive number, not {value!r}.")
        if not low < high:
            raise InvalidOptionError(f"the bounds are no interval: {low} and {high}.")
        check_count("most", most, 1)
        super().__init__(parameters, {"lr": lr, "pulse": pulse, "low": low, "high": high, "most": most})
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Send the pulses.

        Args:
            closure: Evaluates the loss again, with its gradient.

        Returns:
            The loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                wanted = -group["lr"] * parameter.grad / group["pulse"]
                if self.generator is None:
                    pulses = wanted.round()
                else:
                    chance = torch.rand(wanted.shape, generator=self.generator, dtype=wanted.dtype)
                    pulses = (wanted + chance.to(wanted.device)).floor()
                pulses = pulses.clamp(-group["most"], group["most"])
                parameter.add_(group["pulse"] * pulses).clamp_(group["low"], group["high"])
        return loss


def _interval(low: float, high: float) -> tuple[float, float]:
    if not 0 < low < high < math.inf:
        raise InvalidOptionError(f"bounds of conductances must be 0 < low < high, not {low!r} and {high!r}.")
    return float(low), float(high)


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InvalidOptionError(f"{name} must be a number from 0 on, not {value!r}.")
