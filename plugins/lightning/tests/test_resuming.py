"""A run that is killed anywhere comes to the same weights and rows of results, bit for bit; and runs extend."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import killing
import pytest
import torch

from torchdeq_ep.cli import main
from torchdeq_ep_lightning.training import run

SMALL = [
    *("--model.hidden", "[12, 8]", "--data.test_limit", "50", "--data.batch", "20", "--trainer.max_epochs", "3"),
    *("--trainer.accelerator", "cpu", "--alignment.every", "2", "--quiet", "true", "--data.flip", "true"),
    *("--data.crop", "1", "--checkpoint_every", "1", "--trainer.log_every_n_steps", "4"),
    *("--homeostasis.weight", "0.5", "--swap.tol", "1e-3"),
]
SCHEDULED = ["--backward", "{0: ift, 1: 'ep', 2: 'hep:n_points=4'}"]
AUTOMATIC = [
    *("--homeostasis.weight", "auto", "--homeostasis.estimator", "error-vector", "--homeostasis.descent", "false"),
    *("--backward", "ep", "--swap.amplitude", "relative", "--swap.beta", "null"),
]


def in_a_warm_process(arguments: list[str], folder: Path, where: str | None = None) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchdeq_ep_lightning.training", "killing"])
    folder.mkdir(exist_ok=True)
    process = context.Process(target=killing.main, args=(arguments, where, folder))
    process.start()
    process.join()
    return process.exitcode


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Final weights, and the rows of results without the time they took."""
    weights = torch.load(out / "last.ckpt", weights_only=False)["state_dict"]
    history = json.loads((out / "result.json").read_text())["history"]
    return weights, [{**row, "seconds": 0} for row in history]


def assert_same(one: Path, other: Path) -> None:
    (weights, rows), (again, rows_again) = outcome(one), outcome(other)
    assert rows == rows_again
    assert weights.keys() == again.keys()
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name


def steps(accumulate: int) -> list[str]:
    """Options for three epochs of ten steps; the last of an epoch accumulates what is left."""
    images = 20 * (10 if accumulate == 1 else 10 * accumulate - 2)
    return ["--data.train_limit", str(images), "--trainer.accumulate_grad_batches", str(accumulate)]


def killed_and_resumed(tmp_path: Path, options: list[str], places: list[tuple[int, str]]) -> None:
    """Kill a run of its own at each place, let it go on, and compare."""
    command = ["train", "digits-mlp", *SMALL, *options, "--out", "out"]
    assert in_a_warm_process(command, tmp_path / "whole") == 0
    rows = outcome(tmp_path / "whole" / "out")[1]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert {"train/error", "test/error", "alignment/cosine", "nudge/iterations"} <= set(rows[-1])
    for step, hook in places:
        broken = tmp_path / "broken"
        assert in_a_warm_process(command, broken, f"{step} {hook}") == -signal.SIGKILL, (step, hook)
        assert not (broken / "out" / "result.json").exists()
        assert in_a_warm_process(command, broken) == 0
        assert_same(tmp_path / "whole" / "out", broken / "out")
        shutil.rmtree(broken)


def test_killed_at_the_end_of_an_epoch(tmp_path):
    killed_and_resumed(tmp_path, [*SCHEDULED, *steps(1)], [(10, "on_train_epoch_end")])


AROUND = [*((10, f"on_{name}") for name in ("train_batch_end", "validation_end", "train_batch_start"))]


@pytest.mark.slow
def test_killed_around_the_ends_of_epochs(tmp_path):
    killed_and_resumed(tmp_path, [*SCHEDULED, *steps(1)], [*AROUND, (30, "on_train_end")])


@pytest.mark.slow
def test_killed_where_amplitudes_and_weights_are_remembered(tmp_path):
    options = [*AUTOMATIC, *steps(3), "--trainer.val_check_interval", "0.5", "--checkpoint_every", "4"]
    killed_and_resumed(tmp_path, options, [(7, "on_validation_end"), (21, "on_train_batch_start")])


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "interval"), [(3, "0.5"), (1, "1.0")])
def test_killed_at_every_step(tmp_path, accumulate, interval):
    hooks = ("on_train_batch_start", "on_train_batch_end")
    places = [(step, hooks[step % 2] if step < 30 else "on_train_batch_end") for step in range(1, 31)]
    options = [*SCHEDULED, *steps(accumulate), "--trainer.val_check_interval", interval]
    killed_and_resumed(tmp_path, options, places)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """One run, killed after every single step: 30 times."""
    command = ["train", "digits-mlp", *SMALL, *SCHEDULED, *steps(1), "--out", "out"]
    assert in_a_warm_process(command, tmp_path / "whole") == 0
    for step in range(1, 30):
        assert in_a_warm_process(command, tmp_path / "broken", f"{step} on_train_batch_start") == -signal.SIGKILL
    assert in_a_warm_process(command, tmp_path / "broken") == 0
    assert_same(tmp_path / "whole" / "out", tmp_path / "broken" / "out")


@pytest.mark.slow
def test_two_processes_killed_at_random_steps(tmp_path):
    command = [sys.executable, killing.__file__, "train", "digits-mlp", *SMALL, *AUTOMATIC, *steps(3)]
    command += ["--trainer.devices", "2", "--trainer.val_check_interval", "0.5"]
    plain = os.environ | {"OMP_NUM_THREADS": "1"}

    def two(out: Path, where: str = "") -> int:
        process = subprocess.Popen(
            [*command, "--out", str(out)], env=plain | {killing.WHERE: where}, start_new_session=True
        )
        try:
            return process.wait(timeout=300)
        finally:  # the other process waits for the one that was killed
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    assert two(tmp_path / "whole") == 0
    for step in sorted(random.Random(0).sample(range(1, 30), 5)):
        assert two(tmp_path / "broken", f"{step} on_train_batch_start") == -signal.SIGKILL
    assert two(tmp_path / "broken") == 0
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_ctrl_c_ends_with_a_word_and_the_same_command_goes_on(tmp_path):
    command = ["train", "digits-mlp", *SMALL, "--backward", "ift", *steps(1), "--out", "out"]
    assert in_a_warm_process(command, tmp_path, "4 on_train_batch_start SIGINT") == 130
    printed = (tmp_path / "printed.txt").read_text()
    assert "the same command goes on from the last checkpoint" in printed
    assert "Traceback" not in printed
    assert in_a_warm_process(command, tmp_path) == 0
    assert [row["step"] for row in outcome(tmp_path / "out")[1]] == [10, 20, 30]


TINY = [*SMALL, *steps(1), "--backward", "ep"]
CONSTANT = [*TINY, "--model.schedule", "constant"]  # of a run that is cut short, a cosine would be another


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    spoilt = {
        "empty": b"",
        "torn": whole[: len(whole) // 2],
        "text": b"not a checkpoint",
        "flipped": whole[:3000] + bytes(255 - byte for byte in whole[3000:3400]) + whole[3400:],
    }
    path.write_bytes(spoilt[kind])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("digits-mlp", [*CONSTANT, "--out", str(out)])
    return out


@pytest.mark.parametrize("kind", ["empty", "torn", "text", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, whole, kind):
    out = tmp_path / "out"
    run("digits-mlp", [*CONSTANT, "--trainer.max_steps", "25", "--out", str(out)])
    damage(out / "last.ckpt", kind)
    assert main(["train", "digits-mlp", *CONSTANT, "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert "goes on from" in said[0]
    assert_same(whole, out)


def test_with_no_good_checkpoint_left_a_run_starts_over(tmp_path, capsys, whole):
    out = tmp_path / "out"
    run("digits-mlp", [*CONSTANT, "--trainer.max_steps", "25", "--out", str(out)])
    for name in ("last.ckpt", "before.ckpt"):
        damage(out / name, "torn")
    (out / "result.json").write_text('{"recipe": ')
    assert main(["train", "digits-mlp", *CONSTANT, "--out", str(out)]) == 0
    assert "starts over" in capsys.readouterr().err
    assert_same(whole, out)


def test_a_damaged_configuration_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    run("digits-mlp", [*CONSTANT, "--trainer.max_steps", "2", "--out", str(out)])
    (out / "config.yaml").write_text("")
    assert main(["train", "digits-mlp", *CONSTANT, "--out", str(out)]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err
    assert (out / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [
        (["--trainer.max_epochs", "1"], ["--trainer.max_epochs", "3"]),
        (["--trainer.max_steps", "13"], ["--trainer.max_steps", "-1"]),
        (["--trainer.max_steps", "10"], ["--trainer.max_steps", "30"]),
    ],
)
def test_a_finished_run_is_extended_to_what_the_longer_one_is(tmp_path, whole, shorter, longer):
    run("digits-mlp", [*CONSTANT, *shorter, "--out", str(tmp_path / "out")])
    run("digits-mlp", [*CONSTANT, *longer, "--out", str(tmp_path / "out")])
    assert_same(whole, tmp_path / "out")


def test_an_extended_run_goes_on_by_the_schedule_of_the_longer_one(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    run("digits-mlp", [*TINY, *out, "--trainer.max_epochs", "1"])
    first = torch.load(tmp_path / "out" / "last.ckpt", weights_only=False)["optimizer_states"][0]["param_groups"]
    assert first[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert len(run("digits-mlp", [*TINY, *out, "--trainer.max_epochs", "2"]).history) == 2
    weights = torch.load(tmp_path / "out" / "before.ckpt", weights_only=False)
    assert weights["global_step"] == 19
    rate = weights["optimizer_states"][0]["param_groups"][0]["lr"]
    highest = weights["lr_schedulers"][0]["base_lrs"][0]
    assert rate == pytest.approx(highest * (1 + torch.cos(torch.tensor(torch.pi * 19 / 20)).item()) / 2, rel=1e-3)
    assert main(["train", "digits-mlp", *TINY, *out, "--trainer.max_epochs", "1"]) == 2
    assert "longer, not shorter" in capsys.readouterr().err
