"""Random maps, modes and amplitudes: is a wrong error vector ever silent, and a right one ever warned about?

Each draw is a fresh map without history, so everything that is measured once is measured here. The error is that of the
error vector, against a dense solve of the limit of the mode in float64, at the very state that the mode was given.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

import torchdeq_ep as tep
from torchdeq_ep.errors import EPError, EPWarning
from torchdeq_ep.jacobian import dense_jacobian

LARGE, SMALL, TOLD = 0.1, 0.01, 0.05
"""A wrong error vector, a right one, and the reported number that tells one from the other."""
WELL_POSED = 0.1
"""Smallest singular value of `I - J` from which on a small residual is a small error."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": lambda u: functional.gelu(u, approximate="tanh"),
    "steep sigmoid": lambda u: torch.sigmoid(4 * u),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUDGED = (
    "ep-one-sided",
    "ep",
    "ep-richardson",
    "ep-richardson:order=6",
    "hep:n_points=4",
    "hep:n_points=6",
    "hep:n_points=8",
    "aep",
)
LINEAR = ("ift", "ep-infinitesimal")


@dataclass(frozen=True)
class Draw:
    """One draw, and what came of it; NaN where nothing did.

    Args:
        activation: Of the map `act(W z + x)`.
        dtype: Of the state and of all products.
        mode: A spec.
        beta: Its amplitude, or `"auto"`.
        contraction: Spectral radius of `J` would be this if every unit had a slope of 1.
        smallest: Smallest singular value of `I - J`.
        error: Of the error vector, relative, against the limit of the mode.
        exact_error: The same against the exact adjoint.
        nudge_error: As reported, and so are the next four.
        residual: Of the solve.
        inconsistency: Of the two derivatives.
        rounding: Of `f`.
        adjoint_residual: Of the error vector in the exact equation.
        warned: The classes of the warnings.
        refused: The class of the error that was raised.
    """

    activation: str
    dtype: str
    mode: str
    beta: float | str
    contraction: float
    smallest: float
    error: float = math.nan
    exact_error: float = math.nan
    nudge_error: float = math.nan
    residual: float = math.nan
    inconsistency: float = math.nan
    rounding: float = math.nan
    adjoint_residual: float = math.nan
    warned: tuple[str, ...] = ()
    refused: str = ""

    @property
    def is_silent(self) -> bool:
        """Wrong, and nothing says so."""
        numbers = (self.nudge_error, self.inconsistency, self.rounding, self.residual)
        told = self.warned or self.refused or any(number > TOLD for number in numbers)
        return self.error > LARGE and not told

    @property
    def is_false_alarm(self) -> bool:
        """Right, and warned about."""
        return self.error < SMALL and bool(self.warned)


def draws(count: int, seed: int = 0) -> Iterable[Draw]:
    """As many draws, each with an equilibrium.

    Args:
        count: How many.
        seed: Of everything random.

    Yields:
        The draws.
    """
    chance = random.Random(seed)
    found = 0
    while found < count:
        draw = _drawn(chance)
        if draw is not None:
            found += 1
            yield draw


def _drawn(chance: random.Random) -> Draw | None:
    name, dtype = chance.choice(list(ACTIVATIONS)), chance.choice(list(DTYPES))
    linear = chance.random() < 0.15
    mode = chance.choice(LINEAR if linear else [m for m in NUDGED if name != "relu" or not m.startswith("hep")])
    beta: float | str = "auto" if linear or chance.random() < 0.4 else 10 ** chance.uniform(-7, math.log10(3))
    contraction = chance.uniform(0.3, 1.2)
    torch.manual_seed(chance.randrange(2**31))
    batch, width = chance.randint(1, 4), chance.randint(4, 20)
    weight = torch.randn(width, width, dtype=torch.float64)
    weight = contraction * weight / torch.linalg.eigvals(weight).abs().max()
    drive, cotangent = torch.randn(2, batch, width, dtype=torch.float64)
    low = DTYPES[dtype]
    weight, drive, cotangent = (t.to(low).double() for t in (weight, drive, cotangent))
    act = ACTIVATIONS[name]

    def exactly(z: Tensor) -> Tensor:
        return act(z @ weight.T + drive)

    z = _equilibrium(exactly, torch.zeros(batch, width, dtype=torch.float64))
    if z is None:
        return None
    z = z.to(low)

    def as_computed(z: Tensor) -> Tensor:
        return act(z @ weight.to(low).T + drive.to(low))

    # With ReLU, which units are on is decided in the dtype of the map, and its derivative is then exact in it.
    jacobian = dense_jacobian(as_computed, z) if name == "relu" else dense_jacobian(exactly, z.double())
    jacobian = jacobian.double()
    system = torch.eye(z.numel(), dtype=torch.float64) - jacobian
    smallest = float(torch.linalg.matrix_norm(system, -2))
    draw = Draw(name, dtype, mode, beta, contraction, smallest)
    if smallest < 1e-6:
        return draw
    adjoint = torch.linalg.solve(system.T, cotangent.flatten())
    limit = adjoint if mode in ("aep", "ift") else torch.linalg.solve(system, cotangent.flatten())
    return _tried(draw, as_computed, z, cotangent.to(low), limit, adjoint)


def _tried(
    draw: Draw, f: Callable[[Tensor], Tensor], z: Tensor, cotangent: Tensor, limit: Tensor, adjoint: Tensor
) -> Draw:
    reports: list[tep.NudgeReport] = []
    shift = torch.zeros_like(z, requires_grad=True)  # its gradient is the error vector itself
    options = {} if draw.beta == "auto" else {"beta": draw.beta}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attached = tep.attach(
                lambda v: f(v) + shift, z, tep.get_backward(draw.mode, **options), writer=reports.append
            )
            attached.backward(cotangent)
        except EPError as error:
            return Draw(**{**asdict(draw), "refused": type(error).__name__})
    said = tuple(dict.fromkeys(w.category.__name__ for w in caught if issubclass(w.category, EPWarning)))
    (report,) = reports
    vector = shift.grad.double().flatten() if shift.grad is not None else torch.full_like(limit, math.nan)
    measured = {
        "error": float((vector - limit).norm() / limit.norm()),
        "exact_error": float((vector - adjoint).norm() / adjoint.norm()),
        "warned": said,
        **{
            each: getattr(report, each)
            for each in ("nudge_error", "residual", "inconsistency", "rounding", "adjoint_residual")
        },
    }
    return Draw(**{**asdict(draw), **measured})


def _equilibrium(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor | None:
    """By damped steps and then Newton's, in float64; `None` where that finds none."""
    for _ in range(200):
        z = 0.5 * z + 0.5 * f(z)
    for _ in range(8):
        jacobian = torch.func.jacrev(f)(z).reshape(z.numel(), z.numel())
        step, status = torch.linalg.solve_ex(torch.eye(z.numel(), dtype=z.dtype) - jacobian, (f(z) - z).flatten())
        if int(status) or not bool(torch.isfinite(step).all()):
            return None
        z = z + step.reshape(z.shape)
    return z if float((f(z) - z).norm()) < 1e-9 * float(z.norm()) else None
