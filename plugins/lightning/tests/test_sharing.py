"""Decoded images are in memory once on each machine, and the file through which they came is gone."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_problems import encoded, write_parquet
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from torchdeq_ep_lightning import ImageData, images
from torchdeq_ep_lightning.sharing import share_on_machine


class _Watching(LightningModule):
    """Keeps the sums of the images it is shown, one file for each process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight, self.folder, self.sums = torch.nn.Parameter(torch.zeros(())), folder, []

    def training_step(self, batch, batch_idx):
        self.sums.append(batch[0].sum())
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.sums.append(batch[0].sum())

    def on_train_end(self) -> None:
        torch.save(torch.stack(self.sums), self.folder / f"sums{self.global_rank}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def watched(folder: Path, data: ImageData, processes: int) -> Tensor:
    """The sum over all processes of what each batch holds."""
    options = {"devices": processes} if processes == 1 else {"devices": processes, "strategy": "ddp_fork"}
    folder.mkdir()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_epochs=1, accelerator="cpu", use_distributed_sampler=False, **quiet, **options)
    trainer.fit(_Watching(folder), data)
    return sum(torch.load(folder / f"sums{rank}") for rank in range(processes))


def test_the_processes_of_a_machine_decode_each_image_once(tmp_path, monkeypatch):
    pictures = [encoded(torch.randint(256, (6, 5, 3), dtype=torch.uint8)) for _ in range(20)]
    for split, count in (("train", 20), ("test", 4)):
        write_parquet(tmp_path / f"{split}.parquet", pictures[:count], [k % 4 for k in range(count)])
    decode, log = images.decode_image, tmp_path / "log"

    def logged(*image):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return decode(*image)

    monkeypatch.setattr(images, "decode_image", logged)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "temporary").mkdir()
    options = {"cache": str(tmp_path / "cache"), "batch": 4, "test_batch": 2, "flip": True}
    one = watched(tmp_path / "1", ImageData(str(tmp_path), **options), 1)
    log.unlink()
    two = watched(tmp_path / "2", ImageData(str(tmp_path), **options), 2)
    assert torch.allclose(one, two)
    counts = sorted(Counter(log.read_text().split()).values())
    opened = 2  # the first image of each split, for its shape
    assert counts == [opened, opened + 24]
    assert not list((tmp_path / "temporary").glob("torchdeq-ep-*"))


def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, devices: int) -> tuple[list, tuple]:
    """What the processes of some machines get whose folder for temporary files is one, and what was decoded."""
    pictures = [encoded(torch.randint(256, (6, 5, 3), dtype=torch.uint8)) for _ in range(4)]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", pictures, [0, 1, 2, 3])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    columns, cache = ("image", "label"), str(tmp_path / "cache")
    opened = images.open_images(str(tmp_path), ("train", "test"), columns, (None, None), cache, None)
    held = images.decoded(opened, 1)
    barrier, told = threading.Barrier(nodes * devices), {}

    def process(rank):
        def broadcast(value, src):
            if rank == src:
                told[src] = value
            barrier.wait(60)
            return told[src]

        strategy = SimpleNamespace(broadcast=broadcast, barrier=lambda _: barrier.wait(60))
        place = {"node_rank": rank // devices, "local_rank": rank % devices}
        trainer = SimpleNamespace(num_nodes=nodes, num_devices=devices, strategy=strategy, **place)
        return share_on_machine(trainer, opened, None if rank % devices else held)

    with ThreadPoolExecutor(nodes * devices) as pool:
        return list(pool.map(process, range(nodes * devices))), held


@pytest.mark.parametrize(("nodes", "devices"), [(1, 3), (2, 1), (2, 2)])
def test_every_process_has_what_the_first_one_of_its_machine_has_decoded(tmp_path, monkeypatch, nodes, devices):
    found, held = shared(tmp_path, monkeypatch, nodes, devices)
    for parts in found:
        assert all(torch.equal(part.pixels, own.pixels) for part, own in zip(parts, held, strict=True))
    assert not list((tmp_path / "temporary").glob("torchdeq-ep-*"))


def test_what_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def full(tensors, file):
        Path(file).write_bytes(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        shared(tmp_path, monkeypatch, 1, 1)
    assert not list((tmp_path / "temporary").glob("torchdeq-ep-*"))
