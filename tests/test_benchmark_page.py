"""The page of benchmarks says what the newest recorded run measured."""

import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def generator(docs_script):
    return docs_script("_benchmarks")


def test_the_page_is_made_from_the_newest_run(generator):
    newest = generator.newest()
    assert generator.PAGE.read_text() == generator.page(json.loads(newest.read_text()), newest.name)


def test_every_group_of_benchmarks_has_a_section(generator):
    sources = [path.read_text() for path in BENCHMARKS.glob("test_*.py")]
    groups = {group for source in sources for group in re.findall(r'benchmark\.group = "(.+)"', source)}
    assert set(generator.SECTIONS) == set(generator.COLUMNS) == groups
    recorded = {benchmark["group"] for benchmark in json.loads(generator.newest().read_text())["benchmarks"]}
    assert recorded <= groups


def test_small_numbers_keep_a_digit_and_missing_ones_stay_empty(generator):
    cells = [generator.cell(value) for value in (None, 3, 0.00049, 0.52, 12.3, 85.2, "dense")]
    assert cells == ["", "3", "5e-04", "0.52", "12.30", "85", "dense"]
