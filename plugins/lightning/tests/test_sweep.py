"""Sweeps: each run once, by one worker or several, whoever is killed; one study for all that was swept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from lightning_problems import encoded, write_parquet
from optuna.trial import TrialState

from torchdeq_ep.cli import main
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_lightning import studies
from torchdeq_ep_lightning.axes import Range, grid, read_axes, specs_of
from torchdeq_ep_lightning.report import main as report
from torchdeq_ep_lightning.sweep import run_name

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SMALL = [
    *("--data.train_limit", "60", "--data.test_limit", "20", "--data.batch", "20", "--trainer.max_epochs", "2"),
    *("--model.hidden", "[8,8]", "--trainer.accelerator", "cpu", "--alignment.every", "0"),
    *("--homeostasis.enabled", "false", "--checkpoint_every", "1"),
]
SWEEP = ["sweep", "digits-mlp", "--backward", "ift", *SMALL]


def study_of(storage: str | Path, name: str) -> optuna.Study:
    return studies.open_study(name, studies.open_storage(str(storage)))


def in_state(study: optuna.Study, state: TrialState) -> list[dict[str, str]]:
    return [trial.user_attrs["cell"] for trial in studies.state_of(study, state)]


def test_combinations_names_and_ranges():
    fixed, axes = read_axes(
        ["--model.lr", "1e-3", "1e-2", "--data.batch=20", "--x", "-1", "2", "--y", "1..5", "--flag"]
    )
    assert fixed == ["--data.batch", "20", "--flag"]
    assert axes == {"model.lr": ["1e-3", "1e-2"], "x": ["-1", "2"], "y": ["1..5"]}
    assert Range.read("1..5") == Range(1, 5, False, True)
    assert Range.read("1e-4..0.1:log") == Range(1e-4, 0.1, True, False)
    assert Range.read("[12,8]") is None
    specs = specs_of(["ift", "ep", "hep:n_points=4,beta=0.1"], [0.05, 0.5])
    points = grid({"seed": ["0", "1"], "backward": specs, "model.angle": ["0", "90"]})
    names = [run_name(point) for point in points]
    assert len(names) == len(set(names)) == 2 * 4 * 2
    assert "seed1-hep_n_points=4_beta=0.1-angle90" in names
    for wrong in (["--x", "5..1"], ["--x", "0..1:log"]):
        with pytest.raises(InvalidOptionError, match="must rise"):
            grid(read_axes(wrong)[1])
    with pytest.raises(InvalidOptionError, match="--sampler tpe"):
        grid({"x": ["0..1"]})


def test_any_key_is_an_axis_and_all_sweeps_of_a_study_stay(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*SWEEP, "--model.lr", "1e-3", "1e-2", "--seed", "0", "--out", str(out)]) == 0
    first = json.loads((out / "results.json").read_text())["runs"]
    assert {row["axes"]["model.lr"] for row in first} == {"1e-3", "1e-2"}
    assert all(len(row["history"]) == 2 for row in first)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert main([*SWEEP, "--model.lr", "1e-1", "1e-2", "--seed", "0", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["runs"]
    assert {row["axes"]["model.lr"] for row in rows} == {"1e-3", "1e-2", "1e-1"}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert "ift, model.lr 1e-3" in (out / "results.md").read_text()
    capsys.readouterr()
    assert main([*SWEEP, "--seed", "0", "--out", str(out), "--model.lr", "1e-3", "1", "--data.flip", "true"]) == 2
    assert "--data.flip" in capsys.readouterr().err


def test_one_failure_ends_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*SWEEP, "--model.angle", "0", "120", "--seed", "0", "--out", str(out)]) == 1
    assert "1 of 2 runs failed" in (told := capsys.readouterr().err)
    assert "--retry" in told
    runs = json.loads((out / "results.json").read_text())["runs"]
    failures = {row["angle"]: row["failure"] for row in runs}
    assert failures[0.0] == ""
    assert "angle" in failures[120.0]


def test_a_page_tells_all_commands_and_keeps_what_was_written_above(tmp_path):
    out = tmp_path / "out"
    first, second = ([*SWEEP, "--seed", seed, "--out", str(out)] for seed in "01")
    assert main(first) == 0
    page = out / "results.md"
    page.write_text(page.read_text().replace("# Reproduction", "# My runs\n\nWhat I think of them."))
    assert main(second) == main(first) == 0
    assert page.read_text().startswith("# My runs\n\nWhat I think of them.\n")
    assert [
        line[-len(f"--seed 0 --out {out}") :] for line in page.read_text().splitlines() if line.startswith("$")
    ] == [f"--seed {seed} --out {out}" for seed in "10"]
    assert "| ift | - | 2 | 2 |" in page.read_text()


@pytest.mark.parametrize("content", ["notes of my own\n", "# Title\n\n<!-- a comment -->\n"])
def test_a_report_adds_to_a_page_and_takes_nothing_away(tmp_path, content, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    results.write_text(json.dumps({"name": "mine", "recipe": "r", "overrides": [], "command": ["r"], "runs": []}))
    page.write_text(content)
    assert report([str(page), str(results)]) == report([str(page), str(results)]) == 0
    assert page.read_text().startswith(content)
    assert page.read_text().count("## mine") == 1
    before = results.read_text()
    assert report([str(results), str(results)]) == 2
    assert report([str(page), str(tmp_path / "none.json")]) == 2
    assert report([str(page), str(_written(tmp_path / "other.json", "{}"))]) == 2
    assert results.read_text() == before
    assert "other.json is not" in capsys.readouterr().err


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_other_images_are_another_study(tmp_path, capsys):
    folders = []
    for name, labels in (("one", [0, 1, 2] * 20), ("same", [0, 1, 2] * 20), ("other", [2, 1, 0] * 20)):
        (tmp_path / name).mkdir()
        pictures = [encoded(torch.randint(256, (8, 8), dtype=torch.uint8)) for _ in labels]
        for split in ("train", "test"):
            write_parquet(tmp_path / name / f"{split}.parquet", pictures, labels)
        folders.append(str(tmp_path / name))
    out, own = tmp_path / "out", ["--data.cache", str(tmp_path / "cache"), "--seed"]
    commands = [[*SWEEP, *own, str(k), "--data.source", folder] for k, folder in enumerate(folders)]
    assert [main([*command, "--out", str(out)]) for command in commands] == [0, 0, 2]
    assert "other images" in capsys.readouterr().err


def test_a_weight_may_find_itself_beside_fixed_ones(tmp_path):
    weights = ["--homeostasis.weight", "auto", "0.5", "--homeostasis.estimator", "error-vector"]
    sweep = ["sweep", "digits-mlp", "--backward", "ep", *SMALL[:-4], *weights, "--seed", "0"]
    assert main([*sweep, "--out", str(tmp_path / "out")]) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert {row["homeostasis"] for row in runs} == {"auto", 0.5}
    assert "ep, homeostasis auto" in (tmp_path / "out" / "results.md").read_text()


def test_what_never_began_may_be_tried_otherwise(tmp_path, capsys):
    sweep = [*SWEEP, "--seed", "0", "--out", str(tmp_path / "out")]
    assert main([*sweep, "--measure", "test/acc"]) == 1
    assert "no figure for test/acc" in capsys.readouterr().err
    assert main([*SWEEP, "--seed", "0", "--model.angle", "120", "--out", str(tmp_path / "none")]) == 1
    assert main([*SWEEP, "--seed", "0", "--model.angle", "60", "--out", str(tmp_path / "none")]) == 0


def test_a_torn_journal_is_named(tmp_path, capsys):
    sweep, journal = [*SWEEP, "--seed", "0", "--out", str(tmp_path / "out")], tmp_path / "out" / "study.journal"
    assert main(sweep) == 0
    journal.write_bytes(journal.read_bytes()[:-25])
    assert main(sweep) == 2
    assert "cut off" in capsys.readouterr().err
    journal.rename(tmp_path / "torn")
    (result,) = (tmp_path / "out" / "runs").glob("*/result.json")
    before = result.stat().st_mtime_ns
    assert main(sweep) == 0
    assert result.stat().st_mtime_ns == before


def test_a_sampler_draws_from_ranges_and_prunes(tmp_path):
    out = tmp_path / "out"
    drawn = ["--model.lr", "1e-4..1e-1:log", "--model.free_steps", "20..30", "--seed", "0", "1"]
    options = ["--sampler", "tpe", "--trials", "3", "--pruner", "median"]
    assert main([*SWEEP, *drawn, *options, "--out", str(out)]) == 0
    study = study_of(out / "study.journal", "out")
    trials = studies.state_of(study)
    assert len(trials) == 3
    assert len({trial.params["model.lr"] for trial in trials}) == 3
    assert all(1e-4 <= trial.params["model.lr"] <= 1e-1 for trial in trials)
    assert all(20 <= trial.params["model.free_steps"] <= 30 for trial in trials)
    assert {trial.user_attrs["cell"]["seed"] for trial in trials} == {"0", "1"}
    assert all(trial.intermediate_values for trial in trials)
    assert main([*SWEEP, *drawn, *options, "--out", str(out)]) == 0  # nothing is left to do
    assert len(studies.state_of(study_of(out / "study.journal", "out"))) == 3


def test_a_claim_is_of_one_worker_and_a_dead_one_gives_it_back(tmp_path):
    storage = studies.open_storage(str(tmp_path / "study.journal"))
    one, other = (
        studies.open_study("s", each) for each in (storage, studies.open_storage(str(tmp_path / "study.journal")))
    )
    cells = grid({"seed": ["0", "1"]})
    for study in (one, other):
        studies.ask_for(study, study._storage, cells)
    assert len(studies.state_of(one)) == 2
    first, second = studies.claim(one, one._storage), studies.claim(other, other._storage)
    assert first.number != second.number
    assert studies.claim(one, one._storage) is None
    with studies.alive(first), studies.alive(second):
        assert studies.put_back(one, one._storage) == []
        own = second.storage.get_trial(second._trial_id).user_attrs["worker"]
        second.set_user_attr("worker", own | {"start": "another process of that number"})
        assert studies.put_back(one, one._storage) == [second.number]
        assert studies.put_back(other, other._storage) == []
    again = studies.claim(other, other._storage)
    assert again.user_attrs["cell"] == second.user_attrs["cell"]
    with studies.alive(again):
        elsewhere = again.storage.get_trial(again._trial_id).user_attrs["worker"] | {"host": "another"}
        again.set_user_attr("worker", elsewhere)
        assert studies.put_back(one, one._storage) == []
        again.set_user_attr("worker", elsewhere | {"beat": time.time() - 1000})
        assert studies.put_back(one, one._storage) == [again.number]


def test_two_workers_that_look_at_a_file_of_sqlite_at_the_same_time_claim_two_runs(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    slow, quick = (studies.open_study("s", studies.open_storage(url)) for _ in range(2))
    studies.ask_for(slow, slow._storage, grid({"seed": ["0", "1"]}))
    database = slow._storage._backend  # behind a cache
    check, has_read, claimed = database.check_trial_is_updatable, threading.Event(), []

    def check_slowly(*arguments):  # a worker that has read that a run waits, and has not claimed it yet
        check(*arguments)
        has_read.set()
        time.sleep(0.5)

    monkeypatch.setattr(database, "check_trial_is_updatable", check_slowly)
    one = threading.Thread(target=lambda: claimed.append(studies.claim(slow, slow._storage)))
    one.start()
    assert has_read.wait(timeout=60)
    claimed.append(studies.claim(quick, quick._storage))
    one.join()
    assert sorted(trial.number for trial in claimed) == [0, 1]


def test_the_study_is_in_a_journal_unless_a_storage_is_named(tmp_path):
    out, database = tmp_path / "out", tmp_path / "study.db"
    assert main([*SWEEP, "--seed", "0", "--out", str(out)]) == 0
    assert isinstance(studies.open_storage(str(out / "study.journal")), optuna.storages.JournalStorage)
    assert len(in_state(study_of(out / "study.journal", "out"), TrialState.COMPLETE)) == 1
    named = ["--seed", "0", "--out", str(tmp_path / "named"), "--storage", f"sqlite:///{database}"]
    assert main([*SWEEP, *named]) == 0
    assert not (tmp_path / "named" / "study.journal").exists()
    assert len(in_state(study_of(f"sqlite:///{database}", "named"), TrialState.COMPLETE)) == 1


def test_a_storage_that_cannot_be_opened_is_named(tmp_path, capsys):
    assert main([*SWEEP, "--storage", "nosuch://host/name", "--out", str(tmp_path / "out")]) == 2
    assert "nosuch://host/name" in capsys.readouterr().err


def worker(storage: str, out: Path, runs: int) -> subprocess.Popen[bytes]:
    seeds = [str(seed) for seed in range(runs)]
    command = [sys.executable, "-m", "torchdeq_ep.cli", *SWEEP, "--study", "shared", "--storage", storage]
    command += ["--seed", *seeds, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def two_workers_one_killed(storage: str, out: Path, runs: int, kills: int) -> None:
    lasting, dying = worker(storage, out, runs), worker(storage, out, runs)
    try:
        for _ in range(kills):
            kill_in_a_run(dying, storage)
            dying = worker(storage, out, runs)
        assert lasting.wait(timeout=900) == 0
        assert dying.wait(timeout=900) == 0
    finally:
        for process in (lasting, dying):
            process.kill()
    study = study_of(storage, "shared")
    done = Counter(cell["seed"] for cell in in_state(study, TrialState.COMPLETE))
    assert done == {str(seed): 1 for seed in range(runs)}
    assert not studies.state_of(study, TrialState.RUNNING, TrialState.WAITING)
    assert len(studies.state_of(study, TrialState.FAIL)) == kills  # each gave its run back
    assert len(json.loads((out / "results.json").read_text())["runs"]) == runs


def kill_in_a_run(process: subprocess.Popen[bytes], storage: str) -> None:
    for _ in range(3000):
        for trial in studies.state_of(study_of(storage, "shared"), TrialState.RUNNING):
            if trial.user_attrs.get("worker", {}).get("pid") == process.pid:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("no run began")


@pytest.mark.slow
@pytest.mark.parametrize("url", ["", "sqlite:///"], ids=["journal", "sqlite"])
def test_two_workers_on_a_file_one_of_them_killed_twice(url, tmp_path):
    two_workers_one_killed(f"{url}{tmp_path / 'study'}", tmp_path / "out", runs=20, kills=2)


@pytest.mark.slow
def test_jobs_on_one_machine(tmp_path):
    out = tmp_path / "out"
    assert main([*SWEEP, "--seed", "0", "1", "2", "3", "--jobs", "2", "--out", str(out)]) == 0
    study = study_of(out / "study.journal", "out")
    assert sorted(cell["seed"] for cell in in_state(study, TrialState.COMPLETE)) == ["0", "1", "2", "3"]
    workers = {trial.user_attrs["worker"]["pid"] for trial in studies.state_of(study)}
    assert os.getpid() not in workers


def _postgres() -> Path | None:
    """The folder of a server's programs: on the path, or where Debian has them."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    """A server of one's own; it does not run as root."""
    pytest.importorskip("psycopg2")
    programs = _postgres()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    folder = Path("/tmp") / f"torchdeq-ep-postgres-{os.getpid()}"
    folder.mkdir(mode=0o700)
    user = {"user": "nobody"} if os.getuid() == 0 else {}
    if user:
        shutil.chown(folder, "nobody")

    def call(*arguments: str) -> None:
        subprocess.run(arguments, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120, **user)

    port, data = str(20000 + os.getpid() % 20000), str(folder / "data")
    try:
        call(str(programs / "initdb"), "-D", data, "-U", "tester", "--auth", "trust", "--no-sync")
        call(
            str(programs / "pg_ctl"),
            "-D",
            data,
            "-w",
            "-l",
            "log",
            "-o",
            f"-p {port} -k {folder} -h localhost",
            "start",
        )
        yield f"postgresql+psycopg2://tester@localhost:{port}/postgres"
        call(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_workers_on_postgresql_one_of_them_killed(tmp_path, postgresql):
    two_workers_one_killed(postgresql, tmp_path / "out", runs=20, kills=2)
