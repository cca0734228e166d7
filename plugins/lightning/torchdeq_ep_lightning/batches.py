"""Batches of images in an order and with augmentations that depend on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchdeq_ep_lightning.images import Images, StreamedImages

Indices = tuple[int, Tensor]


class EpochBatches:
    """Rows of each batch of an epoch, and of each the share of one process.

    Args:
        n: Number of images.
        batch: Images in a batch, over all processes.
        seed: Seed of the order; `None` for the given order, and a last batch that may be smaller.
        rank: Which process this is.
        world: How many there are.

    Example:
        >>> [rows.tolist() for epoch, rows in EpochBatches(5, 2, None, rank=0, world=1)]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, n: int, batch: int, seed: int | None, rank: int, world: int) -> None:
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.epoch, self.start = 0, 0

    @property
    def sampler(self) -> EpochBatches:
        """This object: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as that epoch does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // self.batch) if self.seed is None else self.n // self.batch

    def __iter__(self) -> Iterator[Indices]:
        if self.seed is None:
            order = torch.arange(self.n)
        else:
            order = torch.randperm(self.n, generator=_generator(self.seed, self.epoch, 0))
        for k in range(self.start, len(self)):
            yield self.epoch, order[k * self.batch : (k + 1) * self.batch][self.rank :: self.world]


class ResumableLoader(DataLoader[Any]):
    """A loader that can go on after any batch: Lightning saves its place in a checkpoint, and gives it back."""

    def __init__(self, rows: Samples, batches: EpochBatches, workers: int) -> None:
        super().__init__(
            rows,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_identity,
            persistent_workers=workers > 0,
        )
        self._start, self._taken = 0, 0

    def __iter__(self) -> Any:
        batches: Any = self.batch_sampler
        batches.start, self._start = self._start % len(batches), 0
        for self._taken, batch in enumerate(super().__iter__(), batches.start + 1):
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch have been taken."""
        return {"batches": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind so many batches."""
        self._start = self._taken = state["batches"]


class Samples(Dataset[Any]):
    """Whole batches of images by their rows, scaled, augmented and normalised."""

    def __init__(
        self,
        images: Images | StreamedImages,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool,
        crop: int,
        seed: int,
    ) -> None:
        self.images, self.flip, self.crop, self.seed = images, flip, crop, seed
        self.mean, self.std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitems__(self, indices: Indices) -> tuple[Tensor, Tensor]:
        epoch, rows = indices
        x = self.images.take(rows)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.flip or self.crop:
            flips, shifts = self._draws(epoch)
            x = augment(x, flips[rows] & self.flip, shifts[rows], self.crop)
        return (x - self.mean) / self.std, self.images.labels[rows]

    def _draws(self, epoch: int) -> tuple[Tensor, Tensor]:
        # For all images at once: what happens to one does not depend on the batch or the process it is in.
        if self._drawn is None or self._drawn[0] != epoch:
            generator = _generator(self.seed, epoch, 1)
            flips = torch.rand(len(self), generator=generator) < 0.5
            shifts = torch.randint(2 * self.crop + 1, (len(self), 2), generator=generator)
            self._drawn = epoch, flips, shifts
        return self._drawn[1:]


def augment(x: Tensor, flips: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Mirror some images, and crop each from its padded self.

    Args:
        x: Images, shape `(B, C, H, W)`.
        flips: Which to mirror, boolean of shape `(B,)`.
        shifts: Upper left corners of the crops, shape `(B, 2)`, from 0 to twice the padding.
        padding: Pixels of zeros on each side.

    Returns:
        Images of the same shape.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> augment(x, torch.tensor([True]), torch.tensor([[1, 1]]), 1)
        tensor([[[[2., 1.],
                  [4., 3.]]]])
        >>> augment(x, torch.tensor([False]), torch.tensor([[0, 1]]), 1)
        tensor([[[[0., 0.],
                  [1., 2.]]]])
    """
    _, channels, height, width = x.shape
    x = torch.where(flips[:, None, None, None], x.flip(-1), x)
    padded = functional.pad(x, [padding] * 4)
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.arange(width)
    images = torch.arange(len(x))[:, None, None, None]
    return padded[images, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + purpose)


def _identity(batch: Any) -> Any:
    return batch
