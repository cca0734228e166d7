"""True error against reported error over random maps: the figure and the table of `docs/certificate.md`.

`make certificate` runs this, in two minutes, which writes `certificate.svg` and the table between the comments.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "benchmarks"), str(Path(__file__).parent)]
from certificate_draws import DTYPES, LARGE, SMALL, TOLD, WELL_POSED, Draw, draws  # noqa: E402
from pages import insert  # noqa: E402

from torchdeq_ep.measuring import COLOURS, dress, new_figure, save, write_text  # noqa: E402

PAGE = ROOT / "docs" / "certificate.md"
OPENING, CLOSING = "<!-- The table is written by `make certificate`. -->", "<!-- End of the table. -->"
COUNT, SEED = 6000, 2026
LEAST, NOTABLE = 1e-12, 1e-3


def table(found: Sequence[Draw]) -> str:
    """One row for each dtype, and one for those whose `I - J` is nearly singular."""
    right_or_wrong = f"error above {LARGE:.0%} | and silent | error below {SMALL:.0%} | and warned about"
    head = f"| dtype | draws | {right_or_wrong} | refused |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    well = [draw for draw in found if draw.smallest >= WELL_POSED]
    groups = {name: [draw for draw in well if draw.dtype == name] for name in DTYPES}
    groups["all"] = well
    groups[f"`I - J` nearly singular (below {WELL_POSED})"] = [d for d in found if d.smallest < WELL_POSED]
    for name, group in groups.items():
        wrong = [draw for draw in group if draw.error > LARGE]
        right = [draw for draw in group if draw.error < SMALL]
        counts = (
            len(group),
            len(wrong),
            sum(draw.is_silent for draw in wrong),
            len(right),
            sum(draw.is_false_alarm for draw in right),
            sum(bool(draw.refused) for draw in group),
        )
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def shares(found: Sequence[Draw]) -> str:
    """How often the two numbers were within a factor of three of the error that each is about."""
    told = [draw for draw in found if draw.smallest >= WELL_POSED and draw.dtype == "float64" and not draw.refused]
    exact = [d.adjoint_residual / d.exact_error for d in told if d.exact_error > NOTABLE]
    nudged = [d.nudge_error / d.error for d in told if d.error > NOTABLE and d.nudge_error > 3 * d.residual]
    rows = [("adjoint residual, of the exact gradient", exact), ("nudge error, of the limit of the mode", nudged)]
    lines = [
        f"| float64, errors above {NOTABLE:.0e}: the number, and what it is about | draws | within 3 | median ratio |",
        "|---|---|---|---|",
    ]
    for name, ratios in rows:
        near = sum(1 / 3 < ratio < 3 for ratio in ratios)
        lines.append(f"| {name} | {len(ratios)} | {near / len(ratios):.1%} | {statistics.median(ratios):.2f} |")
    return "\n".join(lines)


def picture(found: Sequence[Draw], path: Path) -> None:
    """Left: the error of the mode's own limit against what is reported of it. Right: all errors together."""
    figure = new_figure(9.4, 4.6)
    panels = figure.subplots(1, 2)
    well = [draw for draw in found if draw.smallest >= WELL_POSED and math.isfinite(draw.error)]
    for k, name in enumerate(DTYPES):
        group = [draw for draw in well if draw.dtype == name]
        reported = [max(draw.nudge_error, draw.residual, draw.rounding, LEAST) for draw in group]
        style = {"s": 9, "color": COLOURS[k + 1], "alpha": 0.45, "linewidths": 0, "label": name, "rasterized": True}
        panels[0].scatter(reported, [max(draw.error, LEAST) for draw in group], **style)
        exact = [draw for draw in group if math.isfinite(draw.adjoint_residual)]
        panels[1].scatter(
            [max(draw.adjoint_residual, LEAST) for draw in exact], [max(d.exact_error, LEAST) for d in exact], **style
        )
    titles = (
        ("Against the limit of the mode", "largest of nudge_error, residual and rounding, as reported"),
        ("Against the exact gradient", "adjoint_residual, as reported"),
    )
    for axes, (title, label) in zip(panels, titles, strict=True):
        dress(axes)
        axes.loglog()
        axes.set_xlim(LEAST, 20)
        axes.set_ylim(LEAST, 20)
        axes.plot([LEAST, 20], [LEAST, 20], color=COLOURS[0], linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(label)
        axes.set_ylabel("true error of the error vector, relative")
    panels[0].axvline(TOLD, color=COLOURS[5], linewidth=0.8, linestyle="--")
    panels[0].axhline(LARGE, color=COLOURS[5], linewidth=0.8, linestyle="--")
    legend = panels[0].legend(loc="lower right", frameon=False, markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    """Draw, and write both."""
    found = list(draws(COUNT, SEED))
    picture(found, Path(__file__).with_name("certificate.svg"))
    tables = f"{table(found)}\n\n{shares(found)}"
    write_text(PAGE, insert(PAGE.read_text(), OPENING, CLOSING, tables))
    sys.stdout.write(tables + "\n")
    for draw in found:
        if draw.is_silent:
            sys.stdout.write(f"silent: {draw}\n")


if __name__ == "__main__":
    main()
