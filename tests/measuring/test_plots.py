"""Pictures that can be read."""

from __future__ import annotations

import pytest

from torchdeq_ep.measuring.plots import Point, Words, scatter, text_box


def test_labels_do_not_overlap_where_modes_are_alike() -> None:
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    points = [Point(1.0 + 0.02 * k, 0.2, f"mode-number-{k}", k) for k in range(9)]
    figure, labels = scatter(points, Words("title", "subtitle", "x", "y"))
    renderer = agg.FigureCanvasAgg(figure).get_renderer()
    boxes = [text_box(label, renderer) for label in labels]
    assert [label.get_text() for label in labels] == [point.label for point in points]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
