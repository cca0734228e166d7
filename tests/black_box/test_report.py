"""Confidence intervals of a noisy gradient."""

import pytest
import torch

import torchdeq_ep as tep
from torchdeq_ep.errors import InvalidOptionError


def test_interval_is_students():
    from scipy.stats import t

    for freedom in (2, 3, 6, 14, 100):
        report = tep.EquilibriumReport("symmetric", 0.1, 0.1, 0.1, 1.0, 3, 0, torch.ones(1), None, freedom)
        for level in (0.5, 0.9, 0.95):
            assert report.interval(level)[0].item() == pytest.approx(t.ppf(0.5 + level / 2, freedom), rel=0.01)
    with pytest.raises(InvalidOptionError, match="repeats"):
        tep.EquilibriumReport("symmetric", 0.1, 0.1, 0.1, 1.0, 3, 0).interval()
    with pytest.raises(InvalidOptionError, match="level"):
        report.interval(1.5)
