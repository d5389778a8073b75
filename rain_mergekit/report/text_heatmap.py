"""A small heat map in characters: heads down, layers across, small enough for one screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

BLOCKS = "▁▂▃▄▅▆▇█"
DIGITS = "0123456789"
_MISSING = "·"
_ROWS, _COLUMNS = 8, 64


def heat_rows(
    columns: Sequence[Sequence[float]], low: float, high: float, marks: str
) -> list[tuple[str, list[float]]]:
    """One text and its levels (0 to 1, NaN where there is nothing) for each row, first head first.

    columns: for each layer, one value for each head. Neighbouring heads and layers are averaged
    until at most 8 rows and 64 columns remain. `marks` goes from the lowest level to the highest.
    """
    heads = max((len(column) for column in columns), default=0)
    bands = _cut(heads, _ROWS)
    groups = _cut(len(columns), _COLUMNS)
    rows = []
    for band in bands:
        levels = [
            _level([v for i in group for v in columns[i][band.start : band.stop]], low, high)
            for group in groups
        ]
        text = "".join(_mark(level, marks or DIGITS) for level in levels)
        rows.append((text, levels))
    return rows


def band_names(heads: int) -> list[str]:
    """What each row of `heat_rows` holds: `head 3`, or `heads 4-7`."""
    return [
        f"head {band.start}" if len(band) == 1 else f"heads {band.start}-{band.stop - 1}"
        for band in _cut(heads, _ROWS)
    ]


def _cut(count: int, most: int) -> list[range]:
    """`count` things in at most `most` groups of neighbours, as even as can be."""
    groups = min(count, most)
    edges = [round(i * count / groups) for i in range(groups + 1)] if groups else [0]
    return [range(start, stop) for start, stop in pairwise(edges)]


def _level(values: Sequence[float], low: float, high: float) -> float:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan
    if high <= low:
        return 0.5
    return min(1.0, max(0.0, (fmean(finite) - low) / (high - low)))


def _mark(level: float, marks: str) -> str:
    if math.isnan(level):
        return _MISSING if marks is not DIGITS else "-"
    return marks[min(len(marks) - 1, int(level * len(marks)))]
