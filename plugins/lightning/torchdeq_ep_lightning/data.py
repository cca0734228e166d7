"""Labelled images for Lightning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor
from torch.utils.data import DataLoader

from torchdeq_ep.errors import DataError, InvalidOptionError
from torchdeq_ep.extend import check_count
from torchdeq_ep_lightning.batches import EpochBatches, ResumableLoader, Samples
from torchdeq_ep_lightning.decoding import Reading
from torchdeq_ep_lightning.flavour import LightningDataModule
from torchdeq_ep_lightning.images import DIGITS, Splits, decoded, open_images
from torchdeq_ep_lightning.sharing import share_on_machine


class ImageData(LightningDataModule):
    """Images and labels, in an order and with augmentations that depend on the seed and the epoch alone.

    A batch is a pair of a floating tensor `(B, C, H, W)` and int64 labels `(B,)`. With several processes each takes its
    share of every batch, so the same data reach the optimiser whatever their number.

    Args:
        source: `"digits"`: scikit-learn's, 1437 images of 8 x 8 to train on and 360 to test on. A folder with
            `train.parquet` or `train-00000-of-00002.parquet` and so on, and the same for `test`, also in a subfolder
            `data`. A folder with the subfolders `train` and `test`, which hold a subfolder of image files for each
            class. Or a name on Hugging Face's hub, such as `"zalando-datasets/fashion_mnist"`.
        train_split: Name of the split to train on.
        test_split: Name of the split to test on.
        image_column: Column of the images.
        label_column: Column of the labels: numbers of classes from 0 on, or names, which are numbered in order over
            both splits together. Where the files name the classes, both must do so alike.
        shape: Channels, height and width that all images must have; by default those of the first.
        batch: Images in one step of the optimiser, over all processes. What does not fill a batch is left out of the
            epoch.
        test_batch: Images in one step of testing, over all processes.
        train_limit: Use the first so many training images.
        test_limit: Use the first so many test images.
        mean: Subtracted from the pixels, which lie between 0 and 1: one number for each channel, or one for all.
        std: Divides the difference.
        flip: Whether to mirror half of the training images.
        crop: Pixels of black padding on each side of a training image, from which it is cropped at random.
        seed: Seed of order and augmentation.
        workers: Processes that decode images and prepare batches; 0 for none, which is fastest for small images.
        cache: Folder of the files that Hugging Face's `datasets` keeps; by default its own.
        resize: Height and width to which every image is brought; by default they must be alike.
        alpha: What becomes of images that are transparent somewhere: `"refuse"`, `"keep"` for a channel of its own, or
            `"black"` or `"white"` for a ground behind them.
        streaming: Leave the images in their files, encoded, and decode those of a batch when it is made: for sets that
            are larger than the memory.

    Raises:
        DataError: If files are missing or cannot be used; the message names the file and the row.
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> data = ImageData(batch=100)
        >>> data.shape, data.n_classes
        ((1, 8, 8), 10)
    """

    def __init__(
        self,
        source: str = DIGITS,
        train_split: str = "train",
        test_split: str = "test",
        image_column: str = "image",
        label_column: str = "label",
        shape: tuple[int, int, int] | None = None,
        batch: int = 50,
        test_batch: int = 500,
        train_limit: int | None = None,
        test_limit: int | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        flip: bool = False,
        crop: int = 0,
        seed: int = 0,
        workers: int = 0,
        cache: str | None = None,
        resize: tuple[int, int] | None = None,
        alpha: Literal["refuse", "keep", "black", "white"] = "refuse",
        streaming: bool = False,
    ) -> None:
        super().__init__()
        limits = {"train_limit": train_limit or 1, "test_limit": test_limit or 1}
        for name, value in {"batch": batch, "test_batch": test_batch, **limits}.items():
            check_count(f"data.{name}", value)
        for name, value in {"crop": crop, "workers": workers}.items():
            check_count(f"data.{name}", value, 0)
        if any(not value > 0 for value in std):
            raise InvalidOptionError(f"data.std must be positive, not {list(std)}.")
        self.source, self.splits = source, (train_split, test_split)
        self.columns = (image_column, label_column)
        self.expected_shape = None if shape is None else tuple(shape)
        self.batch, self.test_batch = batch, test_batch
        self.limits = (train_limit, test_limit)
        self.mean, self.std, self.flip, self.crop = tuple(mean), tuple(std), flip, crop
        self.seed, self.workers, self.cache = seed, workers, cache
        self.reading = Reading(None if resize is None else (resize[0], resize[1]), alpha)
        self.streaming = streaming
        self._opened: Splits | None = None
        self._images: Splits | None = None
        self._are_shared = False

    @property
    def images(self) -> Splits:
        """Training and test images, decoded when they are first asked for, unless they are streamed."""
        return self._decode()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return cast(tuple[int, int, int], self._open()[0].shape)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self._open()[0].n_classes

    @property
    def classes(self) -> tuple[Any, ...]:
        """What the classes are called in the data, in the order of their numbers."""
        return self._open()[0].classes

    def fingerprint(self) -> str:
        """What tells this set of images from others: a hash of the labels of both splits, without their limits."""
        whole = open_images(self.source, self.splits, self.columns, (None, None), self.cache, self.reading)
        digest = hashlib.sha256(repr([part.classes for part in whole]).encode())
        for part in whole:
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _decode(self) -> Splits:
        if self._images is None:
            self._images = self._open() if self.streaming else decoded(self._open(), self.workers)
        return self._images

    def prepare_data(self) -> None:
        """Decode the images, in one process of each machine."""
        self._decode()

    def setup(self, stage: str) -> None:
        """Give the other processes of the machine those that one of them has decoded."""
        trainer = self.trainer
        if trainer is not None and trainer.num_devices > 1 and not (self.streaming or self._are_shared):
            held = self.images if trainer.local_rank == 0 else None
            self._images, self._are_shared = share_on_machine(trainer, self._open(), held), True

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training images, shuffled anew in each epoch."""
        train = self.images[0]
        if self.batch > len(train.labels):
            raise InvalidOptionError(
                f"data.batch of {self.batch} is more than the {len(train.labels)} training images."
            )
        rows = Samples(train, self.mean, self.std, self.flip, self.crop, self.seed)
        rank, world = self._place()
        if self.batch % world:
            raise InvalidOptionError(
                f"data.batch of {self.batch} cannot be shared equally by {world} processes: take a multiple of {world}."
            )
        batches = EpochBatches(len(rows), self.batch, self.seed, rank, world)
        return ResumableLoader(rows, batches, self.workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All test images in order."""
        test = self.images[1]
        rows = Samples(test, self.mean, self.std, False, 0, self.seed)
        batches = EpochBatches(len(rows), self.test_batch, None, *self._place())
        return ResumableLoader(rows, batches, self.workers)

    test_dataloader = val_dataloader

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _open(self) -> Splits:
        if self._opened is None:
            self._opened = self._checked(
                open_images(self.source, self.splits, self.columns, self.limits, self.cache, self.reading)
            )
        return self._opened

    def _checked(self, parts: Splits) -> Splits:
        expected = self.expected_shape or parts[0].shape
        for part in parts:
            if part.shape != expected:
                raise DataError(
                    f"the images of {part.origin} are of shape {part.shape} (channels, height, width), not {expected}."
                )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, expected[0]):
                raise InvalidOptionError(
                    f"data.{name} needs one number, or one for each of {expected[0]} channels, not {list(values)}."
                )
        return parts
