"""The table of a comparison, in every form that it has."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.measuring.rows import Row
from torchdeq_ep.measuring.tables import Comparison, to_rich

ROWS = (
    Row("ift", "own", 1e-7, 1.0, 2e-7, 1.0, 1e-7, 10, 2.0, 0.5, 0.0, True),
    Row("ep", "own", 1e-3, 0.99, 2e-3, 0.98, 1e-5, 14, 1.5, 0.25, 0.005, True, ("EPWarning: a | b",)),
    Row("ep", "anderson", 1e-4, 0.999, 2e-4, 0.999, 1e-5, 20, 3.0, 0.25, 0.005, True),
    Row("hep", "own", error="NotHolomorphicError: abs"),
)
TABLE = Comparison(ROWS, "dense", 24, "cpu", 5)


def test_markdown_dataframe_and_dictionary_agree() -> None:
    pytest.importorskip("pandas")
    frame, plain, markdown = TABLE.to_dataframe(), TABLE.to_dict(), TABLE.to_markdown().splitlines()
    assert list(frame.columns) == [field.name for field in dataclasses.fields(Row)]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(frame) == len(plain["rows"]) == len(markdown) - 2 == 4
    for k, row in enumerate(ROWS):
        cells = [cell.strip() for cell in markdown[k + 2].replace("\\|", "!").strip("|").split("|")]
        assert cells[:2] == [row.backward, row.solver]
        assert (plain["rows"][k]["backward"], frame["solver"][k]) == (row.backward, row.solver)
        if row.error:
            assert plain["rows"][k]["gradient_error"] is None
            assert math.isnan(frame["gradient_error"][k])
            assert cells[2] == "-"
            assert cells[-1] == row.error
        else:
            assert float(cells[2]) == plain["rows"][k]["gradient_error"] == frame["gradient_error"][k]
            assert float(cells[11]) == plain["rows"][k]["milliseconds"] == frame["milliseconds"][k]
            assert float(cells[12]) == plain["rows"][k]["relative_time"]
    assert len({line.replace("\\|", "").count("|") for line in markdown}) == 1


def test_the_sentence_reads_the_table() -> None:
    assert TABLE.sentence() == (
        "Next to ift, ep / anderson is closest to the exact gradient (error 2e-04) and ep is the fastest "
        "(0.75 times ift); hep could not be used."
    )
    unconverged = dataclasses.replace(ROWS[1], converged=False)
    assert "ep / anderson is closest to the exact gradient (error 2e-04) and the fastest (1.5 times ift)" in (
        dataclasses.replace(TABLE, rows=(ROWS[0], unconverged, ROWS[2])).sentence()
    )
    assert dataclasses.replace(TABLE, rows=ROWS[3:]).sentence() == "No mode could be measured: hep failed."


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_written_whole(tmp_path: Any, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    TABLE.plot(tmp_path / f"figure{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"figure{suffix}"]
    start = (tmp_path / f"figure{suffix}").read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
    with pytest.raises(InvalidOptionError, match="no directory"):
        TABLE.plot(tmp_path / "missing" / "figure.png")
    with pytest.raises(InvalidOptionError, match="picture format"):
        TABLE.plot(tmp_path / "figure.docx")
    with pytest.raises(InvalidOptionError, match="nothing to draw"):
        dataclasses.replace(TABLE, rows=ROWS[3:]).plot(tmp_path / "none.png")


@pytest.mark.parametrize("width", [80, 150, 180])
def test_a_terminal_shows_every_figure_it_has_room_for(width: int) -> None:
    console = pytest.importorskip("rich.console").Console(width=width)
    with console.capture() as capture:
        console.print(to_rich(TABLE, console.width))
    text = capture.get()
    assert "…" not in text
    assert ("0.990000" in text) == (width >= 150)
    assert "2.0e-04" in text
    assert "anderson" in text
