"""Which class each label is: one mapping for all splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchdeq_ep.errors import DataError

_SHOWN = 5
_MOST_CLASSES = 100_000  # unless there are more images


@dataclass(frozen=True)
class LabelColumn:
    """The labels of a split as they are in its files.

    Args:
        values: One for each row: whole numbers or strings; `None` where there is none.
        names: Names of the classes that the numbers count, if the files have them.
        origin: What the column is, for error messages.
        place: From a row to where it is.
    """

    values: Sequence[Any]
    names: tuple[str, ...] | None
    origin: str
    place: Any


def number_classes(columns: Sequence[LabelColumn]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Number the classes of all splits together, before anything of their size is allocated.

    Names of classes in the files are taken in their order, and must be the same in all splits. Other numbers are those
    of the classes, from 0 to the largest in any split. Strings are numbered in the order of the alphabet, over all
    splits.

    Args:
        columns: The labels of each split.

    Returns:
        The classes in order, and the number of the class of each row of each split, int64.

    Raises:
        DataError: If labels are missing, negative or so large that they are no numbers of classes, or if splits do not
            agree.

    Example:
        >>> train, test = (LabelColumn(v, None, "labels", str) for v in (["cat", "eel"], ["dog", "cat"]))
        >>> classes, (train, test) = number_classes([train, test])
        >>> classes, train.tolist(), test.tolist()
        (('cat', 'dog', 'eel'), [0, 2], [1, 0])
    """
    names = _common_names(columns)
    for column in columns:
        _check(column, names)
    if names is not None:
        return names, [torch.tensor(column.values, dtype=torch.int64) for column in columns]
    found = [np.asarray(column.values) for column in columns]
    for column, part in zip(columns, found, strict=True):
        if (part.dtype.kind == "U") != (found[0].dtype.kind == "U"):
            raise DataError(
                f"{columns[0].origin} and {column.origin} hold different kinds of labels: {found[0][0]!s} and "
                f"{part[0]!s}; names in one of them, and whole numbers in the other."
            )
    if found[0].dtype.kind != "U":
        _refuse_absurd(columns, found)
        return tuple(range(max(int(part.max()) for part in found) + 1)), [
            torch.from_numpy(part.astype(np.int64)) for part in found
        ]
    classes, numbers = np.unique(np.concatenate(found), return_inverse=True)
    parts = torch.split(torch.from_numpy(numbers.astype(np.int64)), [len(part) for part in found])
    return tuple(classes.tolist()), list(parts)


def _refuse_absurd(columns: Sequence[LabelColumn], found: Sequence[np.ndarray[Any, Any]]) -> None:
    limit = max(_MOST_CLASSES, sum(map(len, found)))
    for column, part in zip(columns, found, strict=True):
        row = int(part.argmax())
        if int(part[row]) >= limit:
            raise DataError(
                f"{column.place(row)} has the label {part[row]}, which as the number of a class would make at least "
                f"{int(part[row]) + 1} of them. If it is none, but for instance a key, write the labels as strings: "
                "these are numbered."
            )


def _common_names(columns: Sequence[LabelColumn]) -> tuple[str, ...] | None:
    first = columns[0]
    for column in columns[1:]:
        if column.names != first.names:
            raise DataError(
                f"the classes of {first.origin} and of {column.origin} differ: {_shown(first.names)} and "
                f"{_shown(column.names)}. A number would mean one class in one of them, and another in the other."
            )
    return first.names


def _shown(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "none named"
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({len(names)})"


def _check(column: LabelColumn, names: tuple[str, ...] | None) -> None:
    kinds = {str if isinstance(value, str) else int for value in column.values[:1]}
    for row, value in enumerate(column.values):
        if isinstance(value, str) and str in kinds:
            continue
        if value is None or isinstance(value, str) or str in kinds or value < 0:
            raise DataError(
                f"{column.place(row)} has the label {value!r}; labels are whole numbers from 0 on, or all of them "
                "strings."
            )
        if names is not None and value >= len(names):
            raise DataError(
                f"{column.place(row)} has the label {value!r}, but {column.origin} names {len(names)} classes."
            )
