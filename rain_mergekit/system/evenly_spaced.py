"""An evenly spaced choice of items."""

from __future__ import annotations

from collections.abc import Sequence


def evenly_spaced(positions: Sequence[int], limit: int) -> tuple[int, ...]:
    """At most `limit` of the positions, evenly spaced and always the same ones."""
    if len(positions) <= limit:
        return tuple(positions)
    step = len(positions) / limit
    return tuple(positions[int((index + 0.5) * step)] for index in range(limit))
