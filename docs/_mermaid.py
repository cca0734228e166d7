"""Puts Mermaid's script into the site, for pages that have a diagram: the theme would fetch it from the network."""

from importlib.resources import files
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

SCRIPT = "assets/javascripts/mermaid.js"
DIAGRAM = '<pre class="mermaid">'


def on_files(found: Files, config: MkDocsConfig) -> Files:
    """Hook of mkdocs: the script, out of the package `mermaidx`, as one more file of the site."""
    source = str(files("mermaidx") / "assets" / "mermaid.js")
    found.append(File.generated(config, SCRIPT, abs_src_path=source))
    return found


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Hook of mkdocs: a page with a diagram loads the script, ahead of the theme's own."""
    if DIAGRAM not in content:
        return content
    return f'<script src="{get_relative_url(SCRIPT, page.url)}"></script>\n{content}'
