"""Labelled images for Lightning: from Hugging Face's hub, Parquet files, image folders, or scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchdeq_ep.errors import DataError, InvalidOptionError
from torchdeq_ep.experiment.data import decode_image, load_images

DIGITS = "digits"

Indices = tuple[int, Tensor]


@dataclass(frozen=True)
class Images:
    """Images and labels in memory.

    Args:
        pixels: Shape `(N, C, H, W)`: uint8, or floating between 0 and 1.
        labels: Shape `(N,)`, int64, from 0 on.
        n_classes: Number of classes.
        origin: Where they are from, for error messages.
    """

    pixels: Tensor
    labels: Tensor
    n_classes: int
    origin: str


class ImageData(LightningDataModule):
    """Images and labels, in an order and with augmentations that depend on the seed and the epoch alone.

    A batch is a pair of a floating tensor `(B, C, H, W)` and int64 labels `(B,)`. With several processes each takes its
    share of every batch, so the same data reach the optimiser whatever their number.

    Args:
        source: `"digits"`: scikit-learn's, 1437 images of 8 x 8 to train on and 360 to test on. A folder with
            `train*.parquet` and `test*.parquet`, also in a subfolder `data`. A folder with the subfolders `train` and
            `test`, which hold a subfolder of image files for each class. Or a name on Hugging Face's hub, such as
            `"zalando-datasets/fashion_mnist"`.
        train_split: Name of the split to train on.
        test_split: Name of the split to test on.
        image_column: Column of the images.
        label_column: Column of the labels.
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
        workers: Processes that prepare batches; 0 for none, which is fastest for small images.
        cache: Folder of the files that Hugging Face's `datasets` keeps; by default its own.

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
    ) -> None:
        super().__init__()
        limits = {"train_limit": train_limit or 1, "test_limit": test_limit or 1}
        for name, value in {"batch": batch, "test_batch": test_batch, **limits}.items():
            if value < 1:
                raise InvalidOptionError(f"data.{name} must be at least 1, not {value}.")
        for name, value in {"crop": crop, "workers": workers}.items():
            if value < 0:
                raise InvalidOptionError(f"data.{name} must be at least 0, not {value}.")
        if any(not value > 0 for value in std):
            raise InvalidOptionError(f"data.std must be positive, not {list(std)}.")
        self.source, self.splits = source, (train_split, test_split)
        self.columns = (image_column, label_column)
        self.expected_shape = None if shape is None else tuple(shape)
        self.batch, self.test_batch = batch, test_batch
        self.limits = (train_limit, test_limit)
        self.mean, self.std, self.flip, self.crop = tuple(mean), tuple(std), flip, crop
        self.seed, self.workers, self.cache = seed, workers, cache
        self._images: tuple[Images, Images] | None = None

    @property
    def images(self) -> tuple[Images, Images]:
        """Training and test images, read when they are first asked for."""
        if self._images is None:
            self._images = self._read()
        return self._images

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images[0].pixels.shape
        return channels, height, width

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.images[0].n_classes

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training images, shuffled anew in each epoch."""
        train = self.images[0]
        if self.batch > len(train.labels):
            raise InvalidOptionError(
                f"data.batch of {self.batch} is more than the {len(train.labels)} training images."
            )
        rows = _Rows(train, self.mean, self.std, self.flip, self.crop, self.seed)
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
        rows = _Rows(test, self.mean, self.std, False, 0, self.seed)
        batches = EpochBatches(len(rows), self.test_batch, None, *self._place())
        return ResumableLoader(rows, batches, self.workers)

    test_dataloader = val_dataloader

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _read(self) -> tuple[Images, Images]:
        if self.source == DIGITS:
            train, test = _digits()
        else:
            tables = _open(self.source, self.splits, self.cache)
            train, test = (
                _decode(table, origins, *self.columns, limit)
                for (table, origins), limit in zip(tables, self.limits, strict=True)
            )
        train, test = (_limited(part, limit) for part, limit in zip((train, test), self.limits, strict=True))
        expected = self.expected_shape or tuple(train.pixels.shape[1:])
        for part in (train, test):
            if tuple(part.pixels.shape[1:]) != expected:
                raise DataError(
                    f"the images of {part.origin} are of shape {tuple(part.pixels.shape[1:])} (channels, height, "
                    f"width), not {expected}."
                )
        classes = max(train.n_classes, test.n_classes)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, expected[0]):
                raise InvalidOptionError(
                    f"data.{name} needs one number, or one for each of {expected[0]} channels, not {list(values)}."
                )
        return tuple(Images(part.pixels, part.labels, classes, part.origin) for part in (train, test))  # type: ignore[return-value]


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

    def __init__(self, rows: _Rows, batches: EpochBatches, workers: int) -> None:
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


class _Rows(Dataset[Any]):
    """Whole batches of images by their rows, scaled, augmented and normalised."""

    def __init__(
        self, images: Images, mean: Sequence[float], std: Sequence[float], flip: bool, crop: int, seed: int
    ) -> None:
        self.images, self.flip, self.crop, self.seed = images, flip, crop, seed
        self.mean, self.std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitems__(self, indices: Indices) -> tuple[Tensor, Tensor]:
        epoch, rows = indices
        x = self.images.pixels[rows]
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


def _limited(images: Images, limit: int | None) -> Images:
    return Images(images.pixels[:limit], images.labels[:limit], images.n_classes, images.origin)


def _digits() -> tuple[Images, Images]:
    flat = load_images()
    parts = ((flat.train_x, flat.train_y), (flat.test_x, flat.test_y))
    train, test = (Images(x.reshape(-1, 1, 8, 8), y, flat.n_classes, "scikit-learn's digits") for x, y in parts)
    return train, test


class _Origins:
    """Which file and row of it a row of a table is from."""

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = files

    def __call__(self, row: int) -> tuple[int, str]:
        for name, rows in self.files:
            if row < rows or name == self.files[-1][0]:
                return row, name
            row -= rows
        raise IndexError(row)


def _open(source: str, splits: Sequence[str], cache: str | None) -> list[tuple[Any, _Origins]]:
    """The table of each split, and where its rows are from."""
    import datasets

    folder = Path(source).expanduser()
    if folder.is_dir():
        if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
            return [_open_parquet(folder, split, cache) for split in splits]
        return [_open_folder(folder / split, cache) for split in splits]
    if folder.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(
            f"there is no folder {source}: data.source takes 'digits', a folder of Parquet or image files, or a name "
            "on Hugging Face's hub."
        )
    tables: list[tuple[Any, _Origins]] = []
    for split in splits:
        try:
            table = datasets.load_dataset(source, split=split, cache_dir=cache)
        except Exception as error:  # the hub's client has errors of many kinds
            raise DataError(
                f"cannot load split {split!r} of {source!r} from Hugging Face's hub: {type(error).__name__}: {error} "
                "(a local folder of that name does not exist either)."
            ) from error
        tables.append((table, _Origins([(f"{source} ({split})", len(table))])))
    return tables


def _open_parquet(folder: Path, split: str, cache: str | None) -> tuple[Any, _Origins]:
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"data/{split}*.parquet")])
    if not files:
        raise DataError(f"there is no file {folder / split}.parquet, and none that starts with {split!r}.")
    rows = []
    for path in files:
        try:
            rows.append(parquet.ParquetFile(path).metadata.num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as Parquet: {error}") from error
    if not sum(rows):
        raise DataError(f"{files[0]} has no rows.")
    try:
        table = datasets.load_dataset(
            "parquet", data_files={split: [str(path) for path in files]}, split=split, cache_dir=cache
        )
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"cannot read {', '.join(map(str, files))}: {type(cause).__name__}: {cause}") from error
    return table, _Origins(list(zip(map(str, files), rows, strict=True)))


def _open_folder(folder: Path, cache: str | None) -> tuple[Any, _Origins]:
    import datasets

    if not folder.is_dir() or not any(path.is_dir() for path in folder.iterdir()):
        raise DataError(
            f"there is no folder {folder} with a subfolder of images for each class, and no Parquet file beside it."
        )
    try:
        table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    except Exception as error:
        raise DataError(f"cannot read the images in {folder}: {type(error).__name__}: {error}") from error
    return table, _Origins([(str(folder), len(table))])


def _decode(table: Any, origins: _Origins, image: str, label: str, limit: int | None) -> Images:
    """All rows of a table in memory."""
    import datasets

    first_file = origins(0)[1]
    for column in (image, label):
        if column not in table.column_names:
            raise DataError(
                f"{first_file} has no column {column!r}, only {', '.join(table.column_names)}: name the columns by "
                "data.image_column and data.label_column."
            )
    kinds = table.features
    if isinstance(kinds[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    elif not (isinstance(kinds[image], dict) and "bytes" in kinds[image]):
        raise DataError(
            f"column {image!r} of {first_file} is {kinds[image]}, not an image, which has the encoded file in 'bytes'."
        )
    whole = getattr(kinds[label], "dtype", "")
    if not str(whole).startswith(("int", "uint")):
        raise DataError(f"column {label!r} of {first_file} holds {kinds[label]}, not whole numbers.")
    count = min(len(table), limit or len(table))
    pixels: Tensor | None = None
    labels = torch.empty(count, dtype=torch.int64)
    for row, entry in enumerate(table.select_columns([image, label]).select(range(count))):
        place, file = origins(row)
        picture = _pixels(entry[image], place, file)
        if pixels is None:
            pixels = torch.empty(count, *picture.shape, dtype=torch.uint8)
        if picture.shape != pixels.shape[1:]:
            raise DataError(
                f"row {place} of {file} is an image of shape {tuple(picture.shape)} (channels, height, width), not "
                f"{tuple(pixels.shape[1:])} as the first."
            )
        if entry[label] is None or entry[label] < 0:
            raise DataError(f"row {place} of {file} has the label {entry[label]}; labels are whole numbers from 0 on.")
        pixels[row] = picture
        labels[row] = entry[label]
    if pixels is None:
        raise DataError(f"{first_file} has no rows.")
    named = getattr(kinds[label], "num_classes", None) or 0
    return Images(pixels, labels, max(named, int(labels.max()) + 1), first_file)


def _pixels(entry: dict[str, Any] | None, row: int, file: str) -> Tensor:
    if entry is not None and entry.get("bytes") is None and entry.get("path"):  # an image folder
        file = entry["path"]
        try:
            entry = {"bytes": Path(file).read_bytes()}
        except OSError as error:
            raise DataError(f"cannot read {file}: {error}") from error
    return decode_image(entry, row, file).permute(2, 0, 1)
