"""Models and data of the tests of the Lightning plugin."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow
import torch
import torchdeq
from PIL import Image
from pyarrow import parquet
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TransformerTask(LightningModule):
    """A DEQ over a transformer block, as a user has it; nothing in it knows of this package."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.read_in = nn.Linear(4, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.read_out = nn.Linear(width, 3)
        self.deq = torchdeq.get_deq(ift=True, f_max_iter=40, f_tol=1e-5)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        drive = self.read_in(x)
        (z,), _ = self.deq(lambda z: 0.2 * torch.tanh(self.block(z)) + drive, torch.zeros_like(drive))
        return self.read_out(z.mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def sequences(rows: int = 16, batch: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, 4, generator=generator)
    y = torch.randint(3, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def fit(
    module: LightningModule,
    folder: Path,
    *callbacks: object,
    loader: DataLoader | None = None,
    ckpt_path: Path | None = None,
    **options,
) -> Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings | options)
    trainer.fit(module, loader or sequences(), ckpt_path=ckpt_path)
    return trainer


def encoded(pixels: Tensor, kind: str = "PNG") -> bytes:
    """An image of shape (H, W) or (H, W, 3) as a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, kind)
    return stream.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list[int]) -> Path:
    """A file in the schema of Hugging Face's image data sets."""
    column = pyarrow.array([None if image is None else {"bytes": image, "path": ""} for image in images])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": column, "label": labels}), path)
    return path


_COLOURS = torch.tensor([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200)])


def coloured_images(count: int, size: int = 32) -> tuple[list[bytes], list[int]]:
    """Images of ten classes, told mirrored and cropped too: stripes of five colours, along or across, on noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    width = size // 8
    places = torch.arange(size) + torch.randint(2 * width, (count, 1), generator=generator)
    stripes = (places // width % 2).float()
    along = (labels >= 5)[:, None, None]
    shades = 0.3 + 0.7 * torch.where(along, stripes[:, :, None], stripes[:, None, :])
    noise = 25 * torch.randn(count, size, size, 3, generator=generator)
    pixels = (shades[..., None] * _COLOURS[labels % 5][:, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return [encoded(image) for image in pixels], labels.tolist()


def write_coloured(folder: Path, train: int, test: int, size: int = 32) -> Path:
    images, labels = coloured_images(train + test, size)
    write_parquet(folder / "train.parquet", images[:train], labels[:train])
    write_parquet(folder / "test.parquet", images[train:], labels[train:])
    return folder
