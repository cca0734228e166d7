"""Decoded images that the processes of one machine hold together."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from torchdeq_ep_lightning.flavour import Trainer
from torchdeq_ep_lightning.images import Images, Splits, StreamedImages


def share_on_machine(trainer: Trainer, opened: Splits, held: Splits | None) -> Splits:
    """What the first process of each machine has decoded, mapped from a file into the memory of all of its processes.

    The file lies in that process's folder for temporary files (`TMPDIR`), and is removed once all have it.

    Args:
        trainer: The trainer of all processes.
        opened: The images as each process has opened them.
        held: The same, decoded; needed in the first process of each machine.

    Returns:
        The decoded images, whose pixels are in memory once.
    """
    if not any(isinstance(part, StreamedImages) for part in opened):
        return opened
    is_first, broadcast = trainer.local_rank == 0, trainer.strategy.broadcast
    own = tempfile.mkdtemp(prefix="torchdeq-ep-") if is_first else ""
    try:
        folders = [broadcast(own, src=node * trainer.num_devices) for node in range(trainer.num_nodes)]
        pixels = _mapped(trainer, Path(folders[trainer.node_rank]) / "pixels.pt", held)
    finally:
        if is_first:
            _remove(own)
    return tuple(
        Images(values, part.labels, part.classes, part.origin) for values, part in zip(pixels, opened, strict=True)
    )


def _mapped(trainer: Trainer, file: Path, held: Splits | None) -> list[Tensor]:
    if trainer.local_rank == 0:
        torch.save([part.pixels for part in held or () if isinstance(part, Images)], file)
    trainer.strategy.barrier("images are written")
    pixels: list[Tensor] = torch.load(file, mmap=True)
    trainer.strategy.barrier("images are mapped")
    return pixels


def _remove(folder: str) -> None:
    # Some file systems keep a file, or its place, as long as it is mapped.
    shutil.rmtree(folder, ignore_errors=True)
    if Path(folder).exists():
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
