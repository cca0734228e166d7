"""Scripts of `docs/figures` put their tables between two marks of a page, and nowhere else."""

import json

import pytest


@pytest.fixture(scope="module")
def insert(docs_script):
    return docs_script("figures/pages").insert


def test_only_what_is_between_the_marks_changes_and_a_second_time_nothing(insert):
    page = "above\n<!-- here -->\nold\n<!-- end -->\nbelow\n<!-- end -->\n"
    expected = "above\n<!-- here -->\n\n| new |\n\n<!-- end -->\nbelow\n<!-- end -->\n"
    assert insert(page, "<!-- here -->", "<!-- end -->", "| new |\n") == expected
    assert insert(expected, "<!-- here -->", "<!-- end -->", "| new |") == expected


@pytest.mark.parametrize("page", ["no mark", "<!-- here --> alone", "<!-- end --> before <!-- here -->"])
def test_a_page_without_the_marks_is_not_emptied(insert, page):
    with pytest.raises(ValueError, match="put the two marks"):
        insert(page, "<!-- here -->", "<!-- end -->", "text")


def test_the_page_on_homeostasis_has_the_table_of_the_recorded_runs(docs_script):
    strength = docs_script("figures/strength")
    record, page = json.loads(strength.RESULTS.read_text()), strength.PAGE.read_text()
    assert strength.insert(page, strength.BEGIN, strength.END, strength.table(record)) == page
    record["none/0.005/1/0"]["alignment"] = -0.9
    assert strength.insert(page, strength.BEGIN, strength.END, strength.table(record)) != page
