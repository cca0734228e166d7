"""The result of a comparison, and the forms it is read in: Markdown, a data frame, plain data, a sentence, a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchdeq_ep._display import html_lines, html_table, text_table
from torchdeq_ep.errors import InvalidOptionError
from torchdeq_ep.measuring.capture import CERTAIN
from torchdeq_ep.measuring.files import plain, require
from torchdeq_ep.measuring.plots import Point, Words, check_plot, scatter
from torchdeq_ep.measuring.ranking import ranking
from torchdeq_ep.measuring.rows import Row
from torchdeq_ep.measuring.style import save

BASELINE = "ift"
"""The mode that times are quoted relative to."""
WIDE = 150
"""Characters in a line from which on the details of the printed table have room, """
WIDEST = 175
"""and all columns."""
_MISSING = {"none": "there is no reference", "zero": "the cotangent is zero", "least squares": "I - J is singular"}
"""Why an error has no number although the mode has an estimate, by the reference."""
_SMALLEST_ERROR = 1e-16
"""Where an error of zero is drawn."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The table that [`compare`][torchdeq_ep.measuring.compare] returns.

    Args:
        rows: One for each mode and solver, in the order asked for.
        reference: How the exact adjoint was found: `"dense"` (a linear system solved in float64), `"ift"` (implicit
            differentiation with up to 1000 products, for states of more than 4096 entries), `"least squares"` (the
            system is singular, and this comes closest), `"zero"` (the cotangent is) or `"none"`; for a model with
            several DEQs all that apply.
        state_entries: Number of entries of all states together.
        device: Where the states live.
        repeats: Number of timings behind each median.
        warnings: What was warned about while finding the exact adjoint, in short.
        reference_residual: Relative residual at which the exact adjoint stopped, of `v = J^T v + g`: the largest over
            the DEQs, as are the next two. Above 0.001 it is not exact, and the sentence says so.
        free_residual: Relative residual of the free phase, `|f(z*) - z*| / |z*|`.
        spectral_radius: Of the Jacobian at `z*`, to a few per cent, from up to 30 products; NaN where `f` offers none.
        exact: What errors of gradients are relative to, `"equilibrium"` or `"steps"`.
        gap: How far the other of these is from it, relatively; NaN where there is no gradient through the steps made.
        own_errors: How far the gradient of the model as it is is from that of the equilibrium, and that of the steps.

    Example:
        >>> rows = (Row("ift", "own", gradient_error=1e-7, milliseconds=2.0), Row("ep", "own", gradient_error=1e-3))
        >>> print(Comparison(rows, "dense", 8, "cpu", 5).to_markdown().splitlines()[-1])
        | ep | own | 1.0e-03 | - | - | - | - | - | - | - | - | - | - | - | - | - | - | |
    """

    rows: tuple[Row, ...]
    reference: str
    state_entries: int
    device: str
    repeats: int
    warnings: tuple[str, ...] = ()
    reference_residual: float = math.nan
    free_residual: float = math.nan
    spectral_radius: float = math.nan
    exact: str = "equilibrium"
    gap: float = math.nan
    own_errors: tuple[float, float] = (math.nan, math.nan)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.rows)} backward passes: {self.sentence()}>"

    def __str__(self) -> str:
        columns = [column for column in _shown(self) if not column.is_detail]
        return "\n".join([text_table(*self._cells(columns)), "", *self._told()])

    def _repr_html_(self) -> str:
        columns = [column for column in _shown(self) if column.title != "converged"]
        return html_table(*self._cells(columns)) + html_lines(self._told())

    def _cells(self, columns: Sequence[Column]) -> tuple[list[str], list[list[str]], list[bool]]:
        """Headings, rows, and which columns are text."""
        rows = [[column.text(self, row) for column in columns] for row in self.rows]
        return [column.title for column in columns], rows, [column.is_text for column in columns]

    def _told(self) -> list[str]:
        """What stands below the table."""
        notes = [f"{row.label}: {note}" for row in self.rows for note in row.notes]
        return [*notes, *self.warnings, self.conditions(), self.sentence()]

    @property
    def baseline(self) -> Row | None:
        """The first row of implicit differentiation that has figures, or `None`."""
        usable = (row for row in self.rows if row.backward == BASELINE and math.isfinite(row.milliseconds))
        return next(usable, None)

    def relative_time(self, row: Row) -> float:
        """Time of a row divided by that of the baseline; NaN if there is none.

        Args:
            row: One of the rows.

        Returns:
            The ratio.
        """
        return row.milliseconds / self.baseline.milliseconds if self.baseline else math.nan

    def to_markdown(self) -> str:
        """The table in Markdown.

        Returns:
            One line a row, below a header of two lines; then, behind an empty line,
            [`conditions`][torchdeq_ep.measuring.Comparison.conditions].
        """
        lines = [[column.title for column in COLUMNS], ["---" if column.is_text else "---:" for column in COLUMNS]]
        lines += [[column.text(self, row).replace("|", "\\|") for column in COLUMNS] for row in self.rows]
        table = [f"| {' | '.join(cells)} |".replace("  |", " |") for cells in lines]
        conditions = self.conditions()
        return "\n".join([*table, *(["", conditions] if conditions else [])])

    def conditions(self) -> str:
        """What the modes were given to work with: the free phase, the Jacobian, the reference.

        Returns:
            One line; empty for a comparison without such figures.

        Example:
            >>> rows = (Row("ift", "own", gradient_error=1e-7),)
            >>> Comparison(rows, "ift", 8, "cpu", 5, free_residual=1e-3, spectral_radius=0.9).conditions()
            'Free phase: relative residual 1.0e-03. Spectral radius of the Jacobian: about 0.90.'
        """
        found = []
        if math.isfinite(self.free_residual):
            found.append(f"Free phase: relative residual {self.free_residual:.1e}.")
        if math.isfinite(self.spectral_radius):
            found.append(f"Spectral radius of the Jacobian: about {self.spectral_radius:.2f}.")
        if math.isfinite(self.reference_residual):
            found.append(f"Reference: {self.reference}, relative residual {self.reference_residual:.1e}.")
        return " ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, ready for JSON: a figure that does not exist is `None`.

        Returns:
            The fields by name; `rows` is a list of dictionaries, each with `relative_time` beside its own fields.
        """
        rows = [{**asdict(row), "relative_time": self.relative_time(row)} for row in self.rows]
        whole: dict[str, Any] = plain({**asdict(self), "rows": rows, "sentence": self.sentence()})
        return whole

    def to_dataframe(self) -> Any:
        """The rows as a pandas data frame.

        Returns:
            A `pandas.DataFrame` with the fields of [`Row`][torchdeq_ep.measuring.Row] as columns.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        pandas = require("pandas", "pandas", "A data frame")
        return pandas.DataFrame([{**asdict(row), "warnings": "; ".join(row.warnings)} for row in self.rows])

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw error against time, and save the picture where a path is given.

        Args:
            path: File to write; its suffix chooses the format (`.png`, `.svg`, `.pdf`).

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
            InvalidOptionError: If the file cannot be written in this place or format, or no row has figures.
        """
        path = None if path is None else check_plot(path)
        figure, _ = draw_comparison(self)
        if path is not None:
            save(figure, path)
        return figure

    def sentence(self) -> str:
        """The table in one sentence: the most exact mode, the fastest, and those that could not be used.

        Returns:
            A sentence. Implicit differentiation is what the others are held against, so it is not a candidate. The most
            exact is so as measured, whatever it says of itself; the fastest is of those that converged, if any did.

        Example:
            >>> ift = Row("ift", "own", gradient_error=1e-7, milliseconds=2.0)
            >>> ep = Row("ep", "own", gradient_error=1e-3, milliseconds=1.6)
            >>> Comparison((ift, ep), "dense", 8, "cpu", 5).sentence()
            'Next to ift, ep is closest to the exact gradient (error 1e-03) and the fastest (0.8 times ift).'
        """
        failed = ", ".join(row.label for row in self.rows if row.error)
        candidates = self._candidates()
        if not candidates:
            reason = _MISSING.get(self.reference, "")
            closing = "; ".join([*([reason] if reason else []), *([f"{failed} failed"] if failed else [])])
            return f"No mode could be measured{f': {closing}' if closing else ''}."
        closest = min(candidates, key=lambda row: row.gradient_error)
        fastest = min(
            [row for row in candidates if row.converged is not False] or candidates, key=lambda row: row.milliseconds
        )
        opening = "Next to ift, " if self.baseline and closest.backward != BASELINE else ""
        ratio = self.relative_time(fastest)
        speed = f"{_plain(ratio)} times ift" if self.baseline else f"{_plain(fastest.milliseconds)} ms"
        subject = "" if fastest is closest else f"{fastest.label} is "
        closing = f"; {failed} could not be used" if failed else ""
        what = "reference" if self._is_inexact else "exact"
        error = f"{closest.gradient_error:.0e}" if closest.gradient_error < 0.1 else _plain(closest.gradient_error)
        return (
            f"{opening}{closest.label} is closest to the {what} gradient (error {error}) and {subject}the fastest "
            f"({speed}){closing}.{self._caveat()}{ranking(self)}"
        )

    @property
    def _is_inexact(self) -> bool:
        return self.reference_residual > CERTAIN

    def _caveat(self) -> str:
        if not self._is_inexact:
            return ""
        return (
            f" The reference itself is not exact: it stopped at a relative residual of {self.reference_residual:.0e}, "
            "so an error says how far a mode is from that, and no more."
        )

    def _candidates(self) -> list[Row]:
        measured = [row for row in self.rows if math.isfinite(row.gradient_error) and math.isfinite(row.milliseconds)]
        return [row for row in measured if row.backward != BASELINE] or measured


@dataclass(frozen=True)
class Column:
    """A column of the printed table.

    Args:
        title: Its heading.
        text: The cell of a row.
        is_text: Set flush left.
        is_detail: Left out where the room is scarce.
        is_extra: Left out unless there is room for everything.
    """

    title: str
    text: Callable[[Comparison, Row], str]
    is_text: bool = False
    is_detail: bool = False
    is_extra: bool = False

    @property
    def least_width(self) -> int:
        """Characters in a line from which on it is shown."""
        return WIDEST if self.is_extra else WIDE if self.is_detail else 0


def _plain(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"  # 120, where .2g has 1.2e+02


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _error(comparison: Comparison, row: Row, value: float, form: str) -> str:
    """A distance to the reference, or in words why there is none: a mode that failed says so in its notes."""
    if row.error or math.isfinite(value):
        return _number(value, form)
    return {"none": "no reference", "zero": "zero"}.get(comparison.reference, "-")


def _yes_or_no(value: bool | None) -> str:
    return "-" if value is None else ("yes" if value else "no")


COLUMNS = (
    Column("backward", lambda _, row: row.backward, is_text=True),
    Column("solver", lambda _, row: row.solver, is_text=True),
    Column("gradient error", lambda table, row: _error(table, row, row.gradient_error, ".1e")),
    Column("gradient cosine", lambda table, row: _error(table, row, row.gradient_cosine, ".6f"), is_detail=True),
    Column("to the other", lambda _, row: _number(row.other_error, ".1e"), is_extra=True),
    Column("adjoint error", lambda table, row: _error(table, row, row.adjoint_error, ".1e")),
    Column("adjoint cosine", lambda table, row: _error(table, row, row.adjoint_cosine, ".6f"), is_detail=True),
    Column("adjoint residual", lambda _, row: _number(row.adjoint_residual, ".1e")),
    Column("nudge error", lambda _, row: _number(row.nudge_error, ".1e"), is_detail=True),
    Column("residual", lambda _, row: _number(row.residual, ".1e"), is_detail=True),
    Column("calls", lambda _, row: _number(row.calls, ".0f")),
    Column("ms", lambda _, row: _number(row.milliseconds, ".2f")),
    Column("x ift", lambda table, row: _number(table.relative_time(row), ".2f")),
    Column("step ms", lambda _, row: _number(row.step_milliseconds, ".2f"), is_extra=True),
    Column("peak MiB", lambda _, row: _number(row.peak_mib, ".2f"), is_detail=True),
    Column("beta", lambda _, row: _number(row.beta, ".2g"), is_detail=True),
    Column("converged", lambda _, row: _yes_or_no(row.converged), is_detail=True),
    Column("notes", lambda _, row: "; ".join(row.notes), is_text=True),
)
"""The columns in order: what was compared, how exact it is, what it costs, what there is to say."""


def _shown(comparison: Comparison) -> list[Column]:
    """The columns that say something beside the notes, which are told below the table."""
    hidden = {"notes"} | ({"solver"} if len({row.solver for row in comparison.rows}) == 1 else set())
    return [column for column in COLUMNS if column.title not in hidden]


def to_rich(comparison: Comparison, width: int = WIDE) -> Any:
    """The table for a terminal: without the notes, and without the solvers if there is one only.

    Args:
        comparison: What to show.
        width: Characters in a line; fewer than [`WIDE`][torchdeq_ep.measuring.tables] leave the details out.

    Returns:
        A `rich.table.Table`.

    Raises:
        MissingDependencyError: If rich is not installed.
    """
    rich_table = require("rich.table", "rich", "A table in the terminal")
    box = require("rich.box", "rich", "A table in the terminal")
    shown = [column for column in _shown(comparison) if width >= column.least_width]
    table = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        heading = column.title.replace(" ", "\n")
        table.add_column(heading, justify="left" if column.is_text else "right", no_wrap=True)
    for row in comparison.rows:
        cells = [column.text(comparison, row) for column in shown]
        table.add_row(*cells, style="dim" if row.error else None)
    return table


def draw_comparison(comparison: Comparison) -> tuple[Any, list[Any]]:
    """Error against time as a figure, for a test or a notebook.

    Args:
        comparison: What to draw.

    Returns:
        A `matplotlib.figure.Figure`, and the labels of its markers as `matplotlib.text.Annotation`.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InvalidOptionError: If no row has figures.
    """
    shown = [row for row in comparison.rows if math.isfinite(row.gradient_error) and math.isfinite(row.milliseconds)]
    if not shown:
        raise InvalidOptionError("there is nothing to draw: no mode of this comparison has an error and a time.")
    relative = comparison.baseline is not None
    backwards = list(dict.fromkeys(row.backward for row in comparison.rows))
    solvers = list(dict.fromkeys(row.solver for row in comparison.rows))
    points = [
        Point(
            comparison.relative_time(row) if relative else row.milliseconds,
            max(row.gradient_error, _SMALLEST_ERROR),
            row.label,
            backwards.index(row.backward),
            solvers.index(row.solver),
        )
        for row in shown
    ]
    failed = ", ".join(f"{row.label} ({row.error.partition(':')[0]})" for row in comparison.rows if row.error)
    unit = ", relative to implicit differentiation (ift)" if relative else " in milliseconds"
    words = Words(
        title="How exact and how fast is each backward pass?",
        subtitle="lower is more exact, further left is faster",
        x=f"time of the backward solve{unit}",
        y="relative error of the gradient",
        footnote=f"Not shown: {failed}" if failed else "",
    )
    return scatter(points, words, rule=1.0 if relative else None)
