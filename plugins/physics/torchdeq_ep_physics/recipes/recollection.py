"""A Hopfield network that recalls pictures from spoilt ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_physics.drawing import INK, figure, save_figure
from torchdeq_ep_physics.hopfield import HopfieldNetwork

_GLYPHS = (
    ("#######", "#......", "#......", "######.", "#......", "#......", "#######"),
    ("#####..", "#....#.", "#....#.", "#####..", "#......", "#......", "#......"),
    ("#.....#", ".#...#.", "..#.#..", "...#...", "..#.#..", ".#...#.", "#.....#"),
)
_GAIN = 2.0


@dataclass(frozen=True)
class Recall:
    """What a network made of spoilt pictures.

    Args:
        cues: Overlap of each with its picture: the part of pixels that are right, less that of those that are wrong.
        recalled: Overlap of what was recalled.

    Example:
        >>> Recall((0.6,), (1.0,)).recalled
        (1.0,)
    """

    cues: tuple[float, ...]
    recalled: tuple[float, ...]


def pictures() -> Tensor:
    """The pictures that are stored: `E`, `P` and `X`, of 7 by 7 pixels.

    Returns:
        Of shape `(3, 49)`, of values 1 and -1.
    """
    pixels = [[1.0 if mark == "#" else -1.0 for row in glyph for mark in row] for glyph in _GLYPHS]
    return torch.tensor(pixels, dtype=torch.float64)


def recall(flipped: float = 0.2, *, seed: int = 0, path: str | None = None) -> Recall:
    """Store three pictures in a Hopfield network, and recall each from one with pixels flipped.

    The weights are the projection on the pictures (Personnaz et al. 1985), which stores correlated ones, too. The
    search for an equilibrium starts at the spoilt picture.

    Args:
        flipped: Part of the pixels that are flipped.
        seed: Of which they are.
        path: Where to draw pictures, cues and what was recalled.

    Returns:
        The overlaps before and after.

    Raises:
        InvalidOptionError: If the part is not between 0 and 1.
    """
    if not 0 <= flipped <= 1:
        raise InvalidOptionError(f"flipped must lie between 0 and 1, not be {flipped!r}.")
    stored = pictures()
    weight = _GAIN * stored.T @ torch.linalg.solve(stored @ stored.T, stored)
    network = HopfieldNetwork(weight)
    count = round(flipped * stored.shape[1])
    generator = torch.Generator().manual_seed(seed)
    cues = stored.clone()
    for cue in cues:
        cue[torch.randperm(len(cue), generator=generator)[:count]] *= -1
    found = network.equilibrium(torch.zeros_like(stored), start=_GAIN * cues)
    if path is not None:
        _draw(stored, cues, torch.tanh(found), path)
    return Recall(_overlaps(cues, stored), _overlaps(found, stored))


def _overlaps(states: Tensor, stored: Tensor) -> tuple[float, ...]:
    return tuple((states.sign() * stored).mean(1).tolist())


def _draw(stored: Tensor, cues: Tensor, activities: Tensor, path: str) -> None:
    drawn, axes = figure(3, len(stored), width=5.4, height=5.4)
    for row, title, states in zip(axes, ("stored", "cue", "recalled"), (stored, cues, activities), strict=True):
        for axis, state in zip(row, states, strict=True):
            axis.imshow(state.reshape(7, 7).tolist(), cmap="RdBu", vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, color=INK)
    save_figure(drawn, path)
