"""Labelled images: in memory, or decoded as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchdeq_ep.errors import DataError
from torchdeq_ep.extend import require
from torchdeq_ep_lightning.decoding import Reading, decode_image
from torchdeq_ep_lightning.labels import number_classes
from torchdeq_ep_lightning.stores import Store, open_stores

DIGITS = "digits"
_DIGITS_TRAINED = 1437
_AT_ONCE = 256


@dataclass(frozen=True)
class Images:
    """Images and labels in memory.

    Args:
        pixels: Shape `(N, C, H, W)`: uint8, or floating between 0 and 1.
        labels: Shape `(N,)`, int64: the number of a class.
        classes: What the classes are called in the data.
        origin: Where they are from, for error messages.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[Any, ...]
    origin: str

    @property
    def n_classes(self) -> int:
        """Number of classes, over all splits."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.pixels.shape[1:])

    def take(self, rows: Tensor) -> Tensor:
        """The pixels of some rows."""
        return self.pixels[rows]

    def first(self, limit: int | None) -> Images:
        """The first of them; all for `None`."""
        return replace(self, pixels=self.pixels[:limit], labels=self.labels[:limit])


class StreamedImages(Dataset[Tensor]):
    """Images that stay in their files and are decoded each time they are taken; labels in memory.

    Args:
        store: Where they are.
        labels: Shape `(N,)`, int64; there may be more images.
        classes: What the classes are called in the data.
        reading: How they are read.
    """

    def __init__(self, store: Store, labels: Tensor, classes: tuple[Any, ...], reading: Reading) -> None:
        self._store, self.labels, self._reading = store, labels, reading
        self.classes, self.n_classes, self.origin = classes, len(classes), store.origin
        self.shape = tuple(self._decoded([0])[0].shape)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Tensor:
        """The pixels of some rows."""
        pixels = self._decoded(rows.tolist())
        for row, picture in zip(rows.tolist(), pixels, strict=True):
            if tuple(picture.shape) != self.shape:
                ((_, place, file),) = self._store.encoded([row])
                channels = "convert the file, so that all have as many channels."
                size = "data.resize brings all to one height and width."
                raise DataError(
                    f"row {place} of {file} is an image of shape {tuple(picture.shape)} (channels, height, width), not "
                    f"{self.shape} as the first: {channels if picture.shape[0] != self.shape[0] else size}"
                )
        if any(picture.is_floating_point() for picture in pixels):
            pixels = [picture if picture.is_floating_point() else picture.float() / 255 for picture in pixels]
        return torch.stack(pixels) if pixels else torch.empty(0, *self.shape)

    def __getitems__(self, rows: Tensor) -> Tensor:
        return self.take(rows)

    def in_memory(self, workers: int) -> Images:
        """All of them, decoded once.

        Args:
            workers: Processes that decode them; 0 for this one alone.
        """
        chunks = torch.split(torch.arange(len(self)), _AT_ONCE)
        loader: Any = DataLoader(
            self,
            batch_sampler=list(chunks),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_same,
            generator=torch.Generator(),  # a loader draws, and torch's own random state is not for that
        )
        pixels = torch.empty(0)
        for rows, decoded in zip(chunks, loader, strict=True):
            if not len(pixels):
                pixels = torch.empty(len(self), *self.shape, dtype=decoded.dtype)
            elif decoded.is_floating_point() and not pixels.is_floating_point():
                pixels = pixels.float() / 255
            pixels[rows] = decoded if decoded.dtype == pixels.dtype else decoded.float() / 255
        return Images(pixels, self.labels, self.classes, self.origin)

    def _decoded(self, rows: Sequence[int]) -> list[Tensor]:
        images = self._store.encoded(rows)
        return [decode_image(*image, self._reading).permute(2, 0, 1) for image in images]


Splits = tuple[Images | StreamedImages, ...]
"""The images of each split."""


def _same(batch: Any) -> Any:
    return batch


def load_images(
    source: str = DIGITS,
    splits: Sequence[str] = ("train", "test"),
    columns: tuple[str, str] = ("image", "label"),
    limits: Sequence[int | None] = (None, None),
    cache: str | None = None,
    reading: Reading | None = None,
    workers: int = 0,
) -> tuple[Images, ...]:
    """Read labelled images into memory.

    Args:
        source: As for [`ImageData`][torchdeq_ep_lightning.ImageData].
        splits: Names of the splits; those of the digits are always two, to train and to test on.
        columns: Names of the columns of the images and of the labels.
        limits: How many images of each split are read at most.
        cache: Folder of the files that Hugging Face's `datasets` keeps; by default its own.
        reading: How images are read; by default as they are.
        workers: Processes that decode them; 0 for this one alone.

    Returns:
        The images of each split, with classes that are numbered over all splits.

    Raises:
        DataError: If files are missing or cannot be used; the message names the file and the row.
        MissingDependencyError: If scikit-learn, which has the digits, is not installed.

    Example:
        >>> train, test = load_images()
        >>> train.pixels.shape, len(test.labels), test.n_classes
        (torch.Size([1437, 1, 8, 8]), 360, 10)
    """
    return decoded(open_images(source, splits, columns, limits, cache, reading), workers)


def open_images(
    source: str,
    splits: Sequence[str],
    columns: tuple[str, str],
    limits: Sequence[int | None],
    cache: str | None,
    reading: Reading | None,
) -> Splits:
    """The same images, with their labels read, and of each split no more than the first image decoded.

    The digits, which are no files, are in memory.
    """
    reading = reading or Reading()
    if source == DIGITS:
        return tuple(part.first(limit) for part, limit in zip(_digits(reading), limits, strict=True))
    stores = open_stores(source, splits, columns, cache)
    classes, numbers = number_classes([store.labels for store in stores])
    return tuple(
        StreamedImages(store, labels[:limit], classes, reading)
        for store, labels, limit in zip(stores, numbers, limits, strict=True)
    )


def decoded(parts: Splits, workers: int) -> tuple[Images, ...]:
    """Each split in memory, decoded by so many processes."""
    return tuple(part.in_memory(workers) if isinstance(part, StreamedImages) else part for part in parts)


def _digits(reading: Reading) -> tuple[Images, Images]:
    data = require("sklearn.datasets", "scikit-learn", "The source 'digits'").load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    pixels = (torch.as_tensor(data.data, dtype=torch.float32) / 16)[order].reshape(-1, 1, 8, 8)
    if reading.resize is not None:
        pixels = functional.interpolate(pixels, list(reading.resize), mode="bicubic", antialias=True).clamp(0, 1)
    labels = torch.as_tensor(data.target, dtype=torch.int64)[order]
    parts = (slice(_DIGITS_TRAINED), slice(_DIGITS_TRAINED, None))
    origin = "scikit-learn's digits"
    train, test = (Images(pixels[part], labels[part], tuple(range(10)), origin) for part in parts)
    return train, test
