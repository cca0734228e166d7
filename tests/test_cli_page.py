"""The page of the command line says what the parsers of this version accept."""

import shlex

import pytest

from torchdeq_ep import cli

pytest.importorskip("torchdeq_ep_lightning")
pytest.importorskip("torchdeq_ep_physics")


@pytest.fixture(scope="module")
def generator(docs_script):
    return docs_script("_cli")


def test_the_page_is_made_from_the_parsers(generator, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # it does not depend on the terminal
    assert generator.PAGE.read_text() == generator.page(), "run: python docs/_cli.py"


def test_every_command_has_a_section_and_every_section_is_a_command(generator):
    top = {*cli._BUILT_IN, "physics", "train", "sweep"}
    assert {name.split()[0] for name in generator.EXAMPLES} == top
    assert set(dict(generator.choices(cli._parser({})))) == set(cli._BUILT_IN)


def test_the_examples_are_accepted(generator):
    parsers = {"physics": generator.physics.parser(), "sweep": generator.sweep._parser()}
    for name, example in generator.EXAMPLES.items():
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("torchdeq-ep", name.split()[0])
        if command == "train":
            continue  # Lightning's own parser reads these
        parser = parsers.get(command)
        given = arguments if parser else [command, *arguments]
        assert (parser or cli._parser({})).parse_args(given)


def test_every_option_is_explained(generator):
    for line in generator.PAGE.read_text().splitlines():
        if line.startswith("| `--"):
            *_, meaning = line.strip("| ").split(" | ")
            assert len(meaning) > 3, line


def test_types_and_defaults_are_spelt_as_in_yaml(generator):
    assert generator.kind(str | None) == "str or null"
    assert generator.kind(dict[int, str]) == "dict of str by int"
    assert generator.kind(tuple[int, int, int]) == "3 int"
    assert generator.kind(list[float]) == "list of float"
    assert [generator.default(value) for value in (None, True, (0.0,), "ep")] == [
        "`null`",
        "`true`",
        "`[0.0]`",
        '`"ep"`',
    ]
