"""Labelled images in memory: from Hugging Face's hub, Parquet files, image folders, or scikit-learn's digits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchdeq_ep.errors import DataError
from torchdeq_ep.extend import require

DIGITS = "digits"
_DIGITS_TRAINED = 1437


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

    def first(self, limit: int | None) -> Images:
        """The first of them; all for `None`."""
        return replace(self, pixels=self.pixels[:limit], labels=self.labels[:limit])


def load_images(
    source: str = DIGITS,
    splits: Sequence[str] = ("train", "test"),
    columns: tuple[str, str] = ("image", "label"),
    limits: Sequence[int | None] = (None, None),
    cache: str | None = None,
) -> tuple[Images, ...]:
    """Read labelled images into memory.

    Args:
        source: As for [`ImageData`][torchdeq_ep_lightning.ImageData].
        splits: Names of the splits; those of the digits are always two, to train and to test on.
        columns: Names of the columns of the images and of the labels.
        limits: How many images of each split are read at most.
        cache: Folder of the files that Hugging Face's `datasets` keeps; by default its own.

    Returns:
        The images of each split.

    Raises:
        DataError: If files are missing or cannot be used; the message names the file and the row.
        MissingDependencyError: If scikit-learn, which has the digits, is not installed.

    Example:
        >>> train, test = load_images()
        >>> train.pixels.shape, len(test.labels), test.n_classes
        (torch.Size([1437, 1, 8, 8]), 360, 10)
    """
    if source == DIGITS:
        return tuple(part.first(limit) for part, limit in zip(_digits(), limits, strict=True))
    tables = _open(source, splits, cache)
    return tuple(
        _decode(table, origins, *columns, limit) for (table, origins), limit in zip(tables, limits, strict=True)
    )


def _digits() -> tuple[Images, Images]:
    data = require("sklearn.datasets", "scikit-learn", "The source 'digits'").load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    pixels = (torch.as_tensor(data.data, dtype=torch.float32) / 16)[order].reshape(-1, 1, 8, 8)
    labels = torch.as_tensor(data.target, dtype=torch.int64)[order]
    parts = (slice(_DIGITS_TRAINED), slice(_DIGITS_TRAINED, None))
    train, test = (Images(pixels[part], labels[part], 10, "scikit-learn's digits") for part in parts)
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


def decode_image(entry: dict[str, Any] | None, row: int, path: str | Path) -> Tensor:
    """The pixels of an encoded image, as Hugging Face's image data sets hold it.

    Args:
        entry: A dictionary with the encoded file under `bytes`.
        row: Where it is from, for the error message.
        path: The same.

    Returns:
        A uint8 tensor of shape `(height, width, bands)`: one band for grey images, three for all others.

    Raises:
        DataError: If there are no bytes, or they are no image.
    """
    encoded = None if entry is None else entry.get("bytes")
    if not encoded:
        raise DataError(f"row {row} of {path} has no image bytes.")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            converted = image.convert("L" if image.mode in ("1", "L") else "RGB")
            raw, size, bands = converted.tobytes(), converted.size, len(converted.getbands())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"row {row} of {path} is not an image that can be decoded: {error}") from error
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(size[1], size[0], bands)
