"""The recipe on images of digits, on files of its schema."""

import io
import json
import re
import subprocess

import pytest
import torch

import torchdeq_ep_physics as physics
from torchdeq_ep import cli
from torchdeq_ep.errors import DataError, MissingDependencyError
from torchdeq_ep_physics.command import main
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
def test_a_circuit_learns_images_from_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mnist, "ngspice_available", lambda: False)
    for name, count in (("train", 200), ("test", 50)):
        write_images(tmp_path / f"{name}.parquet", count)
    out = tmp_path / "results"
    options = ["--data", str(tmp_path), "--images", "200", "--epochs", "12", "--out", str(out)]
    assert main(["mnist", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[11].startswith("epoch 12: ")
    assert lines[12:] == [
        "ngspice is not installed, so the circuit was not exported",
        f"written: {out / 'mnist.json'}",
    ]
    found = json.loads((out / "mnist.json").read_text())
    assert found["errors"][-1] == pytest.approx(float(lines[11].split()[2].rstrip("%")) / 100)
    assert found["errors"][-1] <= 0.2
    assert (found["images"], found["test_images"], found["export"]) == (200, 50, None)


@pytest.mark.slow
@pytest.mark.skipif(not physics.ngspice_available(), reason="ngspice is not installed")
def test_the_netlist_of_a_trained_circuit_gives_the_voltages_and_classes_of_the_twin(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    pixels = 0.3 * torch.rand(200, 40, generator=generator, dtype=torch.float64)
    for step in range(4):
        pixels[torch.arange(200), 4 * labels + step] = 1.0
    done = mnist.train((pixels, labels), (pixels, labels), epochs=4, batch=20, n_hidden=12)
    path = tmp_path / "circuit.cir"
    export = mnist.exported(done.network, pixels[:100], path)
    assert export.images == 100
    assert export.agreeing >= 99
    assert export.difference < 1e-4
    run = subprocess.run(["ngspice", "-b", str(path)], capture_output=True, text=True, check=True)
    rows = run.stdout.split("@row ")[1:]
    assert len(rows) == 100
    last = dict(re.findall(r"^v\((n\d+)\)\[99\] = (\S+)", rows[99], re.MULTILINE))
    twin = done.network.equilibrium(mnist.as_voltages(pixels[99:100]))[0]
    found = torch.tensor([float(last[f"n{k}"]) for k in range(len(twin))], dtype=torch.float64)
    torch.testing.assert_close(found, twin, atol=1e-4, rtol=0)
    assert float(twin.abs().max()) > 0.1


@pytest.mark.skipif(not physics.ngspice_available(), reason="ngspice is not installed")
@pytest.mark.parametrize("rows", [1, 4])
def test_a_sweep_finds_what_single_operating_points_do(rows):
    network = physics.ResistiveNetwork.layered(6, 5, 3, generator=torch.Generator().manual_seed(0))
    x = 3 * torch.randn(rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spice = physics.Ngspice(network, x)
    torch.testing.assert_close(spice.sweep(), spice(torch.zeros(())), atol=1e-9, rtol=0)


def test_an_export_without_ngspice_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(MissingDependencyError, match="ngspice"):
        main(["mnist", "--data", str(tmp_path / "absent"), "--netlist", str(tmp_path / "circuit.cir")])


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
    assert cli.main(["physics", "mnist", "--data", str(tmp_path)]) == 2
    assert "train.parquet" in capsys.readouterr().err
