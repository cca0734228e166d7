"""Means of what callbacks measure in each step, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from torchdeq_ep_lightning.flavour import Callback, LightningModule, Trainer


class Means:
    """Means of what is measured in each step: over `log_every_n_steps` of the trainer, and over the epoch.

    Lightning's own `log`, called for each value in each step, is slow beside a step of a small network.

    Example:
        >>> means = Means()
        >>> means.add({"loss": 1.0}), means.add({"loss": 2.0})
        (None, None)
        >>> means.epoch
        {'loss': 1.5}
    """

    def __init__(self) -> None:
        self._recent: dict[str, list[float]] = {}
        self._epoch: dict[str, list[float]] = {}

    @property
    def recent(self) -> dict[str, float]:
        """Means since the last that were logged."""
        return {name: sum(values) / len(values) for name, values in self._recent.items()}

    @property
    def epoch(self) -> dict[str, float]:
        """Means over the epoch so far."""
        return {name: sum(values) / len(values) for name, values in self._epoch.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Take the measurements of one step, or of a part of it.

        Args:
            values: By name; not every step must have every name.
        """
        for name, value in values.items():
            self._recent.setdefault(name, []).append(value)
            self._epoch.setdefault(name, []).append(value)

    def end_batch(self, trainer: Trainer, batch_idx: int) -> dict[str, float]:
        """At the end of every n-th batch, give the loggers the means of the last n, under `NAME_step`.

        Args:
            trainer: The trainer.
            batch_idx: Number of the batch in the epoch.

        Returns:
            What was logged.
        """
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (batch_idx + 1) % every:
            return {}
        logged = {f"{name}_step": mean for name, mean in self.recent.items()}
        for logger in trainer.loggers if logged else []:
            logger.log_metrics(logged, step=trainer.global_step)
        self._recent = {}
        return logged

    def end_epoch(self, pl_module: LightningModule, prog_bar: bool = False) -> None:
        """Log the means of the epoch, and start anew.

        Args:
            pl_module: Whose `log` is called.
            prog_bar: Whether they are shown.
        """
        for name, value in _over_processes(self.epoch, pl_module.trainer.world_size).items():
            pl_module.log(name, value, prog_bar=prog_bar, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        self._recent, self._epoch = {}, {}

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """What has been measured so far, for a checkpoint in the middle of an epoch."""
        return {"recent": self._recent, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, dict[str, list[float]]]) -> None:
        """Go on from there.

        Args:
            state: What `state_dict` returned.
        """
        self._recent, self._epoch = state["recent"], state["epoch"]


def _over_processes(means: dict[str, float], world: int) -> dict[str, float]:
    """Means over the processes that have a measurement: one may have left it out."""
    if world == 1:
        return means
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, means)
    names = sorted({name for each in gathered for name in each})
    return {name: fmean(each[name] for each in gathered if name in each) for name in names}


class Measuring(Callback):
    """A callback that logs means, which a run that is resumed in the middle of an epoch goes on with."""

    def __init__(self) -> None:
        self._means = Means()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("means_of_callbacks", {})[self._place(trainer)] = self._means.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("means_of_callbacks", {}).get(self._place(trainer))
        if state is not None:
            self._means.load_state_dict(state)

    def _place(self, trainer: Trainer) -> int:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return callbacks.index(self)
