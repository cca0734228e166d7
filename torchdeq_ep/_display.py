"""What `print` and a notebook show of a result: tables and paragraphs, as text and as HTML in the notebook's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from typing import Any

_NUMBERS = "text-align: right; white-space: nowrap"
_TEXT = "text-align: left"


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], is_text: Sequence[bool] | None = None) -> str:
    """A table.

    Args:
        headings: One for each column.
        rows: The cells.
        is_text: Which columns are set flush left; by default the first.

    Returns:
        A `<table>`, everything in it escaped.

    Example:
        >>> html_table(["mode", "error"], [["ep", "1 < 2"]]).count("<td"), "1 &lt; 2" in html_table(["x"], [["1 < 2"]])
        (2, True)
    """
    styles = [_TEXT if text else _NUMBERS for text in is_text or [True] + [False] * (len(headings) - 1)]
    head = "".join(f'<th style="{style}">{escape(cell)}</th>' for cell, style in zip(headings, styles, strict=True))
    lines = ("".join(_cell(cell, style) for cell, style in zip(row, styles, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], is_text: Sequence[bool] | None = None) -> str:
    """The same as lines of text.

    Args:
        headings: One for each column.
        rows: The cells.
        is_text: Which columns are set flush left; by default the first.

    Returns:
        A line for the headings and one for each row, without a trailing newline.

    Example:
        >>> print(text_table(["mode", "error"], [["ep", "1e-3"], ["ift", "0"]]))
        mode  error
        ep     1e-3
        ift       0
    """
    left = is_text or [True] + [False] * (len(headings) - 1)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    places = [f"{'<' if flush else '>'}{width}" for flush, width in zip(left, widths, strict=True)]
    lines = (map(format, line, places) for line in [headings, *rows])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(text: str, style: str) -> str:
    return f'<td style="{style}">{escape(text)}</td>'


def html_lines(lines: Sequence[str]) -> str:
    """Paragraphs.

    Args:
        lines: The text of each.

    Returns:
        A `<p>` for each, escaped.
    """
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def html_fields(report: Any) -> str:
    """The fields of a report that have a value.

    Args:
        report: A dataclass.

    Returns:
        A table of two columns; figures that do not exist are left out, and so is what is empty.
    """
    values = {each.name: getattr(report, each.name) for each in fields(report) if each.repr}
    rows = [[name.replace("_", " "), _told(value)] for name, value in values.items() if _has_value(value)]
    return html_table([type(report).__name__, ""], rows)


def told_fields(report: Any) -> str:
    """The fields of a report that have a value, as text.

    Args:
        report: A dataclass.

    Returns:
        The form of its own `repr`, with four digits; figures that do not exist are left out, and so is what is empty.
    """
    values = {each.name: getattr(report, each.name) for each in fields(report) if each.repr}
    told = ", ".join(f"{name}={_rounded(value)}" for name, value in values.items() if _has_value(value))
    return f"{type(report).__name__}({told})"


def _rounded(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_rounded(entry)}" for name, entry in value.items()) + "}"
    return repr(value)


def _has_value(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and value not in ((), {}, [], "") if isinstance(value, tuple | dict | list | str) else True


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and value and all(isinstance(entry, float) for entry in value):
        return f"{value[0]:.2g} … {value[-1]:.2g} ({len(value)} values)"
    return f"{value}"
