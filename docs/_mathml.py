r"""Turns the formulas of a page into MathML, which browsers show by themselves: no script, no network.

A formula with a `\tag{5}`, below the anchor `[](){#eq-5}`, gets the anchor, and its number at the right.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'(?:<p><a [^>]*?id="(?P<anchor>eq-\d+)"[^>]*></a></p>\s*)?'
    r'<(?P<element>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=element)>',
    re.DOTALL,
)
TAG = re.compile(r"\\tag\{(\d+)\}")


def on_page_content(content: str, **_: Any) -> str:
    """Hook of mkdocs: the page as HTML, before it is put into the template."""
    return FORMULA.sub(mathml, content)


def mathml(formula: re.Match[str]) -> str:
    """One formula; a number without its anchor, or an anchor without its number, is an error."""
    latex = html.unescape(formula["latex"]).strip()
    number = TAG.search(latex)
    if formula["anchor"] != (f"eq-{number[1]}" if number else None):
        raise ValueError(f"the anchor {formula['anchor']} does not fit the formula {latex}")
    display = "block" if formula["element"] == "div" else "inline"
    converted = str(convert(TAG.sub("", latex).strip(), display=display))
    if number is None:
        return converted
    link = f'<a class="headerlink" href="#eq-{number[1]}" title="Permanent link">({number[1]})</a>'
    return f'<div class="equation" id="eq-{number[1]}">{converted}{link}</div>'
