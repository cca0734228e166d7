"""`torchdeq-ep train`: recipes, refusals, resumption after a kill, several processes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from torchdeq_ep.cli import main
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.nn import shifted_dsilu
from torchdeq_ep_lightning import VectorFieldClassifier
from torchdeq_ep_lightning.quiet import quiet_lightning
from torchdeq_ep_lightning.training import _configure, find_recipe, recipes, run

TINY = [
    *("--model.hidden", "[12, 8]", "--data.train_limit", "100", "--data.test_limit", "50", "--data.batch", "20"),
    *("--trainer.max_epochs", "3", "--checkpoint_every", "15", "--alignment.every", "2", "--quiet", "true"),
    *("--trainer.accelerator", "cpu"),
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torchdeq_ep.cli", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "last.ckpt", weights_only=False)["state_dict"]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_and_its_files(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "digits-mlp", "--backward", "ep", "--seed", "4", "--out", str(out), *TINY]) == 0
    assert "digits-mlp, ep, seed 4" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing else in the working directory
    assert {"config.yaml", "csv", "last.ckpt", "result.json", "tensorboard"} <= {path.name for path in out.iterdir()}
    result = json.loads((out / "result.json").read_text())
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    for name in ("test/error", "train/loss", "angle", "alignment/cosine", "alignment/cosine/l1", "nudge/iterations"):
        assert name in result["history"][-1]
    rows = list(csv.DictReader((out / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    assert sum(bool(row["test/error"]) for row in rows) == 3
    before = (out / "result.json").stat().st_mtime_ns
    assert main(["train", "digits-mlp", "--backward", "ep", "--seed", "4", "--out", str(out), *TINY]) == 0
    assert (out / "result.json").stat().st_mtime_ns == before  # a finished run is not repeated


def test_a_run_that_ends_before_it_is_tested(tmp_path, capsys):
    assert main(["train", "digits-mlp", *TINY, "--trainer.max_steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert "not tested" in capsys.readouterr().out


def test_an_epoch_that_is_not_tested_has_no_test_error(tmp_path, capsys):
    out = tmp_path / "out"
    options = [*TINY, "--trainer.max_epochs", "5", "--trainer.check_val_every_n_epoch", "2", "--alignment.every", "0"]
    assert main(["train", "digits-mlp", *options, "--out", str(out)]) == 0
    assert "right after 4 of 5 epochs" in capsys.readouterr().out
    history = json.loads((out / "result.json").read_text())["history"]
    assert [row["epoch"] for row in history if "test/error" in row] == [2, 4]
    assert all({"train/error", "nudge/calls"} <= row.keys() for row in history)


def test_a_run_that_never_began_is_none(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["train", "digits-mlp", *TINY, *out, "--data.source", str(tmp_path / "nowhere")]) == 2
    assert main(["train", "digits-mlp", *TINY, *out]) == 0
    assert main(["train", "digits-mlp", *TINY, *out, "--model.lr", "0.3"]) == 2
    assert "model.lr" in capsys.readouterr().err


def test_who_weighs_homeostasis_has_it(tmp_path):
    weighed = ["--homeostasis.weight", "5", "--homeostasis.probes", "1"]
    for extra, has in ((weighed, True), ([*weighed, "--homeostasis.enabled", "false"], False), ([], False)):
        out = tmp_path / f"{has}{len(extra)}"
        options = ["--data.source", "digits", "--data.shape", "null", *TINY, "--trainer.max_epochs", "1"]
        last = run("table1", [*options, "--alignment.every", "0", *extra, "--out", str(out)]).last
        assert ("homeostasis/penalty" in last) is has


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "-1"], "from 0 to"),
        (["--seed", "99999999999"], "from 0 to"),
        (["--trainer.max_epochs", "0"], "trains nothing"),
        (["--trainer.accelerator", "cuda"], "cuda|CUDA|GPU|gpu"),
        (["--backward", "ep-one-sided:beta=-0.5"], "direction='up'"),
    ],
)
def test_mistakes_are_no_tracebacks(tmp_path, capsys, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("it is none here")
    assert main(["train", "digits-mlp", *TINY, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_runs_are_repeated_by_their_seed(tmp_path):
    options = ["--backward", "ep", "--homeostasis.enabled", "true", *TINY]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("digits-mlp", [*options, "--seed", seed, "--out", str(tmp_path / name)])
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["no-such-recipe"], "no-such-recipe"),
        (["digits-mlp", "--backward", "hepp"], "hepp"),
        (["--out", "x"], "recipe comes first"),
        (["digits-mlp", "--backward", "{1: ep}"], "backward"),
        (["digits-mlp", "--model.angle", "120"], "angle"),
        (["digits-mlp", "--model.angle", "steep"], "model.angle"),
        (["digits-mlp", "--model.no_such_key", "1"], "no_such_key"),
        (["digits-mlp", "--model.activation", "relu"], "activation"),
        (["digits-mlp", "--model.lr", "-1"], "model.lr"),
        (["digits-mlp", "--model.lr_factors", "[1, 2]"], "model.lr_factors"),
        (["digits-mlp", "--model.connections", "[in-l1, l1-l9, l1-out]"], "l9"),
        (["digits-mlp", "--data.batch", "0"], "data.batch"),
        (["digits-mlp", "--data.source", "./nowhere"], "nowhere"),
        (["digits-mlp", "--trainer.max_epochs", "many"], "trainer.max_epochs"),
        (["digits-mlp", "--homeostasis.weight", "-1"], "weight"),
        (["digits-mlp", "--swap.beta", "null"], "beta"),
        (["digits-mlp", "--swap.metric", "network.nothing"], "network.nothing"),
        (["digits-mlp", "--checkpoint_every", "0"], "checkpoint_every"),
        (["digits-mlp", "--seed", "true"], "seed"),
    ],
)
def test_bad_configurations_are_refused_by_key(tmp_path, capsys, arguments, key):
    assert main(["train", *arguments, "--out", str(tmp_path / "out"), "--quiet", "true"]) == 2
    assert key in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--bakward", "--backward"),
        ("--model.lrr", "--model.lr"),
        ("--lr", "--model.lr"),
        ("--trainer.max_epoch", "--trainer.max_epochs"),
        ("--data.bach=3", "--data.batch"),
    ],
)
def test_a_misspelt_option_is_answered_by_the_nearest(tmp_path, capsys, option, near):
    assert main(["train", "digits-mlp", option, "1", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert f"Did you mean {near!r}?" in printed
    assert "usage" not in printed
    assert len(printed.splitlines()) < 5
    assert not (tmp_path / "out").exists()


def test_a_misspelt_key_of_a_file_is_answered_by_the_nearest(tmp_path, capsys):
    own = yaml.safe_load(find_recipe("digits-mlp").read_text())
    own["model"]["hiden"] = own["model"].pop("hidden")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    assert main(["train", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert "Did you mean 'model.hidden'?" in printed
    assert "usage" not in printed


def test_another_configuration_does_not_continue_a_run(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    run("digits-mlp", [*TINY, *out])
    assert main(["train", "digits-mlp", *TINY, *out, "--model.lr", "0.2"]) == 2
    assert "model.lr=0.1" in capsys.readouterr().err
    run("digits-mlp", [*TINY, *out, "--model.lr", "0.2", "--fresh", "true"])


def test_a_recipe_of_ones_own(tmp_path):
    own = yaml.safe_load(find_recipe("digits-mlp").read_text())
    own["model"]["hidden"] = [9]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    result = run(str(tmp_path / "mine.yaml"), [*TINY[2:], "--out", str(tmp_path / "out")])
    assert result.recipe == "mine"
    with pytest.raises(InvalidOptionError, match=r"other\.yaml"):
        find_recipe("other.yaml")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_are_complete(name, tmp_path):
    """Every key that a recipe can have is in it, so that no value of a paper is hidden in the code."""
    plain = yaml.safe_load(find_recipe(name).read_text())
    config = _configure(find_recipe(name), ["--out", str(tmp_path / "out")]).config
    for section in ("model", "swap", "homeostasis"):
        ours = {"connections", "feedback", "damping", "temperature", "lr_factors", "readout_lr_factor"}
        ours |= {"readout_decay_factor", "backward", "seed", "by", "momentum", "max_iter", "shape", "n_classes"}
        ours |= {"on_divergence", "chunk"}
        ours |= {"backward_norm", "last_padding"}  # of one kind of network each
        if not plain["homeostasis"]["enabled"] and section == "homeostasis":
            continue
        assert set(vars(config[section])) - ours <= set(plain[section]), section


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("table1", {"model.lr": 0.01, "model.momentum": 0.9, "data.batch": 50, "swap.max_iter": 20}),
        ("table1", {"swap.on_divergence": "accept", "model.angle": 0.0, "homeostasis.enabled": False}),
        ("fig3", {"model.backward_norm": "fan-in", "model.lr": 0.01, "homeostasis.enabled": False}),
        ("fig4-angle", {"model.angle": 90.0, "model.lr": 1e-4, "homeostasis.weight": 1.0, "model.free_steps": 150}),
        ("fig4-angle", {"model.backward_norm": "fan-in", "model.optimizer": "adamw"}),
        ("fig4-loop", {"homeostasis.weight": 0.1, "model.optimizer": "sgd", "model.momentum": 0.9}),
        ("cifar10-cnn", {"homeostasis.weight": 15.0, "model.free_steps": 250, "data.crop": 2, "data.flip": True}),
        ("cifar10-cnn", {"model.activation": "shifted-dsilu", "model.last_padding": "valid"}),
        ("cifar100-cnn", {"homeostasis.weight": 15.0, "model.hidden": [128, 256, 512, 512], "data.batch": 256}),
        ("cifar100-cnn", {"model.activation": "shifted-dsilu", "model.last_padding": "valid", "data.crop": 2}),
        ("imagenet32-cnn", {"homeostasis.weight": 10.0, "model.activation": "shifted-dsilu", "model.lr": 5e-3}),
        ("imagenet32-cnn", {"model.last_padding": "valid", "data.crop": 2}),
    ],
)
def test_values_of_the_papers(name, expected, tmp_path):
    config = _configure(find_recipe(name), ["--out", str(tmp_path / "out")]).config
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["cifar10-cnn", "cifar100-cnn", "imagenet32-cnn"])
def test_the_last_layer_of_the_papers_cnn_is_one_pixel(name, tmp_path):
    options = vars(_configure(find_recipe(name), ["--out", str(tmp_path / "out")]).config.model)
    model = VectorFieldClassifier(**{**options, "shape": (3, 32, 32), "n_classes": 10, "hidden": [2, 3, 4, 5]})
    assert model.network.shapes == [(2, 16, 16), (3, 8, 8), (4, 4, 4), (5, 1, 1)]
    assert model.network.phi is shifted_dsilu
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("option", "value"),
    [("last_padding", "full"), ("backward_norm", "equal"), ("activation", "silu")],
)
def test_choices_of_the_network_that_are_none(option, value):
    network = {"network": "cnn", "hidden": [4, 4]} if option == "last_padding" else {}
    with pytest.raises(InvalidOptionError, match=option):
        VectorFieldClassifier((1, 8, 8), 10, **network, **{option: value})


@pytest.mark.slow
def test_killed_at_any_step_it_continues_to_the_same_weights(tmp_path):
    options = ["train", "digits-mlp", "--backward", "{0: ift, 1: 'hep:n_points=4'}", "--homeostasis.enabled", "true"]
    options += [*TINY, "--checkpoint_every", "3", "--data.flip", "true", "--data.crop", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(*options, "--out", str(whole)), check=True, env=environment(), timeout=300)
    kills = 0
    for steps in (4, 8):
        process = subprocess.Popen(
            command(*options, "--out", str(broken)), env=environment(), stdout=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                if reached(broken) >= steps:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
    assert kills == 2
    assert not (broken / "result.json").exists()
    subprocess.run(command(*options, "--out", str(broken)), check=True, env=environment(), timeout=300)
    assert torch.load(whole / "last.ckpt", weights_only=False)["global_step"] == 15
    assert same(whole, broken)
    one, other = (json.loads((out / "result.json").read_text())["history"] for out in (whole, broken))
    for row, again in zip(one, other, strict=True):
        assert {"train/error", "nudge/calls", "homeostasis/penalty"} <= set(row)
        assert {**row, "seconds": 0} == {**again, "seconds": 0}


def reached(out: Path) -> int:
    """The step of the checkpoint; 0 if there is none, or it is being replaced."""
    try:
        return torch.load(out / "last.ckpt", weights_only=False)["global_step"]
    except (OSError, RuntimeError, EOFError):
        return 0


def test_spawned_processes_are_refused_by_name(tmp_path):
    options = [*TINY, "--trainer.devices", "2", "--trainer.strategy", "ddp_spawn", "--out", str(tmp_path / "out")]
    with pytest.raises(InvalidOptionError, match=r"strategy ddp, "):
        run("digits-mlp", options)


@pytest.mark.slow
def test_two_processes_are_one_on_the_joined_batch(tmp_path):
    """20 steps in float64. Homeostasis is off: each process draws probes of its own."""
    options = ["train", "digits-mlp", "--backward", "ep:beta=1e-3,tol=1e-10", "--data.train_limit", "400"]
    options += ["--data.test_limit", "50", "--data.batch", "20", "--trainer.max_epochs", "1", "--quiet", "true"]
    options += ["--model.hidden", "[12, 8]", "--model.free_tol", "1e-11", "--alignment.every", "0"]
    options += ["--trainer.precision", "64-true", "--trainer.accelerator", "cpu", "--checkpoint_every", "20"]
    options += ["--homeostasis.enabled", "false"]
    errors = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        arguments = [*options, "--trainer.devices", processes, "--out", str(out)]
        subprocess.run(command(*arguments), check=True, env=environment(), timeout=300)
        errors.append(json.loads((out / "result.json").read_text())["history"][-1])
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert torch.load(tmp_path / "2" / "last.ckpt", weights_only=False)["global_step"] == 20
    start = weights_at_start(options, tmp_path / "start")
    for key, value in one.items():
        assert value.dtype == torch.float64
        assert (value - two[key]).abs().max() < 1e-6
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-2
    for name in ("test/error", "test/loss", "train/loss"):
        assert errors[0][name] == pytest.approx(errors[1][name], abs=1e-5)


def weights_at_start(options: list[str], out: Path) -> dict[str, torch.Tensor]:
    cli = _configure(find_recipe("digits-mlp"), [*options[2:], "--out", str(out)])
    with quiet_lightning():
        cli.instantiate()
    return {key: value.double() for key, value in cli.model.state_dict().items()}
