"""Calls of a map leave no trace in its running statistics."""

import pytest
import torch

from torchdeq_ep.state.calls import FrozenStatistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.BatchNorm1d(3),
        torch.nn.BatchNorm1d(3, momentum=None),
        torch.nn.BatchNorm1d(3, affine=False),
        torch.nn.BatchNorm1d(3, track_running_stats=False),
        torch.nn.InstanceNorm1d(3, track_running_stats=True),
        torch.nn.GroupNorm(1, 3),
    ],
)
def test_frozen_statistics_change_no_result_and_no_buffer(layer, training):
    layer.train(training)
    x = torch.randn(4, 3, 5)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with FrozenStatistics() as guard:
        value = layer(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert guard.withheld == (training and bool(before))
    assert torch.equal(value, layer(x))
