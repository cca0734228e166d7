"""The page on Sudoku has the tables of the recorded runs."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_has_the_tables_of_the_runs():
    spec = importlib.util.spec_from_file_location("sudoku", ROOT / "docs" / "figures" / "sudoku.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "sudoku.md").read_text()
    for table in module.tables().split("\n\n"):
        assert table in page


def test_there_are_288_solutions():
    spec = importlib.util.spec_from_file_location("sudoku", ROOT / "docs" / "figures" / "sudoku.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    puzzles, solutions = module.Puzzles(module.grids(), module.grids()[:10], 0).draw(20)
    assert len(module.grids()) == 288
    assert ((puzzles == 0) | (puzzles == solutions)).all()
