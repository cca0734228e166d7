"""The first few samples of a batch, where they can be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


class UncuttableError(Exception):
    """A batch of which nobody can tell what a sample is."""


def first_samples(batch: Any, samples: int) -> Any:
    """The first samples of a batch, which lie along the first dimension of each of its tensors.

    Args:
        batch: Tensors, in tuples, lists, dictionaries and dataclasses. Numbers, texts and tensors without a dimension
            belong to the batch as a whole.
        samples: How many.

    Returns:
        A batch of the same form.

    Raises:
        UncuttableError: If the tensors have different numbers of rows, or are none that has rows.

    Example:
        >>> x, y = first_samples((torch.zeros(5, 3), torch.ones(5)), 2)
        >>> x.shape, y.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    counts = sorted({_rows(tensor) for tensor in _tensors(batch) if tensor.dim()})
    if not counts:
        raise UncuttableError("there is no tensor with rows in it")
    if len(counts) > 1:
        raise UncuttableError(
            f"its tensors have {' and '.join(map(str, counts))} rows, so these are not one sample each"
        )
    return _cut(batch, samples, counts[0])


def _rows(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        raise UncuttableError("a sparse tensor couples its rows")
    if tensor.is_nested:
        raise UncuttableError("a nested tensor has no rows")
    return len(tensor)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _tensors(getattr(batch, field.name))
    elif batch is not None and not isinstance(batch, (str, bytes, int, float, complex, bool)):
        raise UncuttableError(f"nobody can tell what a sample of a {type(batch).__name__} is")


def _cut(batch: Any, samples: int, rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:samples] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: _cut(value, samples, rows) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(value, samples, rows) for value in batch))
    if isinstance(batch, (tuple, list)):
        texts = len(batch) == rows and all(isinstance(value, (str, bytes)) for value in batch)
        return type(batch)(batch[:samples] if texts else (_cut(value, samples, rows) for value in batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        values = {field.name: _cut(getattr(batch, field.name), samples, rows) for field in fields(batch) if field.init}
        return replace(batch, **values)
    return batch
