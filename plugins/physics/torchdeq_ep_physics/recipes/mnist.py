"""A layered resistive network that learns images of digits: `python -m torchdeq_ep_physics.recipes.mnist FOLDER`.

The circuit is that of Kendall et al. 2020 (arXiv 2006.01981) with 1568 inputs, 100 hidden nodes and 10 outputs: each
pixel comes with both signs, each hidden node has two diodes. A bidirectional amplifier behind each hidden node, of
voltage gain `A` and current gain `1 / A`, is the same circuit as one without, in other units: inputs `A` times as high,
and diodes of the law `A I(v / A)`, so of `A` times the saturation current and the ideality. The circuit is built in
these units, so that nothing in it is active, and a netlist of it has resistors, diodes and sources alone.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdeq_ep.errors import DataError, EPError
from torchdeq_ep.extend import check_count, require
from torchdeq_ep_physics.resistive import ResistiveNetwork, differential

VOLTS = 10.0
AMPLIFICATION = 4.0
GAIN = 20.0
BACKGROUND = 0.13
CLASSES = 10


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        network: The circuit.
        errors: Share of the test images that it gets wrong, after each epoch.
        seconds: That each epoch took, without the test.
    """

    network: ResistiveNetwork
    errors: list[float]
    seconds: list[float]


def read_digits(path: str | Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of a Parquet file in the schema of Hugging Face's `datasets`.

    Args:
        path: The file, with a column `image` of encoded files and a column `label`.
        limit: Read the first so many.

    Returns:
        Pixels between 0 and 1, of shape `(count, 784)` in float64, and labels.

    Raises:
        MissingDependencyError: If pyarrow or Pillow is not installed.
        DataError: If the file is none of that kind.
    """
    parquet = require("pyarrow.parquet", "pyarrow", "A Parquet file")
    pillow = require("PIL.Image", "pillow", "An image")
    try:
        table = parquet.read_table(path, columns=["image", "label"]).slice(0, limit)
        labels = torch.tensor(table["label"].to_pylist())
        pictures = [pillow.open(io.BytesIO(image["bytes"])).convert("L") for image in table["image"].to_pylist()]
        pixels = torch.stack([torch.tensor(list(picture.tobytes()), dtype=torch.uint8) for picture in pictures])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be read as images of digits ({type(error).__name__}: {error}). It must be a Parquet file "
            "with the columns image (a struct with the bytes of a PNG file) and label (a number)."
        ) from error
    if pixels.shape[1] != 784 or int(labels.min()) < 0 or int(labels.max()) >= CLASSES:
        raise DataError(f"{path} has images of {pixels.shape[1]} pixels or labels beyond 0 to 9, not MNIST's 28 x 28.")
    return pixels.double() / 255, labels


def as_voltages(pixels: Tensor) -> Tensor:
    """The voltages of the inputs, each pixel with both signs: of shape `(count, 1568)`."""
    return AMPLIFICATION * VOLTS * differential(pixels - BACKGROUND)


def circuit(n_pixels: int = 784, n_hidden: int = 100, seed: int = 0) -> ResistiveNetwork:
    """The untrained circuit.

    Args:
        n_pixels: Pixels of an image.
        n_hidden: Hidden nodes.
        seed: Of the conductances.

    Returns:
        The network; its last ten nodes are the outputs.
    """
    return ResistiveNetwork.layered(
        2 * n_pixels,
        n_hidden,
        CLASSES,
        conductance=1e-6,
        spread=0.3,
        rail=-0.3,
        saturation=1e-12 * AMPLIFICATION,
        ideality=1.0 * AMPLIFICATION,
        generator=torch.Generator().manual_seed(seed),
    )


def scores(z: Tensor) -> Tensor:
    """The logits of the classes: the output voltages, amplified; of shape `(batch, 10)`."""
    return GAIN * z[:, -CLASSES:]


def train(
    images: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int = 3,
    batch: int = 100,
    lr: float = 0.15,
    n_hidden: int = 100,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train the circuit by equilibrium propagation.

    Args:
        images: Pixels and labels to train on.
        test: Pixels and labels to test on.
        epochs: Passes over the images.
        batch: Images in a step of Adam.
        lr: Its learning rate, of the logarithms of the conductances; it falls to zero by a cosine.
        n_hidden: Hidden nodes.
        seed: Of the conductances and of the order of the images.
        say: Called with a line after each epoch.

    Returns:
        The trained circuit, its errors and the time it took.
    """
    for name, value in {"epochs": epochs, "batch": batch, "n_hidden": n_hidden}.items():
        check_count(name, value)
    pixels, labels = images
    network = circuit(pixels.shape[1], n_hidden, seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * (len(pixels) // batch))
    errors: list[float] = []
    seconds: list[float] = []
    for epoch in range(epochs):
        before = time.perf_counter()
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in torch.split(order[: len(order) // batch * batch], batch):
            loss = cross_entropy(scores(network(as_voltages(pixels[chosen]))), labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        seconds.append(time.perf_counter() - before)
        errors.append(error_of(network, *test))
        say(f"epoch {epoch + 1}: {errors[-1]:.2%} of {len(test[0])} test images wrong, {seconds[-1]:.0f} s")
    return Trained(network, errors, seconds)


@torch.no_grad()
def error_of(network: ResistiveNetwork, pixels: Tensor, labels: Tensor) -> float:
    """The share of images that a circuit gets wrong."""
    found = [scores(network(as_voltages(part))).argmax(1) for part in torch.split(pixels, 200)]
    return float((torch.cat(found) != labels).double().mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on a folder with `train.parquet` and `test.parquet`.

    Args:
        arguments: Of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m torchdeq_ep_physics.recipes.mnist", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds train.parquet and test.parquet")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="to train on (default: %(default)s)")
    parser.add_argument("--test-images", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=0.03, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        for name in ("images", "test_images"):
            check_count(name, getattr(options, name))
        train_set = read_digits(options.folder / "train.parquet", options.images)
        test_set = read_digits(options.folder / "test.parquet", options.test_images)
        train(train_set, test_set, epochs=options.epochs, lr=options.lr, seed=options.seed, say=_say)
    except EPError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
