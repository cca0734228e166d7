"""The papers' experiments at a small size, and the sweep over them."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from lightning_problems import write_coloured

from torchdeq_ep.cli import main
from torchdeq_ep_lightning.report import main as report
from torchdeq_ep_lightning.sweep import cells
from torchdeq_ep_lightning.training import run

SMALL = [
    *("--data.train_limit", "100", "--data.test_limit", "50", "--data.batch", "20", "--trainer.max_epochs", "1"),
    *("--model.hidden", "[12, 8]", "--trainer.accelerator", "cpu", "--alignment.every", "2"),
]


def test_every_combination_is_a_run():
    names = [
        cell.name for cell in cells(["ift", "ep", "hep:n_points=4,beta=0.1"], [0.05, 0.5], [0, 90], [0, 1], [0, 1])
    ]
    assert len(names) == len(set(names)) == 4 * 2 * 2 * 2
    assert "hep_n_points=4_beta=0.1-angle90-homeostasis1-seed1" in names


def test_a_sweep_continues_and_draws_its_figures(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "sweep",
        "digits-mlp",
        "--backward",
        "ift",
        "ep",
        "--angle",
        "0",
        "90",
        "--seed",
        "0",
        "--out",
        str(out),
    ]
    assert main([*arguments, *SMALL]) == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 4
    figures = ("error-angle.png", "error-epochs.png", "cosine.png", "symmetry.png")
    assert all((out / name).stat().st_size > 5000 for name in figures)
    page = (out / "results.md").read_text()
    assert page.count("| ift |") == page.count("| ep |") == 2
    finished = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert main([*arguments, *SMALL, "--seed", "0", "1"]) == 0
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 8
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())  # what was there is kept
    assert report([str(tmp_path / "page.md"), str(out / "results.json")]) == 0
    assert (tmp_path / "page.md").read_text() == (out / "results.md").read_text()
    assert main(["sweep", "no-such-recipe"]) == 2
    assert main(["sweep", "digits-mlp", "--backward", "hepp"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "wiring"),
    [
        ("fig4-angle", []),
        ("fig4-loop", ["--model.connections", "[in-l1, l1-l2, l2-l3, l3-l1, l3-out]"]),
    ],
)
def test_homeostasis_improves_the_error_in_every_seed(tmp_path, recipe, wiring):
    options = ["--data.source", "digits", "--data.shape", "null", "--model.hidden", "[64, 64, 10]", *wiring]
    options += [
        "--model.optimizer",
        "adamw",
        "--model.lr",
        "2e-3",
        "--model.schedule",
        "cosine",
        "--model.damping",
        "0.3",
    ]
    options += [
        "--trainer.max_epochs",
        "12",
        "--alignment.every",
        "0",
        "--quiet",
        "true",
        "--trainer.accelerator",
        "cpu",
    ]
    options += ["--backward", "ep-infinitesimal", "--homeostasis.probes", "1"]
    for seed in range(3):
        losses = []
        for weight in ("0", "10"):
            choice = ["--homeostasis.weight", weight, "--homeostasis.enabled", "true" if weight != "0" else "false"]
            result = run(recipe, [*options, *choice, "--seed", str(seed), "--out", str(tmp_path / f"{weight}-{seed}")])
            losses.append(result.last["test/error"])
        assert losses[1] < losses[0], (seed, losses)


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["ift", "ep", "hep:n_points=4"])
def test_the_convolutional_network_learns(tmp_path, backward):
    """One epoch of 2,000 images at a quarter of the width; the images are made up, in the schema of CIFAR-10."""
    source = write_coloured(tmp_path / "data", 2000, 200)
    out = tmp_path / "out"
    options = ["--backward", backward, "--data.source", str(source), "--data.image_column", "image", "--quiet", "true"]
    options += ["--model.hidden", "[32, 64, 128, 128]", "--data.batch", "50", "--homeostasis.enabled", "false"]
    options += ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    options += ["--trainer.max_epochs", "1", "--out", str(out)]
    result = run("cifar10-cnn", options)
    losses = per_step(out)
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5])
    assert result.last["test/loss"] < 2.3  # of a guess


def per_step(out: Path) -> list[float]:
    rows = list(csv.DictReader(next((out / "csv").glob("*/metrics.csv")).read_text().splitlines()))
    return [float(row["train/step_loss"]) for row in rows if row.get("train/step_loss")]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backward", ["ift", "ep", "hep:n_points=4"])
def test_a_step_at_full_width_on_a_gpu(tmp_path, backward, record_property):
    source = write_coloured(tmp_path / "data", 512, 256)
    torch.cuda.reset_peak_memory_stats()
    options = ["--backward", backward, "--data.source", str(source), "--data.image_column", "image", "--quiet", "true"]
    options += ["--trainer.max_epochs", "2", "--trainer.accelerator", "gpu", "--out", str(tmp_path / "out")]
    start = time.perf_counter()
    result = run("cifar10-cnn", options)
    torch.cuda.synchronize()
    record_property("seconds_per_step", (time.perf_counter() - start) / result.last["step"])
    record_property("peak_gib", torch.cuda.max_memory_allocated() / 2**30)
    assert result.last["train/loss"] < 10
