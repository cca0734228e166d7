"""Shows the examples of docstrings as code: griffe reads a section `Examples`, the package writes `Example`."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Extension of griffe, which reads the docstrings for the API page."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
