"""Decoded images that the processes of one machine hold together."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

import torch

from torchdeq_ep_lightning.flavour import Trainer
from torchdeq_ep_lightning.images import Images, Splits, StreamedImages


def share_on_machine(trainer: Trainer, opened: Splits, held: Splits | None) -> Splits:
    """What the first process of each machine has decoded, mapped from a file into the memory of all of its processes.

    The file lies in the machine's folder for temporary files (`TMPDIR`), and is removed once all have it.

    Args:
        trainer: The trainer of all processes.
        opened: The images as each process has opened them.
        held: The same, decoded; needed in the first process of each machine.

    Returns:
        The decoded images, whose pixels are in memory once.
    """
    if not any(isinstance(part, StreamedImages) for part in opened):
        return opened
    first, strategy = trainer.local_rank == 0, trainer.strategy
    name = f"torchdeq-ep-{strategy.broadcast(uuid.uuid4().hex)}-{trainer.node_rank}"  # machines may share the folder
    folder = Path(tempfile.gettempdir(), name)
    file = folder / "pixels.pt"
    if first:
        folder.mkdir(mode=0o700)
        torch.save([part.pixels for part in held or () if isinstance(part, Images)], file)
    strategy.barrier("images are written")
    pixels = torch.load(file, mmap=True)
    strategy.barrier("images are mapped")
    if first:
        shutil.rmtree(folder)
    return tuple(
        Images(values, part.labels, part.classes, part.origin) for values, part in zip(pixels, opened, strict=True)
    )
