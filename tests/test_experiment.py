"""The homeostasis experiment: its data, its runs, what a second call repeats, and the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchdeq_ep import cli, errors
from torchdeq_ep.experiment import (
    MODES,
    Epoch,
    Images,
    Run,
    Setup,
    gap_closed,
    load_images,
    run_all,
    save_figure,
    table,
    train,
    write_report,
)
from torchdeq_ep.experiment.train import run_name

TINY = Setup(epochs=2, batch=20, hidden=(8, 6), strength=0.7)


def some_images(n: int = 60, seed: int = 0) -> Images:
    """Three classes that are told apart by which third of the pixels is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = 0.3 * torch.rand(n, 12, generator=generator)
    pixels[torch.arange(n)[:, None], 4 * labels[:, None] + torch.arange(4)] += 0.7
    return Images("thirds", pixels[: n // 2], labels[: n // 2], pixels[n // 2 :], labels[n // 2 :])


def plain(run: Run) -> list[dict[str, Any]]:
    """The epochs of a run, without the time they took."""
    return [{k: v for k, v in dataclasses.asdict(e).items() if k != "seconds"} for e in run.epochs]


def encoded(size: tuple[int, int] = (4, 3), value: int = 255, mode: str = "L") -> bytes:
    pillow = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    pillow.new(mode, size, value if mode == "L" else (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[Any], labels: list[Any], **columns: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    rows = [image if image is None else {"bytes": image, "path": None} for image in images]
    parquet.write_table(arrow.table({"image": arrow.array(rows, kind), "label": labels} | columns), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, n in (("train", 6), ("test", 3)):
        values = [20 * k for k in range(n)]
        write_parquet(tmp_path / f"{split}.parquet", [encoded(value=v) for v in values], [k % 3 for k in range(n)])
    return tmp_path


def test_digits_are_split_without_overlap_and_always_alike() -> None:
    pytest.importorskip("sklearn")
    images = load_images()
    assert (len(images.train_x), len(images.test_x), images.n_classes) == (1437, 360, 10)
    assert float(images.train_x.min()) == 0
    assert float(images.train_x.max()) == 1
    torch.manual_seed(99)
    assert load_images().digest() == images.digest()


def test_parquet_in_hugging_faces_schema_is_read(folder: Path) -> None:
    images = load_images(folder)
    assert images.name == folder.name
    assert images.train_x.shape == (6, 12)
    torch.testing.assert_close(images.train_x[:, 0], torch.arange(6) * 20 / 255)
    assert images.test_y.tolist() == [0, 1, 2]


def test_colour_images_keep_their_colours(folder: Path) -> None:
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", [encoded(mode="RGB")], [0])
    assert load_images(folder).train_x.tolist() == [[1.0, 0.0, 0.0] * 12]


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(errors.DataError, match="no folder"):
        load_images(folder / "nowhere")
    (folder / "test.parquet").unlink()
    with pytest.raises(errors.DataError, match=r"no file .*test\.parquet"):
        load_images(folder)


def test_files_that_are_not_parquet_are_named(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1 is how it starts, but not how it goes on")
    with pytest.raises(errors.DataError, match=r"cannot read .*train\.parquet as Parquet"):
        load_images(folder)
    whole = (folder / "test.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DataError, match=r"cannot read .*train\.parquet as Parquet"):
        load_images(folder)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([encoded, b"not a picture"], [0, 1], r"row 1 of .*train\.parquet is not an image"),
        ([encoded, "truncated"], [0, 1], r"row 1 of .*train\.parquet is not an image"),
        ([None, encoded], [0, 1], r"row 0 of .*train\.parquet has no image bytes"),
        ([encoded, b""], [0, 1], r"row 1 of .*train\.parquet has no image bytes"),
        ([encoded, "larger"], [0, 1], r"row 1 of .*shape \(5, 4, 1\), not \(3, 4, 1\)"),
        ([encoded, encoded], [0, None], r"row 1 of .*label None"),
        ([encoded, encoded], [0, -1], r"row 1 of .*label -1"),
        ([encoded, encoded], ["0", "1"], "column 'label' of .* holds string"),
        ([], [], "label|no rows"),
    ],
)
def test_corrupt_rows_are_named(folder: Path, images: list[Any], labels: list[Any], message: str) -> None:
    special = {"truncated": encoded()[:40], "larger": encoded((4, 5))}
    rows = [image() if callable(image) else special.get(image, image) for image in images]  # type: ignore[call-overload]
    write_parquet(folder / "train.parquet", rows, labels)
    with pytest.raises(errors.DataError, match=message):
        load_images(folder)


def test_missing_and_wrong_columns_are_named(folder: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": [b"x"], "digit": [0]}), folder / "train.parquet")
    with pytest.raises(errors.DataError, match=r"no column 'label', only image, digit"):
        load_images(folder)
    parquet.write_table(arrow.table({"image": [b"x"], "label": [0]}), folder / "train.parquet")
    with pytest.raises(errors.DataError, match=r"column 'image' of .* is binary, not a struct"):
        load_images(folder)


def test_splits_of_different_sizes_are_refused(folder: Path) -> None:
    write_parquet(folder / "test.parquet", [encoded((5, 5))], [0])
    with pytest.raises(errors.DataError, match=r"12 values, those of test\.parquet 25"):
        load_images(folder)


def test_missing_reader_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(errors.MissingDependencyError, match=r"torchdeq-ep\[experiment\]"):
        load_images(folder)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_depends_on_its_seed_alone_and_leaves_the_random_state(mode: Any) -> None:
    images = some_images()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = train(TINY, mode, 1, images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert plain(train(TINY, mode, 1, images)) == plain(first)
    assert plain(train(TINY, mode, 2, images)) != plain(first)
    assert first.failure == ""


def test_all_modes_start_from_the_same_network() -> None:
    images = some_images()
    starts = [plain(train(TINY, mode, 0, images))[0] for mode in MODES]
    assert starts[0] == starts[1]
    assert starts[1] == starts[2]
    assert starts[0]["angle"] == pytest.approx(90.0)


def test_homeostasis_aligns_weights_and_error_vectors() -> None:
    setup = dataclasses.replace(TINY, epochs=25, batch=30, strength=0.7, lr=2e-2)
    images = some_images()
    plain_ep, homeostatic = (train(setup, mode, 0, images).epochs[-1] for mode in ("ep", "ep-homeostasis"))
    assert homeostatic.angle < 30 < plain_ep.angle
    assert homeostatic.symmetry > 0.8 > plain_ep.symmetry
    assert homeostatic.cosine > 0.97


def test_a_second_call_repeats_no_finished_run_and_a_third_only_what_is_missing(
    tmp_path: Path,
) -> None:
    images, trained = some_images(), []

    def on_run(mode: str, seed: int) -> None:
        trained.append((mode, seed))

    first = run_all(TINY, images, tmp_path, ["ift", "ep-homeostasis"], 2, on_run)
    assert len(trained) == 4
    assert run_all(TINY, images, tmp_path, ["ift", "ep-homeostasis"], 2, on_run) == first
    assert len(trained) == 4
    victim = tmp_path / "runs" / f"{run_name(TINY, 'ift', 1, images)}.json"
    victim.write_text(victim.read_text()[:50])
    again = run_all(TINY, images, tmp_path, ["ift", "ep-homeostasis"], 2, on_run)
    assert trained[4:] == [("ift", 1)]
    assert [plain(run) for run in again] == [plain(run) for run in first]
    assert not list(tmp_path.rglob("*.part*"))


def test_results_of_another_setup_or_other_data_are_not_taken(tmp_path: Path) -> None:
    images, other = some_images(), some_images(seed=1)
    names = {
        run_name(TINY, "ep", 0, images),
        run_name(dataclasses.replace(TINY, lr=1e-2), "ep", 0, images),
        run_name(TINY, "ep", 0, other),
        run_name(TINY, "ep", 1, images),
        run_name(TINY, "ift", 0, images),
    }
    assert len(names) == 5
    heavier = dataclasses.replace(TINY, strength=0.9)
    assert run_name(heavier, "ep", 0, images) == run_name(TINY, "ep", 0, images)
    assert run_name(heavier, "ep-homeostasis", 0, images) != run_name(TINY, "ep-homeostasis", 0, images)


def test_a_diverging_run_is_kept_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any) -> float:
        raise errors.NudgeDivergedError("too far")

    monkeypatch.setattr(sys.modules[Setup.__module__], "_step", diverge)
    run = train(TINY, "ep", 0, some_images())
    assert run.failure == "epoch 1, step 1: NudgeDivergedError: too far"
    assert [epoch.epoch for epoch in run.epochs] == [0]
    assert run.failure in table([run])


def of_error(mode: Any, seed: int, error: float) -> Run:
    return Run(mode, seed, tuple(Epoch(k, 0.1, error + 5 - k, 0.9, 0.5, 60.0, 1e-4, 0, 60.0) for k in range(6)))


def test_table_and_gap_are_those_of_the_last_epochs(tmp_path: Path) -> None:
    runs = [of_error("ift", 0, 2.0), of_error("ep", 0, 5.0), of_error("ep", 1, 7.0), of_error("ep-homeostasis", 0, 3.0)]
    assert gap_closed(runs) == pytest.approx(0.75)
    assert math.isnan(gap_closed([dataclasses.replace(runs[0], failure="diverged"), *runs[1:]]))
    text = table(runs)
    assert "| EP | 2 | 6.00 ± 1.41 % |" in text
    assert "closes 75% of the gap" in text
    assert "closes" not in table(runs[:2])
    pytest.importorskip("matplotlib")
    save_figure(runs, "some runs", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_holds_the_setup(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document, picture = write_report([of_error("ep", 0, 5.0)], TINY, some_images(), tmp_path)
    assert document.read_text().startswith("# thirds, 12 - 8 - 6 - 3, backward weights at 90°")
    assert "strength 0.7" in document.read_text()
    assert picture.exists()


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"strength": -1.0}, {"probes": 0}, {"hidden": (8,)}],
)
def test_impossible_setups_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidOptionError, match=next(iter(options))):
        Setup(**options)


def test_command_line_end_to_end_on_parquet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    command = ["experiment", "homeostasis", "--data", str(folder), "--out", str(out), "--epochs", "1", "--seeds", "1"]
    assert cli.main([*command, "--hidden", "6", "5", "--batch", "3"]) == 0
    assert "EP with homeostasis" in capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in (out / "runs").iterdir()]
    assert {result["mode"] for result in results} == set(MODES)
    assert (out / "results.md").exists()
    assert (out / "curves.png").exists()


def test_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert cli.main(["experiment", "homeostasis", "--data", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert cli.main(["experiment", "homeostasis", "--epochs", "0"]) == 2
    assert "epochs must be at least 1" in capsys.readouterr().err
