"""What the certificate adds to a backward pass: the same pass with and without it, on the benchmark models.

Nothing is asserted about time. The first passes, in which more is measured, are left out.
"""

from __future__ import annotations

import pytest
import torch
from models import make
from pytest_benchmark.fixture import BenchmarkFixture
from test_backward import compare, quiet

import torchdeq_ep as tep

FIRST = 17
"""Passes after which the nudge error is measured every sixteenth time and later."""


@pytest.mark.parametrize("kind", ["dense", "convolutional", "attention", "graph", "tiny"])
def test_certificate(benchmark: BenchmarkFixture, kind: str) -> None:
    benchmark.group = "certificate"
    losses, handles = [], []
    for certificate in (True, False):
        case = make(kind)
        handles.append(tep.use_backward(case.model, "ep", certificate=certificate))
        losses.append(case.loss())
        with quiet():
            for _ in range(FIRST):
                losses[-1].backward(retain_graph=True)
    torch.manual_seed(0)
    compare(benchmark, lambda: losses[0].backward(retain_graph=True), lambda: losses[1].backward(retain_graph=True), 15)
    (report,) = handles[0].last.values()
    benchmark.extra_info.update(
        model=kind, calls=report.calls, adjoint_residual=report.adjoint_residual, nudge_error=report.nudge_error
    )
