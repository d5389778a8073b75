"""The report's figures, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rain_mergekit.calibration_file.site_names import ValueRange
from rain_mergekit.calibration_file.summary import Layer
from rain_mergekit.report.spectra import Curve
from rain_mergekit.report.svg import FAINT, INK, STYLE, inline

SIZE = (4.6, 2.9)
# Distinct on white and black, also with colour blindness (adapted from Okabe and Ito).
COLOURS = ("#0b84c6", "#e08214", "#169c78", "#c2568f", "#8a7ae0", "#b0922c", "#6b8a99")
_DEPTH = ("#e8a33d", "#d9644a", "#b04a86", "#6f56b8", "#3b7dd8")
_FLOOR = 1e-6
_LEAST = 1e-9  # nats; smaller divergences vanish in float32
_NAME = 40


def drawn(
    prefix: str, description: str, draw: Callable[[Any], None], size: tuple[float, float] = SIZE
) -> str:
    """Draw on one pair of axes and give the SVG element."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        return inline(figure, prefix, description)


def label(text: str) -> str:
    """A name from the file as one short line of plain characters, all of which fonts have."""
    plain = "".join(char if " " <= char <= "~" else "?" for char in text)
    return plain if len(plain) <= _NAME else plain[: _NAME - 3] + "..."


def spectrum(prefix: str, curves: Sequence[Curve], what: str, of: str) -> str:
    """Curves of several layers; protected directions are dots, the cut a ring."""

    def draw(axes: Any) -> None:
        for index, curve in enumerate(curves):
            colour = _DEPTH[round(index * (len(_DEPTH) - 1) / max(1, len(curves) - 1))]
            _draw_curve(axes, curve, colour)
        axes.set(xscale="log", yscale="log", xlabel="direction", ylabel=what)
        axes.set_ylim(bottom=max(_FLOOR, axes.get_ylim()[0]))
        axes.grid(visible=True, color=FAINT, alpha=0.25, lw=0.5)
        _plain_numbers(axes.xaxis, axes.yaxis)
        axes.legend(fontsize=9, loc="lower left", handlelength=0.8)

    return drawn(prefix, f"{what}, input of {label(of)}", draw)


def _draw_curve(axes: Any, curve: Curve, colour: str) -> None:
    values = np.maximum(np.array(curve.values), _FLOOR)
    dots = np.where(curve.protected, values, np.nan)
    axes.plot(curve.x, values, color=colour, lw=0.9, alpha=0.6)
    axes.plot(curve.x, dots, ".", color=colour, ms=5, label=_depth(curve))
    if curve.cut is not None:
        place, height = curve.cut
        ring = {"ms": 8, "mfc": "none", "mew": 1.6, "zorder": 5}
        axes.plot([place], [max(height, _FLOOR)], "o", color=colour, **ring)


def _depth(curve: Curve) -> str:
    return "site" if curve.layer is None else f"layer {curve.layer}"


def heat(prefix: str, what: str, layers: Sequence[Layer], name: str, middle: float | None) -> str:
    """Layers down, heads across; a `middle` inside the range gives two hues that meet there."""
    values = _grid([layer.heads.get(name, ()) for layer in layers])
    height = min(6.0, max(SIZE[1], 1.1 + 0.16 * len(values)))

    def draw(axes: Any) -> None:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if middle is not None:
            reach = max(abs(low - middle), abs(high - middle)) or 1.0
            options: dict[str, Any] = {"vmin": middle - reach, "vmax": middle + reach}
            options["cmap"] = "coolwarm"
        else:
            options = {"vmin": min(low, 0.0), "vmax": high or 1.0, "cmap": "viridis"}
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
        axes.set(xlabel="head", ylabel="layer")
        _whole_numbers(axes)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(what)
        bar.outline.set_visible(False)

    return drawn(prefix, f"{what} by layer and head", draw, (SIZE[0], height))


def histogram(prefix: str, what: str, values: Sequence[float], bounds: Sequence[float]) -> str:
    """How often each value occurs; `bounds` are drawn as dashed lines."""

    def draw(axes: Any) -> None:
        count = min(40, max(8, round(math.sqrt(len(values)) * 2)))
        axes.hist(values, bins=count, color=COLOURS[0], edgecolor="none")
        axes.margins(x=0.05)
        for bound in bounds:
            axes.axvline(bound, color=INK, lw=1.0, ls="--")
        axes.set(xlabel=what, ylabel="heads")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    return drawn(prefix, f"histogram of {what}", draw)


def lines(prefix: str, what: str, rows: Mapping[str, Mapping[int, float]]) -> str:
    """One line for each name over the layers."""

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(rows.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "lw": 1.4, "ms": 3.5}
            axes.plot(list(points), list(points.values()), "o-", label=label(name), **style)
        axes.set(xlabel="layer", ylabel=what)
        _whole_numbers(axes)
        axes.grid(visible=True, axis="y", color=FAINT, alpha=0.25, lw=0.5)
        columns = 2 if max(map(len, rows), default=0) > 10 else 4
        axes.figure.legend(fontsize=9, loc="outside upper center", ncols=columns, handlelength=1.2)

    return drawn(prefix, f"{what} by layer", draw)


def around(
    prefix: str, what: str, values: Mapping[int, ValueRange], window: tuple[int, int]
) -> str:
    """Mean, smallest and largest by distance; the window is shaded, a dashed line is the marker."""

    def draw(axes: Any) -> None:
        xs = list(values)
        mean, low, high = (
            np.maximum([getattr(values[x], name) for x in xs], _LEAST)
            for name in ("mean", "low", "high")
        )
        axes.axvspan(window[0] - 0.5, window[1] + 0.5, color=FAINT, alpha=0.15, lw=0)
        axes.axvline(0, color=INK, lw=1.0, ls="--")
        axes.fill_between(xs, low, high, color=COLOURS[0], alpha=0.2, lw=0)
        axes.plot(xs, high, color=COLOURS[0], lw=0.8, alpha=0.7, label="largest")
        axes.plot(xs, mean, "o-", color=COLOURS[1], lw=1.6, ms=3.5, label="mean")
        axes.set(yscale="log", xlabel=what, ylabel="KL of the next token, nats")
        axes.grid(visible=True, axis="y", color=FAINT, alpha=0.25, lw=0.5)
        _plain_numbers(axes.yaxis)
        _whole_numbers(axes)
        axes.figure.legend(fontsize=9, loc="outside upper center", ncols=2, handlelength=1.2)

    return drawn(prefix, f"KL of the next token by {what}", draw)


def _plain_numbers(*directions: Any) -> None:
    """Powers of ten as plain text (matplotlib's own are formulas, which are switched off)."""
    for axis in directions:
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
        axis.set_minor_locator(NullLocator())  # they are many, and slow


def _whole_numbers(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _grid(rows: Sequence[Sequence[float]]) -> Any:
    """Rows of different lengths as one array, with NaN where there is nothing."""
    width = max(len(row) for row in rows)
    finite = [[v if math.isfinite(v) else math.nan for v in row] for row in rows]
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in finite])
