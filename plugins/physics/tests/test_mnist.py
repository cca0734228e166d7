"""The recipe on images of digits, on files of its schema."""

import io

import pytest
import torch

from torchdeq_ep.errors import DataError
from torchdeq_ep_physics.recipes import mnist

parquet = pytest.importorskip("pyarrow.parquet")
image_module = pytest.importorskip("PIL.Image")
pyarrow = pytest.importorskip("pyarrow")


def write_images(path, count, side=28, column="image"):
    """Images of noise with a bright bar whose place is the class."""
    labels = [k % 10 for k in range(count)]
    pictures = []
    for label in labels:
        pixels = torch.randint(0, 60, (side, side), dtype=torch.uint8)
        pixels[2 * label : 2 * label + 3] = 255
        buffer = io.BytesIO()
        image_module.frombytes("L", (side, side), bytes(pixels.flatten().tolist())).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({column: pictures, "label": labels}), path)


@pytest.mark.slow
def test_a_circuit_learns_images_from_a_folder(tmp_path, capsys):
    for name, count in (("train", 200), ("test", 50)):
        write_images(tmp_path / f"{name}.parquet", count)
    assert mnist.main([str(tmp_path), "--images", "200", "--epochs", "12", "--lr", "0.1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("epoch 12: ")
    assert float(last.split()[2].rstrip("%")) <= 20


def test_images_are_read_and_become_voltages_of_both_signs(tmp_path):
    write_images(tmp_path / "train.parquet", 12)
    pixels, labels = mnist.read_digits(tmp_path / "train.parquet", 11)
    assert labels.tolist() == [*range(10), 0]
    assert pixels.shape == (11, 784)
    assert float(pixels[3].reshape(28, 28)[6:9].min()) == 1.0
    volts = mnist.as_voltages(pixels)
    torch.testing.assert_close(volts[:, :784], -volts[:, 784:])


def test_what_is_no_such_file_is_said(tmp_path, capsys):
    (tmp_path / "text.parquet").write_text("no Parquet")
    write_images(tmp_path / "small.parquet", 3, side=8)
    write_images(tmp_path / "named.parquet", 3, column="picture")
    for name in ("absent", "text", "small", "named"):
        with pytest.raises(DataError, match=name):
            mnist.read_digits(tmp_path / f"{name}.parquet")
    assert mnist.main([str(tmp_path)]) == 2
    assert "train.parquet" in capsys.readouterr().err
    assert mnist.main([str(tmp_path), "--images", "0"]) == 2
