"""Lightning without its advice on what this package has decided."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import Any

from torchdeq_ep.errors import ConvergenceWarning, TruncationWarning
from torchdeq_ep_lightning.flavour import PACKAGE

# Lightning's advice on matters that this package has decided. Each with what it is about.
_NOISE = (
    ".*does not have many workers.*",  # batches are slices of tensors in memory
    ".*Checkpoint directory .* exists and is not empty.*",  # resumption is what it is for
    ".*number of training batches .* is smaller than the logging interval.*",  # epochs are logged in any case
    # Deprecations inside Lightning.
    ".*treespec, LeafSpec.*",
    r"\s*``instantiate_classes`` was deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
)


# What these say at every start: the seed, the devices, advertisements.
_FABRIC = "lightning_fabric" if PACKAGE == "pytorch_lightning" else "lightning.fabric"
_CHATTY = (f"{PACKAGE}.utilities.rank_zero", f"{_FABRIC}.utilities.rank_zero", _FABRIC)


@contextmanager
def quiet_lightning() -> Any:
    """A context in which Lightning neither advises nor advertises, and steps that stop early are counted, not told."""
    chatty = [(logger, logger.level) for logger in map(logging.getLogger, _CHATTY)]
    for logger, _ in chatty:
        logger.setLevel(logging.WARNING)
    try:
        with _filtered():
            yield
    finally:
        for logger, level in chatty:
            logger.setLevel(level)


@contextmanager
def _filtered() -> Any:
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        # One line for every other step of a long run: NudgeStats counts them, and the summary has the count.
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        warnings.filterwarnings("ignore", category=TruncationWarning)
        yield
