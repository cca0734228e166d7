"""A figure that a notebook shows although pyplot has not been imported; imported where a figure is made, no earlier."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure of matplotlib that a notebook shows as a picture."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png", facecolor=self.get_facecolor(), dpi=110)
        return picture.getvalue()
