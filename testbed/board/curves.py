"""Rows and curves of the scoreboard, read from the cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from testbed.board.methods import Method, methods
from testbed.board.results_file import Entry, Results

Numbers = Mapping[str, Mapping[str, Any]]
NOMINAL = 1.0


@dataclass(frozen=True)
class Row:
    """One method: its validation numbers by strength, and what the test prompts said."""

    method: Method
    curve: Mapping[float, Numbers]
    best: float
    test: Entry
    nominal: Entry | None

    def value(self, strength: float, name: str) -> float:
        """A validation number."""
        return float(self.curve[strength][name]["value"])


def best_strength(found: Mapping[float, Numbers]) -> float:
    """Most answers that are both right and as asked; among equals the smallest L_think."""
    return max(found, key=lambda s: (found[s]["both"]["value"], -found[s]["L_think"]["value"]))


def rows(results: Results, validation: int | None, test: int | None, *, quick: bool) -> list[Row]:
    """All rows that are complete, in the order of `methods()`."""
    found = []
    for method in methods():
        curve: dict[float, Numbers] = {}
        strengths = method.swept(quick=quick)
        for strength in strengths:
            entry = results.get(method.name, strength, "validation", validation)
            if entry is not None:
                curve[strength] = entry["numbers"]
        if len(curve) < len(strengths):
            continue
        best = best_strength(curve)
        judged = results.get(method.name, best, "test", test)
        if judged is not None:
            nominal = results.get(method.name, NOMINAL, "test", test)
            found.append(Row(method, curve, best, judged, nominal))
    return found


def at_gain(row: Row, followed: float, name: str = "L_think") -> float | None:
    """A validation number where the curve first reaches a share followed; linear in between."""
    points = [(0.0, 0.0)]
    points += [(row.value(s, "followed"), row.value(s, name)) for s in sorted(row.curve)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 >= followed:
            return y1 if x1 == x0 else y0 + (y1 - y0) * max(0.0, followed - x0) / (x1 - x0)
    return None


def safe_gain(row: Row, anchor: Row, tolerance: float = 0.01) -> tuple[float, float] | None:
    """The most followed, and its strength, with reasoning accuracy and markers intact."""
    first = anchor.value(anchor.best, "plain_accuracy"), anchor.value(anchor.best, "no_close")
    safe = [
        (row.value(s, "followed"), s)
        for s in row.curve
        if row.value(s, "plain_accuracy") >= first[0] - tolerance - 1e-9
        and row.value(s, "no_close") + row.value(s, "no_thinking") <= first[1] + 1e-9
    ]
    return max(safe) if safe else None


def undominated(row: Row, rival: Row, cost: str, sign: float) -> list[float]:
    """Strengths of the rival that no point of the row equals in both gain and cost.

    sign: 1 where less of the cost is better, -1 where more is.
    """

    def beaten(strength: float) -> bool:
        return any(
            row.value(s, "followed") >= rival.value(strength, "followed") - 1e-9
            and sign * row.value(s, cost) <= sign * rival.value(strength, cost) + 1e-9
            for s in row.curve
        )

    return [strength for strength in sorted(rival.curve) if not beaten(strength)]
