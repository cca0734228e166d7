"""An ordinary model, trained by torchdeq's own gradients."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def trained_cnn():
    """A convolutional DEQ of 51,200 entries of state and a spectral radius near 1, with a batch of 50 images."""
    pytest.importorskip("sklearn")
    path = Path(__file__).parents[1] / "benchmarks" / "ordinary.py"
    spec = importlib.util.spec_from_file_location("ordinary", path)
    ordinary = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = ordinary  # where its dataclasses look for their types
    spec.loader.exec_module(ordinary)
    with torch.random.fork_rng():
        model = ordinary.make("cnn", 0)
        ordinary.train(model, "cnn", 0, epochs=2, on_step=lambda k: None)
    data = ordinary.digits()
    return model, (data.train[:50], data.train_labels[:50])
