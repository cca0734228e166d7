"""Calling an equilibrium solver that nothing is known about: it may be slow, fail, hang, or return nonsense.

A solver is a simulator, a subprocess or an instrument. Each call is one *nudge*. A call that fails is repeated as often
as asked, and then becomes a named error that carries the nudge that caused it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from torchdeq_ep._options import check_count
from torchdeq_ep.errors import (
    InvalidOptionError,
    SolverError,
    SolverNonFiniteError,
    SolverShapeError,
    SolverTimeoutError,
    unknown_name,
)

Solve = Callable[..., Any]

_starting = threading.Lock()


@dataclass(frozen=True)
class Nudge:
    """One call of a solver.

    Args:
        amplitude: The node of the stencil, 0 for the free phase.
        current: The added force.
        repeat: Which of several equal calls this is.
        row: Which row of the batch, if the solver takes one at a time.

    Example:
        >>> str(Nudge(0.1, torch.tensor([3.0, 4.0])))
        'nudge +0.1 (repeat 0, added force of norm 5)'
    """

    amplitude: float
    current: Tensor
    repeat: int = 0
    row: int | None = None

    def __str__(self) -> str:
        phase = f"nudge {self.amplitude:+.3g}" if self.amplitude else "free phase"
        row = "" if self.row is None else f", row {self.row}"
        return f"{phase} (repeat {self.repeat}{row}, added force of norm {float(self.current.norm()):.2g})"


@dataclass(frozen=True)
class Instrument:
    """A solver, and how it is to be called.

    Args:
        solve: `solve(current) -> state`; with `batched=False`, `solve(current, row) -> state of that row`.
        batched: Whether one call solves the whole batch.
        timeout: Seconds that one call may take.
        retries: How often a call that failed is repeated.
        executor: `None` calls one after the other; `"thread"` in threads, `"process"` each in a forked process; or an
            executor of the user.
        workers: Largest number of calls at a time.

    Raises:
        InvalidOptionError: If an option is not acceptable.

    Example:
        >>> instrument = Instrument(lambda current: 2 * current)
        >>> instrument.measure([Nudge(0.1, torch.ones(2))], None).states
        [tensor([2., 2.])]
    """

    solve: Solve
    batched: bool = True
    timeout: float | None = None
    retries: int = 0
    executor: Literal["thread", "process"] | Executor | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.solve):
            raise InvalidOptionError(f"solve must be a function from an added force to a state, not {self.solve!r}.")
        if self.timeout is not None and not (isinstance(self.timeout, (int, float)) and 0 < self.timeout < math.inf):
            raise InvalidOptionError(f"timeout must be a positive number of seconds or None, not {self.timeout!r}.")
        check_count("retries", self.retries, 0)
        if self.workers is not None:
            check_count("workers", self.workers, 1)
        if self.executor not in (None, "thread", "process") and not isinstance(self.executor, Executor):
            choice = unknown_name("value of executor", self.executor, ("thread", "process"))
            raise InvalidOptionError(f"{choice} Or None, or a concurrent.futures.Executor.")

    def measure(self, nudges: Sequence[Nudge], shape: torch.Size | None, rows: int = 0) -> Measurement:
        """The states at several nudges.

        Args:
            nudges: The calls to make, with forces for the whole batch.
            shape: Shape of a state, or `None` to take that of the first state that comes back.
            rows: Rows of the batch, for a solver that takes one at a time.

        Returns:
            The states in order, and how many calls failed.

        Raises:
            SolverError: If a call fails more often than it may be repeated.
        """
        if self.batched:
            return self._run(nudges, shape)
        calls = [
            replace(nudge, current=nudge.current[row] if nudge.current.dim() else nudge.current, row=row)
            for nudge in nudges
            for row in range(rows)
        ]
        done = self._run(calls, None if shape is None else shape[1:])
        states = [torch.stack(done.states[k * rows : (k + 1) * rows]) for k in range(len(nudges))]
        return replace(done, states=states)

    def _run(self, nudges: Sequence[Nudge], shape: torch.Size | None) -> Measurement:
        call, pool, deadline = self._how()
        workers = 1 if self.executor is None else self.workers or os.cpu_count() or 1
        states: list[Tensor | None] = [None] * len(nudges)
        waiting = deque((index, 0) for index in range(len(nudges)))
        running: dict[Future[Any], tuple[int, int, float]] = {}
        failures = 0
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    index, attempt = waiting.popleft()
                    future = pool.submit(call, *_sent(nudges[index], self.executor))
                    running[future] = (index, attempt, time.monotonic() + deadline)
                soonest = min(end for _, _, end in running.values()) - time.monotonic()
                done, _ = wait(running, None if soonest == math.inf else max(0.0, soonest), FIRST_COMPLETED)
                overdue = [f for f, (_, _, end) in running.items() if f not in done and time.monotonic() >= end]
                for future in (*done, *overdue):
                    index, attempt, _ = running.pop(future)
                    try:
                        state = _received(future.result(timeout=0), nudges[index], shape)
                    except Exception as error:
                        failures += 1
                        if attempt == self.retries:
                            raise self._named(error, nudges[index]) from _cause(error)
                        waiting.append((index, attempt + 1))
                    else:
                        states[index] = state
                        shape = state.shape
        finally:
            for future in running:
                future.cancel()
        answered = cast(list[Tensor], states)
        return Measurement(answered, failures, max(torch.finfo(state.dtype).eps for state in answered))

    def _how(self) -> tuple[Solve, Executor, float]:
        """What to call, where, and how many seconds to wait for it."""
        seconds = math.inf if self.timeout is None else self.timeout
        if isinstance(self.executor, Executor):
            return _Undifferentiated(self.solve), self.executor, seconds
        if self.executor == "process":
            return _Forked(_Undifferentiated(self.solve), self.timeout), _DaemonThreads(), math.inf
        if self.executor == "thread" or self.timeout is not None:
            return _Undifferentiated(self.solve), _DaemonThreads(), seconds
        return _Undifferentiated(self.solve), _Inline(), seconds

    def _named(self, error: Exception, nudge: Nudge) -> SolverError:
        times = f" {self.retries + 1} times" if self.retries else ""
        kind: type[SolverError] = SolverError
        if isinstance(error, SolverError):
            kind, what = type(error), str(error)
        elif isinstance(error, (TimeoutError, subprocess.TimeoutExpired)):
            kind = SolverTimeoutError
            limit = "" if self.timeout is None else f" of {self.timeout:g} s"
            what = f"did not return within its time-out{limit}. Raise timeout, or retries if it hangs now and then."
        else:
            what = f"raised {type(error).__name__}: {error}"
        hint = ""
        if kind is not SolverTimeoutError and not nudge.amplitude and not nudge.current.dim():
            hint = " The free phase was given a zero without dimensions: if solve needs one of full shape, give shape=."
        return kind(f"{nudge}: the solver{times} {what}{hint}", nudge=nudge.amplitude, current=nudge.current)


@dataclass(frozen=True)
class Measurement:
    """What came back from several calls.

    Args:
        states: In the order of the nudges.
        failures: How many calls failed and were repeated.
        eps: Relative rounding error of the coarsest dtype that came back.

    Example:
        >>> Measurement([torch.zeros(1)], failures=0).states
        [tensor([0.])]
    """

    states: list[Tensor]
    failures: int
    eps: float = 0.0


def _sent(nudge: Nudge, executor: object) -> tuple[Any, ...]:
    # A copy: a solver may write into its argument. Between processes a tensor would need shared memory.
    current: Any = nudge.current.detach().clone()
    if executor not in (None, "thread"):
        current = current.cpu().numpy()
    return (current,) if nudge.row is None else (current, nudge.row)


def _received(state: Any, nudge: Nudge, shape: torch.Size | None) -> Tensor:
    try:
        # A copy: a solver that starts from its last answer may return the same memory each time.
        tensor = (state.detach() if isinstance(state, Tensor) else torch.as_tensor(np.asarray(state))).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SolverShapeError(f"returned {type(state).__name__}, which is no array of numbers: {error}") from error
    if tensor.is_complex() or tensor.dtype is torch.bool:
        raise SolverShapeError(f"returned {tensor.dtype}, but a state is real.")
    tensor = tensor if tensor.is_floating_point() else tensor.double()
    expected = shape if shape is not None else (nudge.current.shape if nudge.current.dim() else None)
    if expected is not None and tensor.shape != expected:
        raise SolverShapeError(f"returned shape {tuple(tensor.shape)} where the state has {tuple(expected)}.")
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise SolverNonFiniteError(f"returned {count} of {tensor.numel()} entries that are NaN or infinite.")
    return tensor


def _cause(error: Exception) -> BaseException | None:
    return error.__cause__ if isinstance(error, SolverError) else error


@dataclass(frozen=True)
class _Undifferentiated:
    """The solver, called without a graph; an array in place of a tensor where it crosses a process."""

    solve: Solve

    def __call__(self, current: Any, *row: int) -> Any:
        crossed = not isinstance(current, Tensor)
        with torch.no_grad():
            state = self.solve(torch.from_numpy(current) if crossed else current, *row)
        return state.detach().cpu().numpy() if crossed and isinstance(state, Tensor) else state


class _Inline(Executor):
    """Runs a call at once, where it is asked for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _DaemonThreads(Executor):
    """A thread for each call. Those of the standard library's pool are joined at exit, where one that hangs blocks."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name="torchdeq-ep-solve").start()
        return future


@dataclass(frozen=True)
class _Forked:
    """A call in a process of its own, which is killed when its time is over."""

    call: Solve
    timeout: float | None

    def __call__(self, *arguments: Any) -> Any:
        # Forked where that exists, so that closures need no pickling.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        context: Any = multiprocessing.get_context(method)
        with _starting, warnings.catch_warnings():  # one start at a time, or the next child would hold this pipe open
            warnings.simplefilter("ignore", DeprecationWarning)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, self.call, arguments), daemon=True)
            process.start()
            sender.close()
        try:
            if not receiver.poll(self.timeout):
                raise TimeoutError
            failed, answer = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"its process ended with exit code {process.exitcode} and no answer") from None
        finally:
            process.kill()
            process.join()
            receiver.close()
        if failed:
            raise answer
        return answer


def _child(sender: Any, call: Solve, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the thread pool of the parent does not exist here
    try:
        answer = (False, call(*arguments))
    except Exception as error:
        answer = (True, error)
    try:
        sender.send(answer)
    except Exception as error:
        sender.send((True, RuntimeError(f"{answer[1]!r} (it could not be passed on: {error})")))
