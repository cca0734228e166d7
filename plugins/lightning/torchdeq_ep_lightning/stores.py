"""Where encoded images and their labels are: files of Parquet, Hugging Face's hub, folders of image files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from torchdeq_ep.errors import DataError
from torchdeq_ep_lightning.labels import LabelColumn

_ROWS_AT_ONCE = 1000
# What is read of a file in memory counts as the process's own until the file is opened anew.
_ROWS_BEFORE_REOPENING = 2000
# NAME.parquet, NAME2.parquet, NAME-00000-of-00002.parquet, and the same with a hash, as the hub's files have it.
_SHARD = r"(?:[-_.]?\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?)?\.parquet"


class Store(Protocol):
    """Encoded images of a split, by their rows."""

    labels: LabelColumn
    origin: str

    def __len__(self) -> int: ...

    def encoded(self, rows: Sequence[int]) -> list[tuple[dict[str, Any] | None, int, str]]:
        """Images as Hugging Face's data sets hold them, each with the row and the file that it is from."""


def open_stores(source: str, splits: Sequence[str], columns: tuple[str, str], cache: str | None) -> list[Store]:
    """Open the images of each split, without decoding any.

    Args:
        source: As for [`ImageData`][torchdeq_ep_lightning.ImageData].
        splits: Names of the splits.
        columns: Names of the columns of the images and of the labels.
        cache: Folder of the files that Hugging Face's `datasets` keeps; by default its own.

    Returns:
        One store for each split.

    Raises:
        DataError: If files are missing or cannot be used.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
            return [_open_parquet(folder, split, columns, cache) for split in splits]
        return [FolderStore(folder / split) for split in splits]
    if folder.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(
            f"there is no folder {source}: data.source takes 'digits', a folder of Parquet or image files, or a name "
            "on Hugging Face's hub."
        )
    import datasets

    stores: list[Store] = []
    for split in splits:
        try:
            table = datasets.load_dataset(source, split=split, cache_dir=cache)
        except Exception as error:  # the hub's client has errors of many kinds
            raise DataError(
                f"cannot load split {split!r} of {source!r} from Hugging Face's hub: {type(error).__name__}: {error} "
                "(a local folder of that name does not exist either)."
            ) from error
        stores.append(TableStore(table, [(f"{source} ({split})", len(table))], columns))
    return stores


class TableStore:
    """Rows of a table of Hugging Face's `datasets`, which lies in a file and is mapped into memory.

    Args:
        table: The table.
        files: Where its rows are from: names, and how many are from each.
        columns: Names of the columns of the images and of the labels.
    """

    def __init__(self, table: Any, files: Sequence[tuple[str, int]], columns: tuple[str, str]) -> None:
        import datasets

        self._files, (self._image, label) = files, columns
        self.origin = files[0][0]
        check_columns(columns, table.column_names, self.origin)
        if not len(table):
            raise DataError(f"{self.origin} has no rows.")
        kinds = table.features
        is_image = isinstance(kinds[self._image], datasets.Image)
        if not is_image and not (isinstance(kinds[self._image], dict) and "bytes" in kinds[self._image]):
            raise DataError(
                f"column {self._image!r} of {self.origin} is {kinds[self._image]}, not an image, which has the encoded "
                "file in 'bytes'."
            )
        if not str(getattr(kinds[label], "dtype", "")).startswith(("int", "uint", "string", "large_string", "bool")):
            raise DataError(f"column {label!r} of {self.origin} holds {kinds[label]}, not whole numbers or names.")
        values = table.data.column(label).to_pylist()
        names = getattr(kinds[label], "names", None)
        self.labels = LabelColumn(
            values, None if names is None else tuple(names), f"column {label!r} of {self.origin}", self._place
        )
        self._table = self._undecoded(table)
        self._served = 0

    def __len__(self) -> int:
        return len(self.labels.values)

    def encoded(self, rows: Sequence[int]) -> list[tuple[dict[str, Any] | None, int, str]]:
        self._served += len(rows)
        if self._served > _ROWS_BEFORE_REOPENING and self._table.cache_files:
            self._reopen()
        images = self._table[list(rows)][self._image]
        return [(image, *self._from(row)) for image, row in zip(images, rows, strict=True)]

    def _reopen(self) -> None:
        import datasets

        parts = [datasets.Dataset.from_file(file["filename"]) for file in self._table.cache_files]
        self._table, self._served = self._undecoded(datasets.concatenate_datasets(parts)), 0

    def _undecoded(self, table: Any) -> Any:
        import datasets

        table = table.select_columns([self._image])
        if isinstance(table.features[self._image], datasets.Image):
            table = table.cast_column(self._image, datasets.Image(decode=False))
        return table

    def _from(self, row: int) -> tuple[int, str]:
        for name, rows in self._files[:-1]:
            if row < rows:
                return row, name
            row -= rows
        return row, self._files[-1][0]

    def _place(self, row: int) -> str:
        return "row {} of {}".format(*self._from(row))


class FolderStore:
    """Image files in a folder for each class.

    Args:
        folder: That of the split.
    """

    def __init__(self, folder: Path) -> None:
        self.origin = str(folder)
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not classes:
            raise DataError(
                f"there is no folder {folder} with a subfolder of images for each class, and no Parquet file beside it."
            )
        kinds = Image.registered_extensions()
        found = [
            (path, name.name)
            for name in classes
            for path in sorted(name.rglob("*"))
            if path.suffix.lower() in kinds and not path.name.startswith(".")
        ]
        if not found:
            raise DataError(f"there is no image file in the subfolders of {folder}.")
        self._paths = [path for path, _ in found]
        self.labels = LabelColumn([name for _, name in found], None, f"the folders in {folder}", self._place)

    def __len__(self) -> int:
        return len(self._paths)

    def encoded(self, rows: Sequence[int]) -> list[tuple[dict[str, Any] | None, int, str]]:
        images: list[tuple[dict[str, Any] | None, int, str]] = []
        for row in rows:
            path = self._paths[row]
            try:
                images.append(({"bytes": path.read_bytes()}, row, str(path)))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error}") from error
        return images

    def _place(self, row: int) -> str:
        return str(self._paths[row])


def check_columns(columns: Sequence[str], there: Sequence[str], origin: str) -> None:
    """Refuse columns that a table does not have.

    Args:
        columns: Names that were asked for.
        there: Names that the table has.
        origin: What it is called.

    Raises:
        DataError: If one is missing.
    """
    for column in columns:
        if column not in there:
            raise DataError(
                f"{origin} has no column {column!r}, only {', '.join(there)}: name the columns by data.image_column "
                "and data.label_column."
            )


def _open_parquet(folder: Path, split: str, columns: tuple[str, str], cache: str | None) -> TableStore:
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = _files_of(folder, split)
    rows = []
    for path in files:
        try:
            file = parquet.ParquetFile(path)
            rows.append(file.metadata.num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as Parquet: {error}") from error
        check_columns(columns, file.schema_arrow.names, str(path))
    if not sum(rows):
        raise DataError(f"{files[0]} has no rows.")
    try:
        table = datasets.load_dataset(
            "parquet",
            data_files={"train": [str(path) for path in files]},  # names of splits may have signs that these may not
            split="train",
            cache_dir=cache,
            columns=list(dict.fromkeys(columns)),
            batch_size=_ROWS_AT_ONCE,
        )
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"cannot read {', '.join(map(str, files))}: {type(cause).__name__}: {cause}") from error
    pyarrow.default_memory_pool().release_unused()  # it would keep what a group of rows took when it was cached
    return TableStore(table, list(zip(map(str, files), rows, strict=True)), columns)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, and none of another whose name begins like it."""
    there = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    files = [path for path in there if re.fullmatch(re.escape(split) + _SHARD, path.name)]
    if files:
        return files
    alike = [path.name for path in there if path.name.startswith(split)]
    raise DataError(
        f"there is no file {folder / split}.parquet, and none of the form {split}-00000-of-00001.parquet"
        + (f"; {', '.join(alike)} would be of other splits." if alike else ".")
    )
