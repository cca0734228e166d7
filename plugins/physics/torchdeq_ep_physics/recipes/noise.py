"""Gradients that an instrument with read noise and converters measures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import torchdeq_ep as tep
from torchdeq_ep.errors import TruncationWarning
from torchdeq_ep_physics.drawing import INK, TONES, figure, save_figure
from torchdeq_ep_physics.recipes.circuits import gradients, load, logits
from torchdeq_ep_physics.resistive import ResistiveNetwork

Stencils = Callable[[Any], tep.Stencil]

AMPLITUDES = tuple(10 ** (-2.5 + 0.25 * k) for k in range(11))
STENCILS: dict[str, Stencils] = {
    "one-sided": tep.Stencil.one_sided,
    "symmetric": tep.Stencil.symmetric,
    "richardson": tep.Stencil.richardson,
}


@dataclass
class NoisyInstrument:
    """A network as an instrument measures it: read noise, and converters for the voltages read and the currents set.

    Args:
        solve: The network.
        noise: Standard deviation of a reading, in volts.
        bits: Of both converters; `None` for ideal ones.
        volts: Largest voltage that is read.
        amperes: Largest current that is set; what is stronger is cut off.
        seed: Of the noise.
    """

    solve: Callable[[Tensor], Tensor]
    noise: float = 0.0
    bits: int | None = None
    volts: float = 1.0
    amperes: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, current: Tensor) -> Tensor:
        """A reading under an injected current."""
        injected = self._converted(current, self.amperes)
        if self.last is None or not torch.equal(self.last[0], injected):  # repeats differ by their noise alone
            self.last = injected, self.solve(injected)
        state = self.last[1]
        noise = torch.randn(state.shape, generator=self.generator, dtype=state.dtype)
        return self._converted(state + self.noise * noise, self.volts)

    def _converted(self, values: Tensor, largest: float) -> Tensor:
        if self.bits is None:
            return values
        step = 2 * largest / 2**self.bits
        return cast(Tensor, (step * (values / step).round()).clamp(-largest, largest))


def instrument(
    amplitudes: Sequence[float] = AMPLITUDES,
    *,
    noise: float = 1e-3,
    bits: int | None = 12,
    repeats: int = 4,
    draws: int = 4,
    path: str | None = None,
) -> dict[str, list[float]]:
    """Which stencil and amplitude give the best gradient on an instrument with read noise and converters.

    Args:
        amplitudes: Relative to the state, in the response scale.
        noise: Standard deviation of a reading, in volts.
        bits: Of the converters.
        repeats: Readings of each state.
        draws: Gradients that an error is averaged over.
        path: Where to draw the errors.

    Returns:
        The relative error of the gradient for each stencil and amplitude; `"auto"`, of the symmetric stencil with the
        automatic amplitude: its amplitude and its error; and `"amplitudes"`.
    """
    bench = _Bench(noise, bits, repeats)

    def mean(make: Stencils, beta: float | Literal["auto"]) -> tuple[float, float]:
        """Error and amplitude, each averaged over the draws."""
        error, amplitude = zip(*(bench.measure(make(beta), seed) for seed in range(draws)), strict=True)
        return sum(error) / draws, sum(amplitude) / draws

    errors = {"amplitudes": list(amplitudes)}
    for name, make in STENCILS.items():
        errors[name] = [mean(make, beta)[0] for beta in amplitudes]
    error, beta = mean(tep.Stencil.symmetric, "auto")
    errors["auto"] = [beta, error]
    if path is not None:
        converters = "ideal converters" if bits is None else f"{bits}-bit converters"
        _draw(errors, f"read noise {1e3 * noise:g} mV, {converters}, {repeats} readings", path)
    return errors


class _Bench:
    """A circuit on an instrument, and the exact gradient of a loss of its free state."""

    def __init__(self, noise: float, bits: int | None, repeats: int) -> None:
        self.noise, self.bits, self.repeats = noise, bits, repeats
        data = load("iris")
        self.x, y = data.x[:10], data.y[:10]
        self.network = ResistiveNetwork.layered(
            self.x.shape[1], 16, 6, generator=torch.Generator().manual_seed(0), backward="ift"
        )
        self.exact = gradients(self.network, self.x, y, 3, self.network(self.x))
        z = self.network(self.x)
        (self.cotangent,) = torch.autograd.grad(cross_entropy(logits(self.network, z, 3), y), z)
        self.free = z.detach()

    def measure(self, stencil: tep.Stencil, seed: int) -> tuple[float, float]:
        """The relative error of one gradient, and the amplitude of its nudges."""
        reports: list[tep.EquilibriumReport] = []
        theta = self.network.physical()

        def solve(current: Tensor) -> Tensor:
            return self.network.equilibrium(self.x, current, theta, start=self.free)

        z = tep.attach_equilibrium(
            NoisyInstrument(solve, self.noise, self.bits, seed=seed),
            self.network.force,
            theta,
            self.x,
            stencil=stencil,
            scale="response",
            repeats=self.repeats,
            check=False,  # readings and currents that are cut off do not obey the law, and are part of the picture
            writer=reports.append,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            # One cotangent for all, so that the errors are those of the nudges.
            found = torch.cat(torch.autograd.grad(z, list(self.network.parameters()), self.cotangent))
        return float((found - self.exact).norm() / self.exact.norm()), reports[0].beta


def _draw(errors: dict[str, list[float]], title: str, path: str) -> None:
    """The errors of `instrument` against the amplitude."""
    drawn, axes = figure(width=6.5)
    for name, tone in zip(STENCILS, TONES, strict=False):
        axes.loglog(errors["amplitudes"], errors[name], "o-", color=tone, markersize=3, label=name)
    axes.loglog(*([value] for value in errors["auto"]), "*", color=INK, markersize=12, label="symmetric, beta='auto'")
    axes.set(xlabel="amplitude, relative to the state", ylabel="relative error of the gradient", title=title)
    axes.legend(frameon=False, labelcolor=INK)
    save_figure(drawn, path)
