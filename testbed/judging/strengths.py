"""Which strength of a merge is measured next."""

from __future__ import annotations

from collections.abc import Callable, Collection


def beyond_edge(
    measured: Collection[float], best: float, step: Callable[[float, int], float | None]
) -> float | None:
    """The strength past the edge of those measured where the best one is; None if it is inside.

    step: the neighbour of a strength, above (1) or below (-1) it; None where there is none.
    """
    if best == max(measured):
        return step(best, 1)
    return step(best, -1) if best == min(measured) else None
