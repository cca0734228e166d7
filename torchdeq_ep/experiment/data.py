"""Labelled images for the experiment: scikit-learn's digits, or a folder of Parquet files in Hugging Face's schema."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.errors import DataError, MissingDependencyError

_SPLITS = ("train", "test")
_DIGITS_TRAINED = 1437


@dataclass(frozen=True)
class Images:
    """Images as rows of pixels between 0 and 1, and their labels from 0 on.

    Args:
        name: What they are, for titles.
        train_x: Shape `(N, pixels)`.
        train_y: Shape `(N,)`, int64.
        test_x: Shape `(M, pixels)`.
        test_y: Shape `(M,)`.

    Example:
        >>> pixels, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
        >>> Images("nothing", pixels, labels, pixels, labels).n_classes
        3
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def n_classes(self) -> int:
        """One more than the largest label."""
        return int(torch.cat([self.train_y, self.test_y]).max()) + 1

    def digest(self) -> str:
        """A short fingerprint of the contents, by which results on other data are told apart.

        Returns:
            Eight hexadecimal digits.
        """
        parts = (self.train_x, self.train_y, self.test_x, self.test_y)
        found = hashlib.sha256()
        for part in parts:
            found.update(str(tuple(part.shape)).encode())
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:8]


def load_images(folder: str | Path | None = None) -> Images:
    """Load the data of the experiment.

    Args:
        folder: A folder with `train.parquet` and `test.parquet`, each with a column `image` (a struct with the encoded
            file under `bytes`) and a column `label` (whole numbers from 0 on). `None` for scikit-learn's digits: 1437
            images of 8 x 8 to train on, 360 to test on.

    Returns:
        The images. Those with colours keep them as further pixels.

    Raises:
        MissingDependencyError: If scikit-learn, or pyarrow or pillow, is not installed.
        DataError: If a file is missing or cannot be used; the message names the file, and the column or row.

    Example:
        >>> images = load_images()
        >>> images.train_x.shape, images.test_x.shape, images.n_classes
        (torch.Size([1437, 64]), torch.Size([360, 64]), 10)
    """
    if folder is None:
        return _digits()
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: --data takes a folder with train.parquet and test.parquet.")
    (train_x, train_y), (test_x, test_y) = (_read(folder / f"{split}.parquet") for split in _SPLITS)
    if train_x.shape[1] != test_x.shape[1]:
        raise DataError(
            f"the images of {folder / 'train.parquet'} have {train_x.shape[1]} values, those of test.parquet "
            f"{test_x.shape[1]}."
        )
    return Images(folder.resolve().name, train_x, train_y, test_x, test_y)


def _digits() -> Images:
    data = _require("sklearn.datasets", "scikit-learn", "compare").load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    pixels = (torch.as_tensor(data.data, dtype=torch.float32) / 16)[order]
    labels = torch.as_tensor(data.target, dtype=torch.int64)[order]
    n = _DIGITS_TRAINED
    return Images("digits", pixels[:n], labels[:n], pixels[n:], labels[n:])


def _read(path: Path) -> tuple[Tensor, Tensor]:
    parquet = _require("pyarrow.parquet", "pyarrow", "experiment")
    arrow = _require("pyarrow", "pyarrow", "experiment")
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        file = parquet.ParquetFile(path)
        missing = [name for name in ("image", "label") if name not in file.schema_arrow.names]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}.")
        table = file.read(columns=["image", "label"])
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {error}") from error
    if not arrow.types.is_integer(table.schema.field("label").type):
        raise DataError(f"column 'label' of {path} holds {table.schema.field('label').type}, not whole numbers.")
    kind = table.schema.field("image").type
    if not arrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"column 'image' of {path} is {kind}, not a struct with the encoded image under 'bytes'.")
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    labels = table["label"].to_pylist()
    for row, label in enumerate(labels):
        if label is None or label < 0:
            raise DataError(f"row {row} of {path} has the label {label}; labels are whole numbers from 0 on.")
    rows = [decode_image(entry, row, path) for row, entry in enumerate(table["image"].to_pylist())]
    for row, pixels in enumerate(rows):
        if pixels.shape != rows[0].shape:
            shapes = f"{tuple(pixels.shape)}, not {tuple(rows[0].shape)} as row 0"
            raise DataError(f"row {row} of {path} is an image of shape {shapes}.")
    return torch.stack(rows).flatten(1).float() / 255, torch.tensor(labels)


def decode_image(entry: dict[str, Any] | None, row: int, path: str | Path) -> Tensor:
    """The pixels of an encoded image, as Hugging Face's image data sets hold it.

    Args:
        entry: A dictionary with the encoded file under `bytes`.
        row: Where it is from, for the error message.
        path: The same.

    Returns:
        A uint8 tensor of shape `(height, width, bands)`: one band for grey images, three for all others.

    Raises:
        MissingDependencyError: If pillow is not installed.
        DataError: If there are no bytes, or they are no image.
    """
    pillow = _require("PIL.Image", "pillow", "experiment")
    encoded = None if entry is None else entry.get("bytes")
    if not encoded:
        raise DataError(f"row {row} of {path} has no image bytes.")
    try:
        with pillow.open(io.BytesIO(encoded)) as image:
            converted = image.convert("L" if image.mode in ("1", "L") else "RGB")
            raw, size, bands = converted.tobytes(), converted.size, len(converted.getbands())
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(f"row {row} of {path} is not an image that can be decoded: {error}") from error
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(size[1], size[0], bands)


def _require(module: str, distribution: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"The experiment needs {distribution}, which cannot be imported ({error}): "
            f"pip install 'torchdeq-ep[{extra}]'"
        ) from error
