"""A layered resistive network that learns images of digits: `torchdeq-ep physics mnist --data FOLDER`.

The circuit is that of Kendall et al. 2020 (arXiv 2006.01981) with 1568 inputs, 100 hidden nodes and 10 outputs: each
pixel comes with both signs, each hidden node has two diodes. A bidirectional amplifier behind each hidden node, of
voltage gain `A` and current gain `1 / A`, is the same circuit as one without, in other units: inputs `A` times as high,
and diodes of the law `A I(v / A)`, so of `A` times the saturation current and the ideality. The circuit is built in
these units, so that nothing in it is active, and a netlist of it has resistors, diodes and sources alone.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdeq_ep.errors import DataError
from torchdeq_ep.extend import check_count, require, write_text
from torchdeq_ep_physics.ngspice import Ngspice
from torchdeq_ep_physics.recipes.records import write_results
from torchdeq_ep_physics.resistive import ResistiveNetwork, differential
from torchdeq_ep_physics.spice_process import ngspice_available

VOLTS = 10.0
AMPLIFICATION = 4.0
GAIN = 20.0
BACKGROUND = 0.13
CLASSES = 10
PLAYED = 100
"""Test images that the netlist plays."""


@dataclass(frozen=True)
class Exported:
    """How far ngspice, on the netlist of a circuit, agrees with the twin.

    Args:
        images: That both were given.
        agreeing: To how many of them both gave the same class.
        difference: The largest difference of a voltage, in volts.

    Example:
        >>> Exported(100, 99, 2e-9).line()
        'netlist in ngspice: 99 of 100 classes as the twin has them, voltages within 2e-09 V'
    """

    images: int
    agreeing: int
    difference: float

    def line(self) -> str:
        """It in words."""
        return (
            f"netlist in ngspice: {self.agreeing} of {self.images} classes as the twin has them, "
            f"voltages within {self.difference:.1g} V"
        )


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        network: The circuit.
        errors: Share of the test images that it gets wrong, after each epoch.
        seconds: That each epoch took, without the test.
        export: How far ngspice agrees, if it was asked.
    """

    network: ResistiveNetwork
    errors: list[float]
    seconds: list[float]
    export: Exported | None = None


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


@torch.no_grad()
def exported(
    network: ResistiveNetwork, pixels: Tensor, path: str | Path | None = None, *, timeout: float = 1800.0
) -> Exported:
    """Simulate a circuit in ngspice, as a netlist that plays images, and compare it with the twin.

    Args:
        network: The circuit.
        pixels: The images, of shape `(count, n_pixels)`.
        path: Where the netlist is kept; by default nowhere.
        timeout: Seconds for ngspice.

    Returns:
        How far the two agree.

    Raises:
        MissingDependencyError: If ngspice is not installed.
        NgspiceError: If it found no operating point.
        InvalidOptionError: If the netlist cannot be written.
    """
    spice = Ngspice(network, as_voltages(pixels), timeout=timeout)
    deck = spice.swept()
    if path is not None:
        write_text(path, deck)
    voltages, twin = spice.sweep(deck), network(as_voltages(pixels))
    agreeing = int((scores(voltages).argmax(1) == scores(twin).argmax(1)).sum())
    return Exported(len(pixels), agreeing, float((voltages - twin).abs().max()))


def run(
    folder: str | Path,
    *,
    images: int = 10_000,
    epochs: int = 3,
    seed: int = 0,
    netlist: str | Path | None = None,
    timeout: float = 1800.0,
    path: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train on a folder with `train.parquet` and `test.parquet`, and export the circuit where ngspice is installed.

    Args:
        folder: The folder.
        images: How many to train on.
        epochs: Passes over them.
        seed: Of the conductances and of the order of the images.
        netlist: Where the netlist is kept; by default nowhere.
        timeout: Seconds for ngspice.
        path: Where the figures are written, as JSON; by default nowhere.
        say: Called with a line after each epoch, and after the export.

    Returns:
        What it came to.

    Raises:
        DataError: If the folder has no such files.
        MissingDependencyError: If a netlist is wanted and ngspice is not installed.
    """
    check_count("images", images)
    train_set = read_digits(Path(folder, "train.parquet"), images)
    test_set = read_digits(Path(folder, "test.parquet"))
    before = time.process_time()
    done = train(train_set, test_set, epochs=epochs, seed=seed, say=say)
    spent = time.process_time() - before
    if netlist is not None or ngspice_available():
        export = exported(done.network, test_set[0][:PLAYED], netlist, timeout=timeout)
        say(export.line())
        done = replace(done, export=export)
    if path is not None:
        about = {"images": len(train_set[0]), "test_images": len(test_set[0]), "seed": seed}
        figures = {"errors": done.errors, "seconds": done.seconds, "processor_seconds": spent}
        write_results(path, {**about, **figures, "export": asdict(done.export) if done.export else None})
    return done


if __name__ == "__main__":
    from torchdeq_ep import cli

    sys.exit(cli.main(["physics", "mnist", "--data", *sys.argv[1:]]))
