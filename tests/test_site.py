"""The built site works from the disk, without a network: what it loads, where links lead, what the search knows."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("material")
ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page loads by itself, what it links to, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loaded, self.links, self.anchors, self.classes = path, [], [], set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        self.classes |= set((given.get("class") or "").split())
        self.loaded += [given[name] for name in ("src", "data", "poster") if given.get(name)]
        self.loaded += re.findall(r"[^\s,]*//[^\s,]*", given.get("srcset") or "")
        self.loaded += re.findall(r"url\(([^)]*)\)", given.get("style") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    warnings = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert done.returncode == 0, "\n".join(warnings)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_pages_load_nothing_from_the_network(site, pages):
    assert len(pages) >= 20
    for page in pages.values():
        remote = [address for address in page.loaded if urlsplit(address.strip("'\" ")).netloc]
        assert remote == [], page.path.name
        # The theme fetches the program that draws these, unless the page has brought it.
        assert "mermaid" not in page.classes or any("mermaid" in address for address in page.loaded), page.path.name
    for style in site.rglob("*.css"):
        loaded = re.findall(r"(?:@import|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", style.read_text(encoding="utf-8"))
        assert loaded == [], style.name


def test_local_addresses_lead_to_files_and_anchors(site, pages):
    broken = []
    for page in pages.values():
        for address in [*page.loaded, *page.links]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            found = target.is_file() and site in target.parents
            anchor = unquote(parts.fragment)
            if not found or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append((page.path.name, address))
    assert broken == []


def test_examples_of_the_reference_are_shown_as_code(site):
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(site.glob("api-*.html")))
    assert text.count('<span class="gp">&gt;&gt;&gt; </span>') > 200
    assert "<blockquote>" not in text  # what Markdown makes of >>>


@pytest.mark.parametrize(
    ("word", "location"),
    [
        ("beta", "stencils.html#the-amplitude"),
        ("beta", "faq.html#which-beta"),
        ("homeostasis", "homeostasis.html"),
        ("NotHolomorphicError", "errors.html#notholomorphicerror"),
    ],
)
def test_the_search_knows_where_a_word_belongs(site, word, location):
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("var __index = "))
    (entry,) = [entry for entry in index["docs"] if entry["location"] == location]
    assert word.lower() in f"{entry['title']} {entry['text']}".lower()


def test_what_would_be_loaded_is_found(tmp_path):
    """The reader of pages itself."""
    text = '<script src="https://a/b.js"></script><link rel="stylesheet" href="//c/d.css"><pre class="mermaid">x</pre>'
    (tmp_path / "page.html").write_text(text + '<img src="e.png"><a href="https://f">g</a><h2 id="h">i</h2>')
    page = Page(tmp_path / "page.html")
    assert page.loaded == ["https://a/b.js", "//c/d.css", "e.png"]
    assert page.links == ["https://f"]
    assert "mermaid" in page.classes
    assert "h" in page.anchors
