"""A picture of each trio's board: right and as asked, against plain problems right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rain_mergekit.report.svg import FAINT, INK, STYLE, inline
from testbed.board.tables import MODELS

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "img"
# The picture stands in a page whose colours it cannot see, so it brings its own for both themes.
THEMES = """<style>
  :root { --ink: #1f2328; --faint: #8c959f; --page: #ffffff; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6edf3; --faint: #768390; --page: #0d1117; }
  }
</style><rect width="100%" height="100%" style="fill: var(--page)"/>"""
# Colours that stay apart for colour-blind eyes on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "oDv^sPX<>"
OURS = "#0f9b8e"
Found = Mapping[str, Any]


def draw(rows: Sequence[Found], name: str, title: str) -> Path:
    """Write the picture of one trio; returns the file, which is called `name`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 4.6), layout="constrained")
        _fill(figure.subplots(), rows)
        label = f"Merges of {title} by plain problems right and by both"
        return write_picture(figure, name, label)


def write_picture(figure: Figure, name: str, label: str) -> Path:
    """Write a figure with colours for both themes; returns the file. label: for who cannot see."""
    text = inline(figure, name, label)
    path = IMAGES / f"{name}.svg"
    start = text.index(">") + 1
    path.write_text(text[:start] + THEMES + text[start:] + "\n", encoding="utf-8")
    return path


def _fill(axes: Axes, rows: Sequence[Found]) -> None:
    named = {row["name"]: row for row in rows}
    ceiling = 100 * _number(named["ceiling"], "both")
    whole = 100 * _number(named["reasoning"], "plain_right")
    axes.axhline(ceiling, color=FAINT, linestyle="--", linewidth=1)
    axes.annotate("ceiling", (1, ceiling + 1), color=INK)
    axes.axvline(whole, color=FAINT, linestyle=":", linewidth=1)
    top = ceiling + 14
    axes.annotate("reasoning model", (whole + 1, top - 1), rotation=90, va="top", color=INK)
    merges = sorted(
        (row for row in rows if row["name"] not in MODELS),
        key=lambda row: -_number(row, "both"),
    )
    rivals = [row for row in merges if not row["name"].startswith("rain")]
    for row in merges:
        if row in rivals:
            place = rivals.index(row)
            _mark(axes, row, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
        else:
            _mark(axes, row, OURS, "*", 15)
            place = (100 * _number(row, "plain_right") - 2.5, 100 * _number(row, "both"))
            axes.annotate(row["name"], place, ha="right", va="center", color=INK)
    axes.set(
        xlabel="plain problems right, %",
        ylabel="right and as asked, %",
        xlim=(0, 100),
        ylim=(0, top),
    )
    axes.grid(color=FAINT, alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _mark(axes: Axes, row: Found, colour: str, marker: str, size: float = 8) -> None:
    """The judged strength, large; the others as they were on validation prompts, small."""
    tried = sorted((float(s), found) for s, found in row.get("swept", {}).items())
    axes.plot(
        [100 * found["plain_right"] for _, found in tried],
        [100 * found["both"] for _, found in tried],
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=0.8,
        alpha=0.5,
    )
    strength = f" at {row['strength']:g}" if "strength" in row else ""
    axes.plot(
        [100 * _number(row, "plain_right")],
        [100 * _number(row, "both")],
        color=colour,
        marker=marker,
        markersize=size,
        linestyle="",
        label="_" if colour == OURS else row["name"] + strength,
    )


def _number(row: Found, name: str) -> float:
    return float(row["numbers"][name]["value"])
