"""A layer says a thing once, and counts."""

import copy
import pickle
import warnings

import pytest

from torchdeq_ep.errors import ConvergenceWarning, PrecisionWarning
from torchdeq_ep.state import Memory


def issued(memory, passes, category=ConvergenceWarning, about="nudge"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(passes):
            memory.passes += 1
            memory.warn(category, about, f"it stopped at {k}", lambda: "Do something.", size=k)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("passes", "expected"), [(1, 1), (100, 1), (101, 2), (1000, 2), (1011, 3)])
def test_it_is_said_once_then_after_a_hundred_then_at_every_tenfold(passes, expected):
    assert len(issued(Memory(), passes)) == expected


def test_later_warnings_have_counts_and_the_worst_finding():
    _, later = issued(Memory(), 101)
    assert later.startswith("in 101 of 101 backward passes it stopped at 100. Do something.")


def test_each_kind_and_subject_is_counted_apart():
    memory = Memory()
    assert len(issued(memory, 3) + issued(memory, 3, about="free phase") + issued(memory, 3, PrecisionWarning)) == 3
    assert len(memory.summary().splitlines()) == 3


def test_advice_is_looked_for_only_if_it_is_given():
    memory, asked = Memory(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(50):
            memory.warn(ConvergenceWarning, "nudge", "it stopped", lambda: asked.append(1) or "Do something.")
    assert len(asked) == 1


def test_it_survives_copies():
    memory = Memory()
    issued(memory, 5)
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other == memory
