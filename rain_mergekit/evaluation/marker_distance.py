"""Divergence by distance from the markers: where around them a merge changes the next token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rain_mergekit.calibration_file.site_names import ValueRange, value_range
from rain_mergekit.text.token_positions import ReasoningTokens

REACH = 16  # tokens to both sides


@dataclass(frozen=True)
class MarkerDistanceProfile:
    """KL(theta_R || merged) in nats, by distance in tokens, over all blocks of all samples.

    open: 0 is the last token of the open marker, and what is inside the block is above 0. close: 0
    is the first token of the close marker, and the inside is below 0. The divergence at a token
    is that of the distribution of the next one.
    """

    open: Mapping[int, ValueRange]
    close: Mapping[int, ValueRange]


class MarkerDistanceTally:
    """Collects the divergences of one sample after another."""

    def __init__(self) -> None:
        self._open: dict[int, list[float]] = defaultdict(list)
        self._close: dict[int, list[float]] = defaultdict(list)

    def add(self, sample: ReasoningTokens, apart: Tensor) -> None:
        """One sample's divergence at each of its positions (T)."""
        values = apart.tolist()
        ends = zip(sample.open_ends, sample.close_starts, strict=True)
        for opened, closed in ends:
            _collect(self._open, values, opened - 1, (0, closed))
            _collect(self._close, values, closed, (opened, len(values)))

    def around(self) -> MarkerDistanceProfile:
        """The mean, smallest and largest at each distance."""
        both = (self._open, self._close)
        return MarkerDistanceProfile(
            *({x: value_range(found[x]) for x in sorted(found)} for found in both)
        )


def _collect(
    found: dict[int, list[float]], values: list[float], at: int, within: tuple[int, int]
) -> None:
    first, last = max(within[0], at - REACH), min(within[1], at + REACH + 1)
    for position in range(first, last):
        found[position - at].append(values[position])
