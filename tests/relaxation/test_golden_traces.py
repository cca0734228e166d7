"""The loop goes the way that was recorded, through each of its phases."""

import json

import pytest
from relaxation.golden_traces import CASES, RECORD, observed

EXPECTED = json.loads(RECORD.read_text())


def test_every_case_is_recorded():
    assert list(CASES) == list(EXPECTED)


# Rounding differs between machines, and grows: where the loop stalls, where it mixes nearly parallel residuals, and at
# the end, where rounding is all there is.
CHAOTIC, FIRST = ("stalling", "beyond", "to its floor"), 15


@pytest.mark.parametrize("name", CASES)
def test_the_loop_goes_the_recorded_way(name):
    found, expected = observed(CASES[name]()), EXPECTED[name]
    first, certain = expected["trace"][0], FIRST if name.startswith(CHAOTIC) else None
    assert found["trace"][:certain] == pytest.approx(expected["trace"][:certain], rel=1e-3, abs=1e-10 * first)
    assert found["diverged"] == expected["diverged"]
    if certain is None:
        assert found["steps"] == expected["steps"]
        assert found["value"] == pytest.approx(expected["value"], rel=1e-9)
