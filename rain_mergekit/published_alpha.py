"""Coefficients of the published scripts' second stage: their `alpha_….json`, read.

The file has `alpha`, a list of numbers, and `axes_info.flat_index`, for each of them its layer,
its head, and what it scales: `QK`, or `Q` and `K` apart. The other modules' follow from these: v
and o take the head's (of Q and K the mean), the FFN the mean of the layer's heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.reading import StrPath, read_json

_TYPES = {"QK": ("query", "key"), "Q": ("query",), "K": ("key",)}


@dataclass(frozen=True)
class Alpha:
    """One coefficient for each (layer, head); query and key are the same where they are coupled."""

    heads: int
    query: Mapping[tuple[int, int], float]
    key: Mapping[tuple[int, int], float]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have coefficients, in order."""
        return tuple(sorted({layer for layer, _ in (*self.query, *self.key)}))

    def head(self, layer: int, head: int) -> float:
        """The mean of the head's coefficients; 0 where it has none: it is not merged."""
        at = (layer, head)
        found = [table[at] for table in (self.query, self.key) if at in table]
        return fmean(found) if found else 0.0

    def layer(self, layer: int) -> float:
        """The mean over the layer's heads that have coefficients; 0 where none has."""
        heads = {h for at, h in (*self.query, *self.key) if at == layer}
        return fmean(self.head(layer, h) for h in heads) if heads else 0.0


def read_alpha(path: StrPath) -> Alpha:
    """Read the file; RainError names it, the field, and what was expected."""
    content = read_json(path)
    axes = content.get("axes_info") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(axes, dict):
        raise RainError(
            f"{path}: is no coefficient file of the published scripts: expected the .json of "
            "their second stage, with `alpha` and `axes_info`"
        )
    values, index = content.get("alpha"), axes.get("flat_index")
    if not isinstance(values, list) or not isinstance(index, list) or len(values) != len(index):
        raise RainError(
            f"{path}: `alpha` and `axes_info.flat_index` must be two lists of the same length"
        )
    tables: dict[str, dict[tuple[int, int], float]] = {"query": {}, "key": {}}
    for number, (value, entry) in enumerate(zip(values, index, strict=True)):
        place = _place(entry)
        if place is None or not _is_number(value) or not math.isfinite(value):
            raise RainError(
                f"{path}: entry {number} must be a finite number with its layer, head, and QK, Q "
                f"or K, found {value!r:.40} and {entry!r:.60}"
            )
        for table in _TYPES[place[2]]:
            tables[table][place[:2]] = float(value)
    if not values:
        raise RainError(f"{path}: it holds no coefficients")
    return Alpha(1 + max(head for table in tables.values() for _, head in table), **tables)


def _place(entry: object) -> tuple[int, int, str] | None:
    if not isinstance(entry, list) or len(entry) != 3 or str(entry[2]) not in _TYPES:
        return None
    whole = [x for x in entry[:2] if _is_number(x) and 0 <= x < 10**5 and x == int(x)]
    return (int(whole[0]), int(whole[1]), str(entry[2])) if len(whole) == 2 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
