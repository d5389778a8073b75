"""Choose samples so that groups and lengths are equally represented."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BINS = 4


@dataclass(frozen=True)
class Candidate:
    """One sample that may be chosen: its groups (domain, kinds) and the length of its thinking."""

    sample: dict[str, Any]
    groups: tuple[str, ...]
    length: int


def choose(candidates: Sequence[Candidate], count: int | None, seed: int) -> list[Candidate]:
    """`count` of them (None: all), balanced over groups and, in each, over lengths.

    The next one always comes from the groups with the fewest so far, and among these from the
    length bin with the fewest; bins have equal width in the logarithm of the length. So every
    beginning of the result is balanced too. Which of equal ones is drawn depends on the seed.
    """
    left = _cells(candidates, seed)
    groups: Counter[str] = Counter()
    bins: Counter[tuple[tuple[str, ...], int]] = Counter()
    chosen: list[Candidate] = []
    while left and (count is None or len(chosen) < count):
        cell = min(left, key=lambda at: (sum(groups[g] for g in at[0]) / len(at[0]), bins[at]))
        chosen.append(left[cell].pop())
        groups.update(cell[0])
        bins[cell] += 1
        if not left[cell]:
            del left[cell]
    return chosen


def _cells(
    candidates: Sequence[Candidate], seed: int
) -> dict[tuple[tuple[str, ...], int], list[Candidate]]:
    """Candidates by groups and length bin, in an order that depends only on the seed."""
    logs = [math.log1p(candidate.length) for candidate in candidates]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    width = (high - low) / BINS or 1.0
    found: dict[tuple[tuple[str, ...], int], list[Candidate]] = {}
    for candidate, log in zip(candidates, logs, strict=True):
        cell = (candidate.groups, min(BINS - 1, int((log - low) / width)))
        found.setdefault(cell, []).append(candidate)
    draw = random.Random(seed)  # noqa: S311 - no secret
    for members in found.values():
        draw.shuffle(members)
    return dict(sorted(found.items()))
