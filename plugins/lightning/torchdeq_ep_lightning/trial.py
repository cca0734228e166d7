"""One run of a sweep in a process of its own, which ends with the worker that started it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from torchdeq_ep_lightning.flavour import Checkpoint, LightningModule, Trainer
from torchdeq_ep_lightning.resuming import Record
from torchdeq_ep_lightning.training import run

Outcome = tuple[str, Any]
"""`("done", history)`, `("pruned", history)` or `("failed", reason)`."""


class PrunedRunError(Exception):
    """A run that is not worth going on with; its argument is what was measured."""


class Reporter(Checkpoint):
    """Tells the worker of each epoch, and stops where it says so. A checkpoint of Lightning's: it comes after `Record`.

    Args:
        connection: To the worker.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        record = next(callback for callback in callbacks if isinstance(callback, Record))
        if trainer.is_global_zero:
            self._connection.send(("epoch", record.history))
        stop = bool(self._connection.recv()) if trainer.is_global_zero else False
        if trainer.strategy.broadcast(stop):
            raise PrunedRunError(record.history)


def train_apart(recipe: str, overrides: Sequence[str], on_epoch: Callable[[Any], bool]) -> Outcome:
    """Train in a process of its own.

    Args:
        recipe: As for `train`.
        overrides: As for `train`.
        on_epoch: Called with the measurements of all epochs at the end of each; whether to stop.

    Returns:
        What came out.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchdeq_ep_lightning.trial"])
    mine, theirs = context.Pipe()
    process = context.Process(target=_train, args=(theirs, recipe, list(overrides)))
    process.start()
    theirs.close()
    try:
        while True:
            wait([mine, process.sentinel])
            if not mine.poll():
                process.join()
                return "failed", f"the process of the run ended with exit code {process.exitcode}"
            try:
                kind, value = mine.recv()
            except EOFError:
                process.join()
                return "failed", f"the process of the run ended with exit code {process.exitcode}"
            if kind != "epoch":
                process.join()
                return kind, value
            mine.send(on_epoch(value))
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _train(connection: Connection, recipe: str, overrides: list[str]) -> None:
    end_with_parent()
    # What Lightning starts again for a second device: the run, not the sweep.
    from torchdeq_ep import cli

    sys.argv = [cli.__file__, "train", recipe, *overrides]
    sys.modules["__main__"].__spec__ = None
    try:
        result = run(recipe, overrides, [Reporter(connection)])
    except PrunedRunError as pruned:
        connection.send(("pruned", pruned.args[0]))
    except KeyboardInterrupt:
        return
    except BaseException as error:  # of whatever kind: the sweep goes on, and says what it was
        connection.send(("failed", f"{type(error).__name__}: {error.args[0] if error.args else ''}"))
    else:
        connection.send(("done", list(result.history)))


def end_with_parent() -> None:
    """End this process when the one that started it is gone, in whatever way."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
