"""Callbacks that attach something to the module for the time of training."""

from __future__ import annotations

from torchdeq_ep_lightning.flavour import Callback, LightningModule, Trainer


class Attached(Callback):
    """A callback that attaches something to the module, and takes it off when training ends, in whatever way."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        raise NotImplementedError
