"""ngspice as a process: it is fed through a pipe, sees nothing of the user's settings, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from torchdeq_ep.errors import EPError, InvalidOptionError, MissingDependencyError, SolverTimeoutError
from torchdeq_ep.extend import check_count

TOLERANCES = "reltol=1e-10 vntol=1e-13 abstol=1e-18 itl1=1000"
"""Tight enough that a difference of two operating points is a derivative."""

# The last attempt of ngspice, a transient that is taken for an operating point, also "finds" one at floating nodes.
_SETTINGS = ("set numdgt=16", "set width=300", "optran 1 1 1 0 0 0")
_VALUE = re.compile(r"^(v\(\w+\))(?:\[\d+\])? = (\S+)", re.MULTILINE | re.IGNORECASE)
_COMPLAINT = re.compile(r"error|singular|failed|no convergence|iteration limit|no such|cannot|timestep|unknown", re.I)
_STAGE = re.compile(r"stepping|gmin step|source step", re.IGNORECASE)
_ROW = "@row "
_FOREIGN = ("SPICE_", "NGSPICE_", "LC_", "LANG")
_KEPT = 20


class NgspiceError(EPError, RuntimeError):
    """ngspice did not find an operating point; the message holds its own words."""


class NgspiceTimeoutError(NgspiceError, SolverTimeoutError, subprocess.TimeoutExpired):
    """ngspice did not finish in its time, and was ended."""

    def __init__(self, message: str = "", *, nudge: float = 0.0, current: Tensor | None = None) -> None:
        SolverTimeoutError.__init__(self, message, nudge=nudge, current=current)
        self.cmd, self.timeout, self.output, self.stderr = "ngspice", 0.0, None, None


@dataclass(frozen=True)
class SpiceProgram:
    """How ngspice is run.

    Nothing of the user's environment reaches it: no start-up file is read (`-n`), the variables `SPICE_*` and
    `NGSPICE_*` are removed, the locale is C. It is fed through a pipe and ends with the process that started it, so
    there are no temporary files, and nothing is left after a kill. If it fails, netlist and log are kept in the user's
    cache folder, the newest 20 of them, and the error names them.

    Args:
        command: Name or path of the program.
        timeout: Seconds for one process.
        workers: Processes at a time; the rows are spread over them.
        flags: More arguments of the program, such as `("-D", "ngbehavior=psa")`.

    Raises:
        InvalidOptionError: If an option is not acceptable.
        MissingDependencyError: If there is no such program.
    """

    command: str = "ngspice"
    timeout: float = 60.0
    workers: int = 1
    flags: tuple[str, ...] = ()
    _running: set[subprocess.Popen[str]] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.timeout, bool) or not (
            isinstance(self.timeout, (int, float)) and 0 < self.timeout < math.inf
        ):
            raise InvalidOptionError(f"timeout must be a positive number of seconds, not {self.timeout!r}.")
        check_count("workers", self.workers, 1)
        self._path()

    def parts(self, rows: int) -> list[list[int]]:
        """The rows of a batch, spread over the workers.

        Args:
            rows: How many there are.

        Returns:
            Their numbers, a list for each process.
        """
        return [part for k in range(self.workers) if (part := list(range(k, rows, self.workers)))]

    def operating_points(self, decks: Sequence[tuple[Sequence[int], str]], probes: Sequence[str]) -> Tensor:
        """Voltages at several operating points of a circuit, a process for each netlist.

        Args:
            decks: Pairs of numbers of rows and the netlist that walks through them: see `spice_deck`.
            probes: What is read, such as `v(out)`.

        Returns:
            Of shape `(rows, probes)`, in float64.

        Raises:
            NgspiceError: If an operating point was not found, or ngspice printed something else than numbers.
            NgspiceTimeoutError: If a process took longer than `timeout`.
        """
        found = torch.empty(sum(len(rows) for rows, _ in decks), len(probes), dtype=torch.float64)
        with ThreadPoolExecutor(len(decks)) as pool:
            try:
                futures = [pool.submit(self._points, rows, deck, probes) for rows, deck in decks]
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = [future for future in futures if future.done() and future.exception() is not None]
                answers = [future.result() for future in (failed or futures)]
            finally:
                for process in list(self._running):
                    _end(process)
        for (rows, _), answer in zip(decks, answers, strict=True):
            found[list(rows)] = answer
        return found

    def run(self, deck: str, folder: str | None = None) -> tuple[str, str]:
        """Run a netlist with a control block.

        Args:
            deck: The text.
            folder: Where relative paths in it start; by default a scratch folder that is gone at once.

        Returns:
            What was written to the standard output, and to the standard error.

        Raises:
            NgspiceTimeoutError: If it took too long.
        """
        command = [*_ending_with_this_process(), self._path(), "-b", "-n", *self.flags]
        surroundings = {name: value for name, value in os.environ.items() if not name.upper().startswith(_FOREIGN)}
        surroundings |= {"LC_ALL": "C", "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            # The folder is removed while the process runs in it: some device models write logs that nobody asked for.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=surroundings,
                cwd=folder or scratch,
                start_new_session=True,
            )
        self._running.add(process)
        started = time.monotonic()
        try:
            return process.communicate(deck, timeout=self.timeout)
        except subprocess.TimeoutExpired as late:
            _end(process)
            log = "".join(_text(part) for part in (late.stdout, late.stderr))
            raise NgspiceTimeoutError(
                f"ngspice was ended after {time.monotonic() - started:.3g} s, its time-out. Raise timeout= of Ngspice, "
                "Netlist or the recipe (--timeout on the command line) if the circuit is large or the batch long, or "
                f"spread the rows over more workers. {keep(deck, log)}"
            ) from None
        finally:
            _end(process)
            self._running.discard(process)

    def _points(self, rows: Sequence[int], deck: str, probes: Sequence[str]) -> Tensor:
        out, err = self.run(deck)
        states = []
        for row, part in zip(rows, out.split(_ROW)[1:], strict=False):
            values = {name.lower(): value for name, value in _VALUE.findall(part)}
            numbers = [_number_in(values.get(probe.lower(), "")) for probe in probes]
            if not all(map(math.isfinite, numbers)):
                raise NgspiceError(
                    f"ngspice found no operating point for row {row}: {_words(part + err)} Likeliest: a node without a "
                    "path for direct current to ground, or an input or a nudge beyond what the circuit can bear. "
                    f"{keep(deck, out + err)}"
                )
            states.append(numbers)
        if len(states) != len(rows):
            raise NgspiceError(
                f"ngspice stopped after {len(states)} of {len(rows)} rows: {_words(err + out)} Likeliest: it could not "
                f"read the netlist. {keep(deck, out + err)}"
            )
        return torch.tensor(states, dtype=torch.float64).reshape(len(rows), len(probes))

    def _path(self) -> str:
        found = shutil.which(self.command)
        if found is None:
            raise MissingDependencyError(
                f"ngspice is needed to simulate the circuit, and {self.command!r} was not found. Install it (Debian, "
                "Ubuntu: apt-get install ngspice; macOS: brew install ngspice), or give its path as command=. A "
                "ResistiveNetwork can also be used without it: it is its own differentiable twin."
            )
        return found


def spice_deck(circuit: Sequence[str], rows: Sequence[Sequence[str]], probes: Sequence[str]) -> str:
    """A netlist with a script that walks through operating points.

    Args:
        circuit: The lines of the circuit, the title first, without a control block and without `.end`.
        rows: For each operating point, the commands that set it (`alter v1 = 2`).
        probes: What is read, such as `v(out)`.

    Returns:
        The text.

    Example:
        >>> print(spice_deck(["title", "V1 a 0 1"], [["alter V1 = 2"]], ["v(a)"]).partition("alter")[2])
         V1 = 2
        echo @row 0
        op
        print v(a)
        destroy all
        quit 0
        .endc
        .end
        <BLANKLINE>
    """
    lines = [*circuit, ".control", *_SETTINGS]
    for number, commands in enumerate(rows):
        lines += [*commands, f"echo {_ROW}{number}", "op", *(f"print {probe}" for probe in probes), "destroy all"]
    return "\n".join([*lines, "quit 0", ".endc", ".end", ""])


def swept_deck(circuit: Sequence[str], sweep: str, rows: int, probes: Sequence[str]) -> str:
    """A netlist with a script that sweeps a source, and prints as `spice_deck`'s does.

    Args:
        circuit: As for `spice_deck`.
        sweep: The command, with a point for each row (`dc Vrow 0 99 1`).
        rows: How many points are printed.
        probes: What is read, such as `v(out)`.

    Returns:
        The text.
    """
    lines = [*circuit, ".control", *_SETTINGS, sweep]
    for row in range(rows):
        lines += [f"echo {_ROW}{row}", *(f"print {probe}[{row}]" for probe in probes)]
    return "\n".join([*lines, "quit 0", ".endc", ".end", ""])


def ngspice_available(command: str = "ngspice") -> bool:
    """Whether the program is installed.

    Args:
        command: Its name or path.

    Returns:
        Whether it can be found.
    """
    return shutil.which(command) is not None


def spice_number(value: object, name: str = "a value") -> str:
    """A number in a form that SPICE reads without loss.

    Args:
        value: Of any type that is a real number: Python's, NumPy's, a fraction, a tensor of one element.
        name: What it is called in the message.

    Returns:
        Its decimal form.

    Raises:
        InvalidOptionError: If it is no number, or not finite.

    Example:
        >>> import numpy as np
        >>> spice_number(np.float64(1e-12)), spice_number(torch.tensor(2))
        ('1e-12', '2.0')
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidOptionError(f"{name} must be a real number, not {value!r}.") from None
    if not math.isfinite(number):
        raise InvalidOptionError(f"{name} must be finite, and is {number}. Look for an overflow before the circuit.")
    return repr(number)


def keep(deck: str, log: str) -> str:
    """Keep a netlist and its log for whoever looks into a failure.

    Args:
        deck: The netlist.
        log: What the simulator said.

    Returns:
        A sentence that says where they are.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = cache / "torchdeq-ep" / "ngspice"
    mark = (
        f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{threading.get_ident() % 10**6}-{time.monotonic_ns() % 10**6}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".cir", deck), (".log", log)):
            old = sorted(folder.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime)
            for path in old[: max(0, len(old) - _KEPT + 1)]:
                path.unlink(missing_ok=True)
            (folder / f"{mark}{suffix}").write_text(text, encoding="utf-8")
    except OSError as error:
        return f"(Netlist and log could not be kept: {error}.)"
    return f"Netlist and log: {folder / mark}.cir and .log."


@functools.cache
def _ending_with_this_process() -> tuple[str, ...]:
    """On Linux, what makes a process end when this one is killed."""
    path = shutil.which("setpriv") if sys.platform == "linux" else None
    words = (path or "", "--pdeathsig", "KILL")
    with contextlib.suppress(OSError):
        if path and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            return words
    return ()


def _end(process: subprocess.Popen[str]) -> None:
    """End a process with all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()


def _number_in(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _text(output: str | bytes | None) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""


def _words(output: str) -> str:
    """The lines of the output in which something is complained about."""
    lines = [line.strip() for line in output.splitlines() if _COMPLAINT.search(line)]
    final = [line for line in lines if not _STAGE.search(line)] or lines
    kept = [line for line in dict.fromkeys(final) if line][:5]
    return "; ".join(kept) + "." if kept else "it gave no reason."
