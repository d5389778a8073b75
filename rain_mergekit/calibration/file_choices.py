"""The size of the calibration file as a choice: what each rank would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LEAST_RANK = 32  # the first of the choices that are shown


@dataclass(frozen=True)
class FileChoices:
    """How large the calibration file is at which rank.

    Attributes:
        sizes: bytes of the file by the largest rank of a module.
        model_bytes: of the reasoning model.
        narrowest: directions of the module that has the fewest.
        widest: of the one that has the most.
    """

    sizes: Mapping[int, int]
    model_bytes: int
    narrowest: int
    widest: int

    @classmethod
    def of(
        cls, size: Callable[[int], int], model_bytes: int, sides: Sequence[int], rank: int
    ) -> FileChoices:
        """At doubling ranks up to the narrowest of `sides`, and at `rank`."""
        narrowest, widest = min(sides), max(sides)
        ranks = {rank, narrowest}
        step = _LEAST_RANK
        while step < narrowest:
            ranks.add(step)
            step *= 2
        return cls({one: size(one) for one in sorted(ranks)}, model_bytes, narrowest, widest)
