"""Is a map analytic near a state, and how far out? A Cauchy-Riemann test, and Taylor coefficients on a circle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError, NotHolomorphicError
from torchdeq_ep.holomorphic.context import Piecewise, mode
from torchdeq_ep.state import norm

_POINTS = 32


_HALVINGS = 12


_SIDES = (1, 1j, -1, -1j)


_LEAKAGE = 1e-2


@dataclass(frozen=True)
class AnalyticityReport:
    """What [`check`][torchdeq_ep.holomorphic.check] found.

    Args:
        analytic: Whether the map passed.
        defect: Largest relative Cauchy-Riemann defect: the part of the derivative that is linear in the conjugate of
            the direction, relative to the whole; infinite if the map could not be evaluated.
        radius: Largest relative amplitude, in units of the norm of the state, at which a contour is safe: the distance
            to the nearest singularity seen along the sampled directions; `inf` for polynomials, 0 if not analytic.
        reason: Why the map failed, empty if it passed.

    Example:
        >>> report = AnalyticityReport(False, 1.0, 0.0, "its derivatives disagree")
        >>> bool(report)
        False
    """

    analytic: bool
    defect: float
    radius: float
    reason: str = ""

    def __bool__(self) -> bool:
        return self.analytic


def check(
    f: Callable[..., Any],
    z: Tensor,
    *,
    amplitude: float = 0.05,
    directions: int = 3,
    piecewise: Piecewise | None = None,
    tol: float | None = None,
    seed: int = 0,
) -> AnalyticityReport:
    """Tests whether `f` is analytic near a state, and estimates how large a contour around it may be.

    The rules of the mode make an analytic map of analytic operations. What they cannot see is code that leaves PyTorch,
    or a registered rule that is wrong. This test sees any map: at random complex points near `z` it compares the
    derivatives along a direction and along `i` times that direction.

    Args:
        f: A function from one tensor to one tensor; evaluated inside the mode.
        z: A real state at which `f` is finite.
        amplitude: How far from `z` the points are, relative to the norm of `z`.
        directions: Number of random points, and of random directions from `z`.
        piecewise: As for [`mode`][torchdeq_ep.holomorphic.mode].
        tol: Largest defect to accept; by default what rounding and finite differences leave, 1e-6 in double and 2e-2
            in single precision. Run the test in double precision if you can.
        seed: Of the random directions; the global random state is left alone.

    Returns:
        The report; it is true if `f` is analytic.

    Raises:
        InvalidOptionError: If `z` is not real, or a number is not positive.

    Example:
        >>> z = torch.linspace(-1, 1, 5, dtype=torch.float64)
        >>> report = check(lambda z: torch.tanh(2 * z), z)
        >>> report.analytic, 0.1 < report.radius < 1
        (True, True)
        >>> check(lambda z: z.abs(), z).reason[:42]
        'Tensor.abs is only piecewise analytic. It '
    """
    if not z.is_floating_point():
        raise InvalidOptionError(f"z must be a real floating state, not {z.dtype}.")
    for name, value in (("amplitude", amplitude), ("directions", directions)):
        if not value > 0:
            raise InvalidOptionError(f"{name} must be positive, not {value!r}.")
    probe = _Probe(f, z.detach(), piecewise, seed)
    try:
        with torch.no_grad():
            defect = max(probe.defect(amplitude) for _ in range(directions))
            limit = tol if tol is not None else (1e-6 if z.dtype == torch.float64 else 2e-2)
            if not defect <= limit:
                reason = f"its derivatives along u and along iu disagree by {defect:.1e}, more than {limit:.0e}"
                return AnalyticityReport(False, defect, 0.0, reason)
            return AnalyticityReport(True, defect, min(probe.radius(amplitude) for _ in range(directions)))
    except NotHolomorphicError as error:
        return AnalyticityReport(False, math.inf, 0.0, str(error))


class _Probe:
    """`f` at complex states around `z`, along random directions of the norm of `z`."""

    def __init__(self, f: Callable[..., Any], z: Tensor, piecewise: Piecewise | None, seed: int) -> None:
        self._f, self._z, self._piecewise = f, z, piecewise
        self._generator = torch.Generator(z.device).manual_seed(seed)
        self._scale = norm(z) or math.sqrt(z.numel())

    def _direction(self, dtype: torch.dtype) -> Tensor:
        u = torch.randn(self._z.shape, dtype=dtype, device=self._z.device, generator=self._generator)
        return torch.mul(u, self._scale / torch.linalg.vector_norm(u))

    def _value(self, state: Tensor) -> Tensor:
        with mode(self._piecewise):
            value = self._f(state)
        if not value.is_complex():
            raise NotHolomorphicError(
                "f returned a real tensor at a complex state: something in it drops the imaginary part"
            )
        return value  # type: ignore[no-any-return]

    def defect(self, amplitude: float) -> float:
        """The antilinear part of the derivative at a random point, relative to the derivative."""
        dtype = self._z.dtype.to_complex()
        point = self._z + amplitude * self._direction(dtype)
        u = self._direction(dtype)
        # Fourth-order accurate on the cross of four steps; the optimum of rounding against truncation.
        step = amplitude * torch.finfo(self._z.dtype).eps ** 0.2
        values = [self._value(point + step * side * u) for side in _SIDES]
        linear = sum(value / side for value, side in zip(values, _SIDES, strict=True))
        antilinear = sum(value * side for value, side in zip(values, _SIDES, strict=True))
        assert isinstance(linear, Tensor)
        assert isinstance(antilinear, Tensor)
        largest = torch.linalg.vector_norm(linear)
        if largest == 0:
            return 0.0
        return float(torch.linalg.vector_norm(antilinear) / largest)

    def radius(self, amplitude: float) -> float:
        """Distance to the nearest singularity along a real direction, in units of the norm of `z`.

        On a circle within the disc of convergence the Fourier coefficients of `f` are its Taylor coefficients times a
        power of the radius, and those of negative frequency vanish. The rate of decay gives the radius of convergence.
        """
        u = self._direction(self._z.dtype)
        angles = torch.arange(_POINTS, dtype=torch.float64) * (2 * math.pi / _POINTS)
        for _ in range(_HALVINGS):
            points = [self._z + amplitude * complex(math.cos(t), math.sin(t)) * u for t in angles.tolist()]
            spectrum = torch.fft.fft(torch.stack([self._value(point) for point in points]), dim=0) / _POINTS
            sizes = torch.linalg.vector_norm(spectrum.reshape(_POINTS, -1), dim=1).double()
            taylor, negative = sizes[1 : _POINTS // 2], sizes[_POINTS // 2 :]
            if bool(torch.isfinite(sizes).all()) and negative.max() <= _LEAKAGE * taylor.max():
                return amplitude * self._growth(taylor, sizes)
            amplitude /= 2
        return 0.0

    def _growth(self, taylor: Tensor, sizes: Tensor) -> float:
        """How many times larger the circle could be: from the slope of the logarithm of the coefficients."""
        noise = 10 * torch.finfo(self._z.dtype).eps * float(sizes.max())
        visible = [k for k in range(len(taylor)) if float(taylor[k]) > noise]
        tail = [k for k in visible if k >= 2]
        if len(tail) < 3:
            return math.inf
        x = torch.tensor(tail, dtype=torch.float64)
        y = torch.log(taylor[tail])
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        return math.exp(-slope)
