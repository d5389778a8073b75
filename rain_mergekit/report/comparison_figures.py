"""Figures of compared answers: differences with their intervals, and one quality by another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rain_mergekit.evaluation.comparison import Difference
from rain_mergekit.evaluation.strengths import pareto
from rain_mergekit.report.figures import COLOURS, drawn, label
from rain_mergekit.report.point_names import name_points
from rain_mergekit.report.svg import FAINT, INK

_MEANING = {"better": COLOURS[2], "worse": COLOURS[1]}
_LEAST, _EDGE = 5.0, 0.06  # percent, and a part of what is shown
Points = Mapping[str, tuple[float, float]]
Line = Sequence[tuple[float, float]]


def intervals(prefix: str, rows: Sequence[Difference]) -> str:
    """A line a share: the difference in points, and the interval that holds 95 %."""

    def draw(axes: Any) -> None:
        for place, one in enumerate(reversed(rows)):
            colour = _MEANING.get(one.verdict, INK)
            axes.plot([100 * one.low, 100 * one.high], [place, place], color=colour, lw=2)
            axes.plot([100 * one.mean], [place], "o", color=colour, ms=5)
        axes.axvline(0, color=FAINT, lw=1.0)
        axes.set_yticks(range(len(rows)), [label(one.metric.label) for one in reversed(rows)])
        axes.set(xlabel="difference from the first, points", ylim=(-0.7, len(rows) - 0.3))
        axes.grid(visible=True, axis="x", color=FAINT, alpha=0.25, lw=0.5)

    size = (4.6, max(1.7, 0.9 + 0.28 * len(rows)))  # readable on a phone too
    return drawn(prefix, "differences with their 95 percent intervals", draw, size)


def quality(prefix: str, across: str, up: str, points: Points, *, less: bool) -> str:
    """A point a model, in percent, and a line through those that no other beats in both.

    less: a small value across is the better one.
    """

    def draw(axes: Any) -> None:
        colours = [COLOURS[index % len(COLOURS)] for index in range(len(points))]
        for colour, (x, y) in zip(colours, points.values(), strict=True):
            axes.plot([x], [y], "o", color=colour, ms=7)
        best = pareto(list(points.values()), less=less)
        axes.plot([x for x, _ in best], [y for _, y in best], "--", color=FAINT, lw=1.0, zorder=0)
        axes.set(xlabel=across, ylabel=up)
        axes.margins(0.2)
        axes.set_ylim(*_percents([y for _, y in points.values()]))
        axes.grid(visible=True, color=FAINT, alpha=0.25, lw=0.5)
        names = [(label(name), colour) for name, colour in zip(points, colours, strict=True)]
        name_points(axes, names, list(points.values()))

    return drawn(prefix, f"{up} by {across}", draw)


def _percents(values: Sequence[float]) -> tuple[float, float]:
    """Limits around the values: no narrower than what counts, not far below 0 or above 100."""
    pad = max(_LEAST, 0.2 * (max(values) - min(values)))
    low, high = max(min(values) - pad, 0.0), min(max(values) + pad, 100.0)
    edge = _EDGE * (high - low)
    return max(min(values) - pad, -edge), min(max(values) + pad, 100 + edge)


def curves(prefix: str, lines: Mapping[str, Line]) -> str:
    """A line a quality over lambda, in percent."""

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(lines.items()):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, ms=5,
                      lw=1.4, label=label(name))  # fmt: skip
        axes.set(xlabel="lambda", ylabel="percent", ylim=(-4, 104))
        axes.grid(visible=True, color=FAINT, alpha=0.25, lw=0.5)
        axes.legend(fontsize=9, loc="best", handlelength=1.2)

    return drawn(prefix, "qualities over lambda", draw)
