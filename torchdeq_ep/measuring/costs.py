"""What a call costs: time, by turns with others, and memory."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from torchdeq_ep.measuring.capture import caught_warnings, short


def milliseconds(
    calls: Mapping[int, Callable[[], object]],
    device: torch.device,
    repeats: int,
    prepare: Callable[[], object] = lambda: None,
) -> tuple[dict[int, float], dict[int, str]]:
    """Median times of calls that take turns, so that drift of the machine hits all.

    Args:
        calls: What to time, by number; each has run before, so nothing is left to warm up.
        device: Where its tensors are.
        repeats: Number of timings of each.
        prepare: Called before each, and not timed.

    Returns:
        Milliseconds by number, and why a call has none.

    Example:
        >>> times, failed = milliseconds({0: lambda: None, 1: lambda: 1 / 0}, torch.device("cpu"), 3)
        >>> times[0] < 10, failed
        (True, {1: 'ZeroDivisionError: division by zero'})
    """
    times: dict[int, list[float]] = {k: [] for k in calls}
    failed: dict[int, str] = {}
    with caught_warnings():
        for _ in range(repeats):
            for k, call in calls.items():
                if k in failed:
                    continue
                try:
                    prepare()
                    _synchronize(device)
                    start = time.perf_counter()
                    call()
                    _synchronize(device)
                    times[k].append(1e3 * (time.perf_counter() - start))
                except Exception as error:  # one mode must not cost the others their times
                    failed[k] = short(error)
    return {k: statistics.median(values) for k, values in times.items() if k not in failed}, failed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Largest memory in use during a call beyond what was in use before, in bytes; NaN where nothing tells.

    Args:
        call: What to run.
        device: Where its tensors are.

    Returns:
        Bytes, by the allocator's own count on a GPU, by PyTorch's profiler on a CPU.

    Example:
        >>> import torch
        >>> peak_memory(lambda: torch.ones(1000), torch.device("cpu")) >= 4000
        True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return math.nan
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with _unlogged(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            call()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    except (RuntimeError, AttributeError):  # a profiler runs already, or this torch has another one
        return math.nan
    in_use = peak = 0
    for _, change in changes:
        in_use += change
        peak = max(peak, in_use)
    return float(peak) if changes else math.nan


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without the two lines that PyTorch's profiler writes to standard error whenever it runs."""
    variable = "KINETO_LOG_LEVEL"
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "99"
    try:
        yield
    finally:
        os.environ.pop(variable, None)
