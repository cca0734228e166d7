"""What a release claims about itself agrees with itself, and its README can be shown by an index."""

import io
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = {
    path: tomllib.loads(path.read_text())["project"]
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
}
VERSION = PROJECTS[ROOT / "pyproject.toml"]["version"]


class Addresses(HTMLParser):
    """Where links lead and pictures come from."""

    def __init__(self, text):
        super().__init__()
        self.found, self.pictures = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found += [given[name] for name in ("href", "src") if name in given]
        self.pictures += [given["src"]] if tag == "img" else []


def description(path):
    """The long description as it goes into the metadata, with what the build makes of its links."""
    metadata = pytest.importorskip("hatchling.metadata.core")
    manager = pytest.importorskip("hatchling.plugin.manager")
    return metadata.ProjectMetadata(str(path.parent), manager.PluginManager()).core.readme


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_an_index_can_show_the_description(path):
    markdown = pytest.importorskip("readme_renderer.markdown")
    warnings = io.StringIO()
    shown = markdown.render(description(path), stream=warnings)
    assert shown is not None, warnings.getvalue()
    addresses = Addresses(shown)
    assert addresses.found
    assert [address for address in addresses.found if not re.match("https://|#", address)] == []
    assert "8&lt;" not in shown, "a marker for the documentation was left in it"


def test_pictures_and_pages_of_the_readme_are_there():
    shown = description(ROOT / "pyproject.toml")
    pictures = re.findall(r"raw\.githubusercontent\.com/OWNER/torchdeq-ep/main/([^)\s]+)", shown)
    pages = re.findall(r"OWNER\.github\.io/torchdeq-ep/([\w-]+)\.html", shown)
    assert pictures
    assert pages
    assert all((ROOT / picture).is_file() for picture in pictures)
    assert all((ROOT / "docs" / f"{page}.md").is_file() for page in pages)


def test_all_parts_have_one_version_and_one_home():
    assert {project["version"] for project in PROJECTS.values()} == {VERSION}
    assert len({project["urls"]["Repository"] for project in PROJECTS.values()}) == 1
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(VERSION)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_plugins_ask_for_no_older_torch_than_the_package():
    floors = {r for p in PROJECTS.values() for r in p["dependencies"] if r.startswith("torch>=")}
    assert len(floors) == 1
    lowest = floors.pop().removeprefix("torch>=")
    for page in ("README.md", "docs/support.md"):
        assert f"torch {lowest}" in (ROOT / page).read_text(), page


def test_the_versions_that_are_claimed_are_those_that_are_tested():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    tested = {entry["python"] for entry in workflow["jobs"]["matrix"]["strategy"]["matrix"]["include"]}
    for project in PROJECTS.values():
        claimed = {each.rpartition(" ")[2] for each in project["classifiers"] if re.search(r":: 3\.\d+$", each)}
        assert claimed == tested
        assert project["requires-python"] == f">={min(claimed, key=lambda name: int(name.partition('.')[2]))}"


def test_the_table_of_versions_is_the_recorded_one(load_script):
    matrix = load_script(ROOT / "tests" / "matrix.py")
    if not matrix.RESULTS.is_file():
        pytest.skip("no run of `make matrix` has been recorded")
    recorded = json.loads(matrix.RESULTS.read_text())
    assert matrix.table(recorded) in matrix.PAGE.read_text()
    assert all(result["green"] for result in recorded)


def test_the_oldest_versions_are_the_lowest_that_are_allowed(load_script):
    matrix = load_script(ROOT / "tests" / "matrix.py")
    oldest, newest = matrix.requirements("oldest"), matrix.requirements("newest")
    assert len(oldest) == len(newest)
    for lowest, allowed in zip(oldest, newest, strict=True):
        assert lowest == allowed.replace(">=", "~=") + ".0"


def test_every_commit_is_checked_by_the_pinned_tools():
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [hook["rev"] for hook in hooks if hook["repo"].endswith("ruff-pre-commit")]
    assert f"\nruff=={ruff.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_a_report_of_a_fault_brings_the_numbers():
    template = (ROOT / ".github/ISSUE_TEMPLATE/wrong-gradient.yml").read_text()
    assert "torchdeq-ep diagnose" in template
    assert "torchdeq-ep env" in template
