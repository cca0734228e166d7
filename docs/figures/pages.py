"""Where the scripts of this folder put their tables: between two marks of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def insert(page: str, begin: str, end: str, text: str) -> str:
    """The page with another text between its marks.

    Args:
        page: The text of the page.
        begin: The mark before it, a line of its own.
        end: The mark after it, likewise.
        text: What is to stand there.

    Raises:
        ValueError: If a mark is missing, or stands in the wrong place.
    """
    before, found, rest = page.partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"the page has no text between {begin!r} and {end!r}: put the two marks where it belongs.")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of rows of cells, the heads and the rule below them included."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"
