"""Runs of `torchdeq-ep` that are killed where a test says: as a script, and in a process forked from a warm one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

WHERE = "TORCHDEQ_EP_TEST_KILL"
"""Environment variable: `STEP HOOK [SIGNAL]`, where the hook is that of a callback."""


class Killer(Callback):
    """Sends the process a signal in one of its hooks, once so many steps are done."""

    def __init__(self, step: int, hook: str, sign: str = "SIGKILL") -> None:
        def kill(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step >= step and trainer.is_global_zero:
                os.kill(os.getpid(), signal.Signals[sign])

        setattr(self, hook, kill)


def arm(where: str | None) -> None:
    """Put a killer behind the other callbacks of every run of this process."""
    if not where:
        return
    step, *rest = where.split()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    fit = Trainer.fit

    def armed(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.callbacks.append(Killer(int(step), *rest))
        return fit(self, *args, **kwargs)

    Trainer.fit = armed


def main(arguments: list[str], where: str | None, folder: Path) -> None:
    """One command in this process, from a folder; what it prints is kept beside its results."""
    from torchdeq_ep.cli import main as command

    os.chdir(folder)
    arm(where)
    with (folder / "printed.txt").open("a") as printed:
        sys.stdout = sys.stderr = printed
        sys.exit(command(arguments))


if __name__ == "__main__":
    from torchdeq_ep.cli import main as command

    arm(os.environ.get(WHERE))
    sys.exit(command(sys.argv[1:]))
