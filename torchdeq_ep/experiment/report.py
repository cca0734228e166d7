"""What the runs amount to: a table in Markdown, a sentence on the gap, and a figure of the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torchdeq_ep.experiment.train import MODES, Epoch, Mode, Run
from torchdeq_ep.measuring import INK, check_writable, dress, new_figure, save

_NAMES: dict[Mode, str] = {"ift": "exact (IFT)", "ep": "EP", "ep-homeostasis": "EP with homeostasis"}
# Of Okabe & Ito's palette; the dashes tell the curves apart without colour.
_COLOURS: dict[Mode, str] = {"ift": "#000000", "ep": "#D55E00", "ep-homeostasis": "#0072B2"}
_DASHES: dict[Mode, Any] = {"ift": "solid", "ep": (0, (5, 2)), "ep-homeostasis": (0, (1.5, 1.2))}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; the latter is 0 for a single one.

    Example:
        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, sd=1.4142135623730951)
    """

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def text(self, digits: int, unit: str = "") -> str:
        """`mean ± sd`, rounded."""
        return f"{self.mean:.{digits}f} ± {self.sd:.{digits}f}{unit}"


def last_spread(runs: Sequence[Run], mode: Mode, measure: str) -> Spread | None:
    """A measure of the last epoch over the runs of a mode.

    Args:
        runs: All runs.
        mode: The mode.
        measure: Name of a field of [`Epoch`][torchdeq_ep.experiment.train.Epoch].

    Returns:
        Its spread, or `None` if there is no run of that mode.
    """
    values = [float(getattr(run.epochs[-1], measure)) for run in runs if run.mode == mode]
    return Spread.of(values) if values else None


def gap_closed(runs: Sequence[Run]) -> float:
    """How much of the gap in test error between EP and exact gradients homeostasis closes.

    Args:
        runs: All runs.

    Returns:
        `(EP - with homeostasis) / (EP - exact)`; NaN if a mode is missing, if a run failed, or if EP alone is not worse
        than exact gradients.

    Example:
        >>> runs = [
        ...     Run(mode, 0, (Epoch(1, 0.5, error, 0.9, 0.5, 45.0, 1e-4, 0, 60.0),))
        ...     for mode, error in (("ift", 2.0), ("ep", 6.0), ("ep-homeostasis", 3.0))
        ... ]
        >>> gap_closed(runs)
        0.75
    """
    if any(run.failure for run in runs):
        return math.nan
    spreads = [last_spread(runs, mode, "test_error") for mode in MODES]
    exact, plain, homeostatic = (math.nan if spread is None else spread.mean for spread in spreads)
    return (plain - homeostatic) / (plain - exact) if plain > exact else math.nan


def table(runs: Sequence[Run]) -> str:
    """The table, and a sentence below it.

    Args:
        runs: Finished runs.

    Returns:
        Markdown.

    Example:
        >>> print(table([Run("ep", 0, (Epoch(1, 0.5, 6.0, 0.9, 0.5, 45.0, 1e-4, 0, 60.0),))]).splitlines()[-1])
        | EP | 1 | 6.00 ± 0.00 % | 0.900 ± 0.000 | 0.500 ± 0.000 | 45.0 ± 0.0° | 1.0 |
    """
    lines = [
        "| gradient | seeds | test error | cosine of EP | symmetry of `J M` | weight angle | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        of_mode = [run for run in runs if run.mode == mode]
        if not of_mode:
            continue
        error, cosine, symmetry, angle, seconds = (
            Spread.of([float(getattr(run.epochs[-1], measure)) for run in of_mode])
            for measure in ("test_error", "cosine", "symmetry", "angle", "seconds")
        )
        lines.append(
            f"| {_NAMES[mode]} | {len(of_mode)} | {error.text(2, ' %')} | {cosine.text(3)} | {symmetry.text(3)} "
            f"| {angle.text(1, '°')} | {seconds.mean / 60:.1f} |"
        )
    closed = gap_closed(runs)
    if math.isfinite(closed):
        lines += ["", f"Homeostasis closes {closed:.0%} of the gap between EP and exact gradients."]
    lines += ["", *(f"Failed: {run.mode}, seed {run.seed}: {run.failure}" for run in runs if run.failure)]
    return "\n".join(lines).rstrip() + "\n"


def save_figure(runs: Sequence[Run], title: str, path: str | Path) -> None:
    """Draw test error and cosine against epochs: mean over the seeds, with a band of one standard deviation.

    Args:
        runs: Finished runs.
        title: What they were trained on.
        path: File to write; its suffix chooses the format.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InvalidOptionError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> run = Run("ep", 0, (Epoch(1, 0.5, 6.0, 0.9, 0.5, 45.0, 1e-4, 0, 60.0),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure([run], "digits", f"{folder}/curves.png")
        ...     [path.name for path in Path(folder).iterdir()]
        ['curves.png']
    """
    check_writable(path)
    figure = new_figure(10.0, 4.4)
    left, right = figure.subplots(1, 2)
    _draw_panel(left, runs, "test_error", "test error in percent", first_epoch=1)
    _draw_panel(right, runs, "cosine", "cosine of EP's error vector with the exact one", first_epoch=0)
    left.set_yscale("log")
    ticker = import_module("matplotlib.ticker")
    left.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    left.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_locator(ticker.NullLocator())
    right.set_ylim(top=1.02)
    figure.suptitle(title, x=0.07, ha="left", color=INK, fontsize=13)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(MODES), frameon=False, labelcolor=INK, handlelength=3.2
    )
    figure.subplots_adjust(left=0.07, right=0.98, top=0.89, bottom=0.22, wspace=0.22)
    save(figure, path)


def _draw_panel(axes: Any, runs: Sequence[Run], measure: str, label: str, first_epoch: int) -> None:
    ticker = import_module("matplotlib.ticker")
    dress(axes)
    for mode in MODES:
        per_epoch: dict[int, list[Epoch]] = {}
        for run in runs:
            for epoch in run.epochs if run.mode == mode else ():
                if epoch.epoch >= first_epoch:
                    per_epoch.setdefault(epoch.epoch, []).append(epoch)
        if not per_epoch:
            continue
        numbers = sorted(per_epoch)
        spreads = [Spread.of([float(getattr(epoch, measure)) for epoch in per_epoch[number]]) for number in numbers]
        low, high = [s.mean - s.sd for s in spreads], [s.mean + s.sd for s in spreads]
        axes.fill_between(numbers, low, high, color=_COLOURS[mode], alpha=0.18, linewidth=0)
        means = [s.mean for s in spreads]
        axes.plot(numbers, means, color=_COLOURS[mode], linestyle=_DASHES[mode], linewidth=2.0, label=_NAMES[mode])
    axes.set_xlabel("epoch", color=INK)
    axes.set_title(label, loc="left", color=INK, fontsize=10.5)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
