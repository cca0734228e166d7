"""The page on reproduction has the rows that its script makes of the recorded runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reproduction.md"


@pytest.fixture(scope="module")
def script(docs_script):
    pytest.importorskip("yaml")
    return docs_script("figures/reproduction")


def test_the_page_has_the_rows_of_the_recorded_runs(script):
    runs = json.loads(script.DIRECTIONS.read_text())["runs"]
    page = PAGE.read_text()
    changed = [{**runs[0], "seed": 7, "history": runs[1]["history"]}, *runs[1:]]
    for begin, end, table in (
        (script.BEGIN, script.END, script.table),
        (script.BEGIN_MEANS, script.END_MEANS, script.means),
    ):
        assert script.insert(page, begin, end, table(runs)) == page
        assert script.insert(page, begin, end, table(changed)) != page


def test_uphill_is_the_worst_of_the_large_nudges_at_every_number_of_steps(script):
    runs = json.loads(script.DIRECTIONS.read_text())["runs"]
    errors = {
        (*script.named(run), run["seed"]): {row["step"]: row["test/error"] for row in run["history"]} for run in runs
    }
    uphill = {key[2]: found for key, found in errors.items() if key[:2] == ("ep-one-sided:direction=up", "0.5")}
    assert set(uphill) == {0, 1, 2}
    for seed, found in uphill.items():
        for other in ("ep-one-sided", "ep"):
            shared = found.keys() & errors[other, "0.5", seed].keys()
            assert shared
            assert all(found[step] > errors[other, "0.5", seed][step] for step in shared)


def test_logs_of_runs_are_gathered_finished_or_not(script, tmp_path):
    def log(name, version, lines):
        folder = tmp_path / name / "csv" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,nudge/unconverged,step,test/error,train/error\n" + lines)
        (tmp_path / name / "config.yaml").write_text("backward: 'ep:beta=0.5'\nseed_everything: 3\n")

    # Lightning writes what is measured in training and in evaluation into lines of their own.
    log("resumed", 0, ",,50,,88.0\n0,,199,60.0,\n0,0.25,199,,70.0\n1,,399,41.0,\n")
    log("resumed", 1, "1,,399,40.0,\n1,0.5,399,,45.0\n")
    log("just begun", 0, ",,50,,88.0\n")
    (run,) = script.gather([tmp_path, tmp_path])
    assert (run["backward"], run["seed"]) == ("ep:beta=0.5", 3)
    assert [(row["step"], row["test/error"], row["train/error"]) for row in run["history"]] == [
        (200, 60.0, 70.0),
        (400, 40.0, 45.0),
    ]
    other = {**run, "seed": 4, "history": [{"step": 1000, "test/error": 30.0}, {"step": 2000, "test/error": 20.0}]}
    exact = {**other, "backward": "ift"}
    lines = script.table([other, {**other, "seed": 5, "history": other["history"][:1]}, exact]).splitlines()
    assert lines[0] == "| nudge | seeds | 1,000 steps | 2,000 steps | missed |"
    assert lines[2] == "| symmetric, 0.5 | 4, 5 | 30.0, 30.0 | 20.0, - | - |"
    assert lines[3] == "| exact | 4 | 30.0 | 20.0 | - |"
    unheard = {**other, "backward": "ep:stencil=own,beta=auto"}
    assert script.table([unheard]).splitlines()[2].startswith("| `ep:stencil=own`, auto | 4 |")
    longer = {**run, "history": [*run["history"], *other["history"]]}
    assert script.gather([tmp_path], [longer, other]) == [longer, other]  # what is recorded stays, if it is longer
    assert script.gather([tmp_path], [unheard, exact]) == [run, exact, unheard]
    done = {"history": [{"step": 200, "seconds": 1.0}, {"step": 400, "seconds": 6.0}]}
    (tmp_path / "resumed" / "result.json").write_text(json.dumps(done))
    (timed,) = script.gather([tmp_path])
    assert [row["seconds"] for row in timed["history"]] == [1.0, 6.0]
    untimed = {**timed, "seed": 4, "history": [{"step": 400, "test/error": 42.0}, {"step": 900, "test/error": 1.0}]}
    rows = script.means([timed, untimed, {**exact, "history": exact["history"][:1]}]).splitlines()
    assert rows[0] == "| nudge | test error at 0.5 | steps | ms a step |"
    assert rows[2] == "| symmetric | 41.0 ± 1.4 | 400 | 15 |"  # what both have; the time of the one that has it
    assert rows[3] == "| exact | 30.0 | 1,000 | - |"
    script.draw([run, exact, unheard], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert script.main([str(tmp_path / "nowhere")]) == 2


def test_the_page_has_the_times_that_were_recorded(docs_script):
    steps = docs_script("figures/steps")
    record, page = json.loads(steps.RESULTS.read_text()), PAGE.read_text()
    assert steps.insert(page, steps.BEGIN, steps.END, steps.tables(record)) == page
    changed = json.loads(json.dumps(record))
    changed["now"] = [{**run, "ift": {"bare_calls": 1.0, "milliseconds": 1.0}} for run in changed["now"]]
    assert steps.insert(page, steps.BEGIN, steps.END, steps.tables(changed)) != page
    assert "papers' code" not in steps.tables({key: value for key, value in record.items() if key != "papers"})


def test_the_page_has_the_angles_that_were_recorded(docs_script, tmp_path):
    angles = docs_script("figures/angles")
    runs, page = json.loads(angles.ANGLES.read_text())["runs"], PAGE.read_text()
    assert angles.insert(page, angles.BEGIN, angles.END, angles.table(runs)) == page
    short, long = (
        {"backward": "ift", "angle": 30.0, "seed": 0, "images": None, "history": [{"step": step, "test/error": 9.0}]}
        for step in (100, 200)
    )
    lines = angles.table([short, {**short, "seed": 1}, long]).splitlines()
    assert lines[2] == "| 100 | 30° | 0, 1 | 9.0, 9.0 | - | - | - |"
    assert lines[3] == "| 200 | 30° | 0 | 9.0 | - | - | - |"
    angles.draw(runs, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000


def test_finished_runs_at_angles_are_gathered(docs_script, tmp_path):
    angles, folder = docs_script("figures/angles"), tmp_path / "one"
    folder.mkdir()
    history = [{"epoch": 1, "step": 50, "test/error": 7.0, "alignment/cosine": 0.5, "seconds": 3.0}]
    (folder / "result.json").write_text(json.dumps({"backward": "ift", "seed": 2, "history": history}))
    (folder / "config.yaml").write_text("model:\n  angle: 60.0\ndata:\n  batch: 5\n")
    (run,) = angles.gather([tmp_path])
    assert (run["backward"], run["angle"], run["seed"]) == ("ift", 60.0, 2)
    assert run["history"] == [{"step": 50, "test/error": 7.0, "alignment/cosine": 0.5}]
    assert angles.gather([tmp_path], [run]) == [run]
    assert angles.gather([], [run]) == [run]


def test_the_page_has_the_steps_of_the_wide_network(docs_script):
    wide = docs_script("figures/cnn_step")
    rows, page = json.loads(wide.RESULTS.read_text())["rows"], PAGE.read_text()
    assert set(rows) == set(wide.ROWS)
    assert wide.insert(page, wide.BEGIN, wide.END, wide.table(rows)) == page
    rows["exact"]["seconds"] *= 2
    assert wide.insert(page, wide.BEGIN, wide.END, wide.table(rows)) != page
