"""The demonstration: what it trains, and what it shows."""

import json

import pytest
import torch

from torchdeq_ep import cli
from torchdeq_ep.measuring import demo

pytest.importorskip("sklearn")
COURSES = tuple(demo.Course(each.name, (0, 12), (0.1, 0.9), (0.5, 0.75), 3.25) for each in demo.CONTENDERS)


def test_the_command_shows_the_courses_and_writes_the_files(monkeypatch, tmp_path, capsys):
    batch = torch.randn(4, 8, 8), torch.randint(10, (4,))
    shown = demo.Demonstration(COURSES, demo.DigitsBlock(), batch)
    monkeypatch.setattr(cli, "demonstrate", lambda epochs, on_progress: shown)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--plot", "a.png", "--markdown", "a.md", "--json", "a.json"]) == 0
    printed = capsys.readouterr().out
    assert all(each.name in printed for each in demo.CONTENDERS)
    assert printed.rstrip().endswith("torchdeq-ep diagnose package.module:function")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert (
        (tmp_path / "a.md").read_text().startswith("| trained by | accuracy | cosine to the exact gradient | seconds |")
    )
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["courses"][1]["alignment"] == [0.5, 0.75]
    assert [row["backward"] for row in written["comparison"]["rows"]] == ["ift", "ep-one-sided", "ep", "aep"]


def test_no_epoch_is_no_training(capsys):
    assert cli.main(["demo", "--epochs", "0"]) == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.slow
def test_contenders_start_from_the_same_weights_and_learn():
    told = []
    shown = demo.demonstrate(1, lambda *step: told.append(step))
    assert [course.name for course in shown.courses] == [each.name for each in demo.CONTENDERS]
    assert len({course.accuracy[0] for course in shown.courses}) == 1
    assert all(course.accuracy[-1] > 0.5 for course in shown.courses)
    exact, alone, kept, corrected = (course.alignment[-1] for course in shown.courses)
    assert min(exact, corrected, kept) > alone
    assert told[-1][1] == told[-1][2]
