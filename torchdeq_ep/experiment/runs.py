"""The experiment as a whole: the runs that are not there yet, then the table and the figure of all that are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.experiment.data import Images
from torchdeq_ep.experiment.report import save_figure, table
from torchdeq_ep.experiment.train import Mode, OnStep, Run, Setup, run_name, train
from torchdeq_ep.measuring import write_whole

OnRun = Callable[[Mode, int], OnStep | None]


def run_all(
    setup: Setup,
    images: Images,
    out: str | Path,
    modes: Sequence[Mode],
    seeds: int,
    on_run: OnRun | None = None,
) -> list[Run]:
    """Train what has not been trained yet; each run that finishes is kept in a file of its own.

    Two processes with different modes can share a directory.

    Args:
        setup: What to train.
        images: The data.
        out: Directory of the results; created if need be. Runs lie in its subdirectory `runs`.
        modes: Which kinds of gradient.
        seeds: How many seeds, from 0 on.
        on_run: Called before each run that is trained, with its mode and seed; returns what `train` calls after each
            step, to show progress.

    Returns:
        All runs asked for, in order, read from files or trained.

    Raises:
        InvalidOptionError: If there is no seed, or the directory cannot be made.

    Example:
        >>> import tempfile
        >>> from torchdeq_ep.experiment.data import load_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     runs = run_all(Setup(epochs=1, batch=500, hidden=(8, 8)), load_images(), folder, ["ep"], seeds=1)
        >>> [(run.mode, run.seed, len(run.epochs)) for run in runs]
        [('ep', 0, 2)]
    """
    if seeds < 1:
        raise InvalidOptionError(f"seeds must be at least 1, not {seeds}.")
    directory = Path(out) / "runs"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOptionError(f"cannot make the directory {directory}: {error}") from error
    finished = []
    for seed in range(seeds):
        for mode in modes:
            path = directory / f"{run_name(setup, mode, seed, images)}.json"
            run = _read(path)
            if run is None:
                run = train(setup, mode, seed, images, None if on_run is None else on_run(mode, seed))
                _write(path, json.dumps(asdict(run) | {"setup": asdict(setup), "data": images.name}, indent=1) + "\n")
            finished.append(run)
    return finished


def write_report(runs: Sequence[Run], setup: Setup, images: Images, out: str | Path) -> tuple[Path, Path]:
    """Write `results.md` and `curves.png`.

    Args:
        runs: Finished runs.
        setup: What they share.
        images: The data.
        out: Directory, which exists.

    Returns:
        The two paths.

    Raises:
        MissingDependencyError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from torchdeq_ep.experiment.data import load_images
        >>> from torchdeq_ep.experiment.train import Epoch
        >>> run = Run("ep", 0, (Epoch(1, 0.5, 6.0, 0.9, 0.5, 45.0, 1e-4, 0, 60.0),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write_report([run], Setup(), load_images(), folder)]
        ['results.md', 'curves.png']
    """
    document, picture = Path(out) / "results.md", Path(out) / "curves.png"
    shape = " - ".join(str(n) for n in (images.train_x.shape[1], *setup.hidden, images.n_classes))
    title = f"{images.name}, {shape}, backward weights at {setup.angle:g}°"
    options = ", ".join(f"{name} {value}" for name, value in asdict(setup).items())
    _write(document, f"# {title}\n\n{table(runs)}\nSetup: {options}.\n")
    save_figure(runs, title, picture)
    return document, picture


def _read(path: Path) -> Run | None:
    """The run in a file; `None` if there is none, or it is not whole: it is trained anew then."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Run.of_json({name: plain[name] for name in ("mode", "seed", "epochs", "failure")})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_whole(path, write)
