"""Checkpoints between two batches, from which a run goes on exactly, and the record of what each epoch came to.

Lightning saves within a batch, and resumes exactly from some of these places only: a checkpoint of an epoch's last
batch loses the epoch. Those of this module are saved before a batch begins, when all that belongs to the one before is
done, validation included; and at the end. What the processes of a run have each of their own is kept for each.
"""

from __future__ import annotations

import os
import random
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from torchdeq_ep_lightning.flavour import Callback, Checkpoint, LightningModule, Trainer

CHECKPOINT = "last.ckpt"
BEFORE = "before.ckpt"
_UNFINISHED = "next.ckpt"
_OWN = "of_each_process"
# Of a checkpoint, what each process has of its own.
_OF_CALLBACKS = ("callbacks", "means_of_callbacks")


def newest_checkpoint(out: Path, speak: bool = True) -> Path | None:
    """The newest checkpoint of a run that can be read.

    Args:
        out: Directory of the run.
        speak: Whether a damaged one is told of on standard error.

    Returns:
        Its path; `None` if there is none.
    """
    files = [out / name for name in (CHECKPOINT, BEFORE) if (out / name).is_file()]
    damaged: list[str] = []
    for path in files:
        reason = _damage(path)
        if reason is None:
            if damaged and speak:
                sys.stderr.write(
                    f"torchdeq-ep: {' and '.join(damaged)}: the run goes on from {path}, the one before.\n"
                )
            return path
        damaged.append(f"{path} is damaged ({reason})")
    if damaged and speak:
        sys.stderr.write(f"torchdeq-ep: {' and '.join(damaged)}, and there is none before: the run starts over.\n")
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, `None` if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
        if torn is not None:
            return f"{torn} in it is not what was written"
        state = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a torn pickle can raise anything
        return (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")
    return None if isinstance(state, dict) and _OWN in state else "it is no checkpoint of this package's"


class Saver(Callback):
    """Saves between two batches, and gives each process what it had. The first of the callbacks.

    A batch begins for this callback before it does for any other, and an epoch ends.

    Args:
        out: Directory of the checkpoints.
        every: Steps of the optimiser between two of them.
        resumed: The checkpoint from which this run goes on, if any.
    """

    def __init__(self, out: Path, every: int, resumed: Path | None) -> None:
        self._out, self._every = out, every
        # A damaged last checkpoint does not take the place of the one before it.
        self._keeps = resumed is None or resumed.name == CHECKPOINT
        self._saved_at = -1
        self._loaded: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        every = checkpoint[_OWN]
        self._loaded = own = every[min(trainer.global_rank, len(every) - 1)]
        checkpoint.update({name: own[name] for name in _OF_CALLBACKS if name in own})
        pl_module.on_load_checkpoint(own["module"])
        self._saved_at = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning forgets the place of a loader that was asked for its length before the checkpoint was read.
        if self._loaded is not None:
            cast(Any, trainer.train_dataloader).load_state_dict({"batches": self._loaded["batches"]})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._loaded is not None:
            _set_random_states(self._loaded["random"])
            _epoch_loop(trainer)._batches_that_stepped = self._loaded["stepped"]
            self._loaded = None
        step = trainer.global_step
        if step != self._saved_at and step and step % self._every == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that is cut short: a longer run goes on in its middle, before what is done at its end.
        progress = _epoch_loop(trainer).batch_progress
        if progress.current.completed < trainer.num_training_batches and not _accumulates(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _epoch_loop(trainer).batch_progress.current.completed >= trainer.num_training_batches:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_at = trainer.global_step
        unfinished, last = self._out / _UNFINISHED, self._out / CHECKPOINT
        trainer.save_checkpoint(unfinished, weights_only=False)  # by all processes together
        if trainer.is_global_zero:
            if self._keeps and last.is_file():
                os.replace(last, self._out / BEFORE)
            os.replace(unfinished, last)
        self._keeps = True


class Record(Checkpoint):
    """The measurements of every epoch; and in each checkpoint the place in the loops, and what each process has.

    As one of Lightning's checkpoints it comes last, so that it sees what the others and the module's own hooks do.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self._known: dict[str, float] = {}
        self._seen: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = _epoch_loop(trainer)
        batches = _between_batches(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)
        module: dict[str, Any] = {}
        pl_module.on_save_checkpoint(module)
        own = {name: checkpoint[name] for name in _OF_CALLBACKS if name in checkpoint}
        own |= {"module": module, "random": _random_states(), "batches": batches, "stepped": loop._batches_that_stepped}
        checkpoint[_OWN] = _of_all_processes(own, trainer.world_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._known |= self._measured(trainer)
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "seconds": self._elapsed()}
        self.history = [*self.history[: trainer.current_epoch], row | self._known]
        self._known = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._known |= self._measured(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "known": dict(self._known), "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._seconds = list(state_dict["history"]), state_dict["seconds"]
        self._known = dict(state_dict["known"])

    def _elapsed(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self._since else 0.0)

    def _measured(self, trainer: Trainer) -> dict[str, float]:
        """What has been measured since this was last asked: Lightning keeps what earlier epochs came to beside it."""
        before, self._seen = self._seen, dict(trainer.callback_metrics)
        # Means over a few steps are for the logs: which were the last before the end of an epoch says nothing of it.
        return {
            name: float(value)
            for name, value in self._seen.items()
            if value is not before.get(name) and not name.endswith("_step")
        }


def latest(history: Sequence[dict[str, float]], measure: str) -> dict[str, float] | None:
    """The last epoch that has a measurement: not every epoch need be tested.

    Args:
        history: Measurements of each epoch.
        measure: Name of one.

    Returns:
        Those of that epoch; `None` if there is none.

    Example:
        >>> latest([{"epoch": 1, "test/error": 9.0}, {"epoch": 2}], "test/error")
        {'epoch': 1, 'test/error': 9.0}
    """
    return next((epoch for epoch in reversed(history) if measure in epoch), None)


def _epoch_loop(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop


def _accumulates(trainer: Trainer) -> bool:
    return bool(trainer.fit_loop._should_accumulate())


def _between_batches(loops: dict[str, Any], batches: float) -> int:
    """Write the state of the loops as if the batch behind were done and the one ahead not begun.

    Args:
        loops: State of the fitting loop in a checkpoint; changed in place.
        batches: How many an epoch has.

    Returns:
        How many batches of the epoch are done: none, where the next epoch is the one to go on with.
    """
    progress = loops["epoch_loop.batch_progress"]
    current = progress["current"]
    progress["is_last_batch"] = False
    epoch = loops["epoch_progress"]
    if current["completed"] >= batches:  # what Lightning counts anew when an epoch begins
        for name in ("batch_progress", "scheduler_progress"):
            _zero(loops[f"epoch_loop.{name}"]["current"])
        for kind in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
            _zero(kind["current"])
    elif epoch["current"]["processed"] == epoch["current"]["started"]:  # an epoch cut short is not done
        for count in (epoch["total"], epoch["current"]):
            count["processed"] -= 1
    loops["state_dict"].pop("combined_loader", None)  # counts a batch that is only fetched
    return int(current["completed"])


def _zero(counts: dict[str, int]) -> None:
    counts.update(dict.fromkeys(counts, 0))


def _of_all_processes(own: dict[str, Any], world: int) -> Sequence[dict[str, Any]]:
    if world == 1:
        return [own]
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, own)
    return gathered


def _random_states() -> dict[str, Any]:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if in_use else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
