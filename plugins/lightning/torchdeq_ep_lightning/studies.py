"""Studies of Optuna as the memory of a sweep: which runs are wanted, who trains which, and what came out.

A run that is wanted is a trial that waits. A worker claims one by setting it to running, which one of several can do
alone, and says from time to time that it is alive. A trial whose worker is dead fails, and waits again as a new one.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep_lightning.resuming import latest

CELL, FAILURE, HISTORY = "cell", "failure", "history"
"""Attributes of a trial: the options of its run, why it failed, and the measurements of each epoch."""
_WORKER, _SURPLUS = "worker", "surplus"
_BEAT = 20.0
_DEAD_AFTER = 6 * _BEAT
_PLANNING = 60.0
_ATTEMPTS = 5
# What databases say of a table or a version that was not there a moment before.
_ANOTHER_WAS_FIRST = ("already exists", "UNIQUE constraint", "duplicate key", "Duplicate entry", "is locked")


def open_storage(storage: str) -> BaseStorage:
    """Where studies are kept.

    Args:
        storage: URL of a database, such as `postgresql://user@host/name` or `sqlite:///file.db`; or the path of a file,
            Optuna's journal, which workers on one file system share.

    Returns:
        The storage.

    Raises:
        InvalidOptionError: If it cannot be opened.
    """
    if "://" not in storage:
        _refuse_torn(Path(storage).expanduser())
    try:
        if storage.startswith("sqlite"):
            return _sqlite(storage)
        if "://" in storage:
            return _database(storage, {"pool_pre_ping": True})
        Path(storage).expanduser().resolve().parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(Path(storage).expanduser())))
    except Exception as error:  # of drivers and databases of all kinds
        raise InvalidOptionError(
            f"cannot open the storage {storage!r}: {type(error).__name__}: {str(error).partition(chr(10))[0]}. It is "
            "the path of a file, or a URL such as postgresql://user@host/name, whose server runs and whose driver is "
            "installed."
        ) from error


def _refuse_torn(journal: Path) -> None:
    """Refuse a journal whose last line was cut off, as on a full disk: what is written next would be lost with it."""
    for _ in range(_ATTEMPTS):
        if not journal.is_file() or not journal.stat().st_size:
            return
        with journal.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
        time.sleep(0.2)  # another worker may be writing it
    raise InvalidOptionError(
        f"the last line of {journal} was cut off, as on a full disk. Move the file away and give the same command: "
        "runs that are done are in their directories, and none is trained twice."
    )


def _database(url: str, options: dict[str, Any]) -> RDBStorage:
    """A database, whose tables are made by the first of several workers that open it at the same time."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except Exception as error:
            if not any(said in str(error) for said in _ANOTHER_WAS_FIRST):
                raise
        time.sleep(0.5)
    return RDBStorage(url, engine_kwargs=options)


def _sqlite(url: str) -> RDBStorage:
    """A file of SQLite, of which one worker at a time reads what it then changes.

    SQLite has no rows that are locked for an update: two workers would read that a run waits, and both claim it.
    """
    storage = _database(url, {"connect_args": {"timeout": _PLANNING}})

    def begin_by_hand(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections that were opened before
    event.listen(storage.engine, "connect", begin_by_hand)
    event.listen(storage.engine, "begin", begin)
    return storage


def open_study(name: str, storage: BaseStorage, sampler: Any = None, pruner: Any = None) -> optuna.Study:
    """The study of that name, made if there is none; its measure is to be small."""
    return optuna.create_study(
        study_name=name, storage=storage, sampler=sampler, pruner=pruner, direction="minimize", load_if_exists=True
    )


def state_of(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials in some states, as they are now."""
    return study.get_trials(deepcopy=False, states=states or None)


def identity(cell: dict[str, str]) -> str:
    """A run by its options, whatever their order."""
    return repr(sorted(cell.items()))


def is_returned(trial: FrozenTrial) -> bool:
    """Whether a trial failed because its worker died, or was one too many."""
    return trial.state == TrialState.FAIL and FAILURE not in trial.user_attrs


def is_begun(study: optuna.Study) -> bool:
    """Whether anything has been trained, or is."""
    running = state_of(study, TrialState.RUNNING)
    return bool(running) or any(HISTORY in trial.user_attrs for trial in state_of(study))


def ask_for(study: optuna.Study, storage: BaseStorage, cells: Sequence[dict[str, str]], retry: bool = False) -> None:
    """Let runs wait that nobody has asked for yet; one of several workers does so.

    Args:
        study: The study.
        storage: Its storage.
        cells: The runs, by their options.
        retry: Whether a run that failed is asked for again.
    """

    def missing() -> list[dict[str, str]]:
        known = set()
        for trial in state_of(study):
            failed = trial.state == TrialState.FAIL
            if CELL in trial.user_attrs and not (is_returned(trial) or (failed and retry)):
                known.add(identity(trial.user_attrs[CELL]))
        return [cell for cell in cells if identity(cell) not in known]

    started = time.monotonic()
    while missing():
        try:
            plan = optuna.create_study(study_name=f"{study.study_name} (being planned)", storage=storage)
        except DuplicatedStudyError:  # another worker is at it
            time.sleep(0.2)
            if time.monotonic() - started > _PLANNING:  # it died
                _forget_plan(study, storage)
            continue
        try:
            for cell in missing():
                study.enqueue_trial(dict(cell), user_attrs={CELL: cell})
        finally:
            optuna.delete_study(study_name=plan.study_name, storage=storage)


def _forget_plan(study: optuna.Study, storage: BaseStorage) -> None:
    try:
        optuna.delete_study(study_name=f"{study.study_name} (being planned)", storage=storage)
    except KeyError:
        return


def claim(study: optuna.Study, storage: BaseStorage) -> Trial | None:
    """A trial that waited and is this worker's now; `None` if none waits."""
    for waiting in state_of(study, TrialState.WAITING):
        try:
            mine = storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            continue
        if mine:
            return Trial(study, waiting._trial_id)
    return None


def is_surplus(study: optuna.Study, trial: Trial, wanted: int) -> bool:
    """Whether others have asked for the last of the wanted trials at the same time; it is then given up."""
    before = [other for other in state_of(study) if other.number < trial.number and not is_returned(other)]
    if len(before) < wanted:
        return False
    trial.set_user_attr(_SURPLUS, True)
    study.tell(trial, state=TrialState.FAIL)
    return True


def put_back(study: optuna.Study, storage: BaseStorage) -> list[int]:
    """Let the trials of dead workers wait again.

    Args:
        study: The study.
        storage: Its storage.

    Returns:
        Their numbers.
    """
    returned = []
    for trial in state_of(study, TrialState.RUNNING):
        if not _is_dead(trial):
            continue
        try:
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:  # another worker was first
            continue
        if CELL in trial.user_attrs:
            cell = trial.user_attrs[CELL]
            study.enqueue_trial(trial.params or dict(cell), user_attrs={CELL: cell})
        returned.append(trial.number)
    return returned


@contextmanager
def alive(trial: Trial) -> Iterator[None]:
    """A context in which a trial has a heartbeat."""
    stop = threading.Event()
    own = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}

    def beat() -> None:
        trial.set_user_attr(_WORKER, own | {"beat": time.time()})

    def go_on() -> None:
        while not stop.wait(_BEAT):
            try:
                beat()
            except Exception:  # a server that is away for a moment
                continue

    beat()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _is_dead(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get(_WORKER)
    if worker is None:  # claimed just now, or by one that died in that moment
        started = trial.datetime_start
        return started is not None and time.time() - started.timestamp() > _DEAD_AFTER
    if worker["host"] == socket.gethostname():
        return bool(_start_of(worker["pid"]) != worker["start"])
    return time.time() - float(worker["beat"]) > _DEAD_AFTER


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, which tells it from a later one of its number; `None` if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "running"
    return "running"


def finish(study: optuna.Study, trial: Trial, outcome: str, value: Any, measure: str) -> None:
    """Write down what a run came to.

    Args:
        study: The study.
        trial: Its trial.
        outcome: `"done"`, `"pruned"` or `"failed"`.
        value: The measurements of each epoch, or why it failed.
        measure: Name of the measurement that is the value of the trial.
    """
    tell: Callable[..., Any] = study.tell
    if outcome == "failed":
        trial.set_user_attr(FAILURE, value)
        tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr(HISTORY, value)
    if outcome == "pruned":
        tell(trial, state=TrialState.PRUNED)
        return
    last = latest(value, measure)
    if last is None or math.isnan(last[measure]):
        known = sorted({name for epoch in value for name in epoch})
        trial.set_user_attr(FAILURE, f"the run has no figure for {measure}, but for {', '.join(known)}")
        tell(trial, state=TrialState.FAIL)
        return
    tell(trial, float(last[measure]))
