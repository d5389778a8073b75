"""The same models judged twice, with other defaults or one setting more, prompt by prompt.

Training repeats its bits on processors of one kind, so a trio that was made again on another day
may be one that has a board already: the digests in the rows say so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from testbed.board.tables import markdown, points, small
from testbed.judging.intervals import Numbers, Ratio, difference, resamples, unpacked
from testbed.language.board import load_rows
from testbed.language.sets import TEST
from testbed.language.table import DEFAULTS

TAUGHT = f"{DEFAULTS}, instructions taught"
SAME = (  # before, after, and which of the page's seven things, or which setting, came between
    ("trio-s0", "trio-s0-fifth", DEFAULTS, "4, 5, 7"),
    ("trio-s2", "trio-s2-fifth", DEFAULTS, "4, 5, 7"),
    ("trio-s2-again", "trio-s2-third", DEFAULTS, "5"),
    ("trio-s2-third", "trio-s2-sixth", DEFAULTS, "7"),
    ("trio-gemma-s0", "trio-gemma-s0-third", DEFAULTS, "5, half of 6, 7"),
    ("trio-gemma-s0-third", "trio-gemma-s0-third", TAUGHT, "`teach_instructions`"),
    ("trio-gemma-s0-sixth", "trio-gemma-s0-sixth", TAUGHT, "`teach_instructions`"),
)
Row = Mapping[str, Any]


def repeats(results: Path) -> str:
    """A line a pair of rows: the defaults on the first board, the row named on the second.

    ValueError if their models or prompts are not the same.
    """
    part = np.repeat(range(len(TEST)), TEST)  # known wordings, held-out ones, no constraint
    shown = (("both", part < 2), ("both", part == 1), ("right", part == 2))
    counts = resamples([*part])
    lines = []
    for before, after, name, changed in SAME:
        pair = _row(results / before, DEFAULTS), _row(results / after, name)
        named = before if before == after else f"{before} → {after}"
        _require_same(*pair, named)
        cells = [_change(*pair, kind, counted * 1.0, counts) for kind, counted in shown]
        moved = " → ".join(small(row["numbers"]["L_think"]["value"]) for row in pair)
        lines.append([named.replace("trio-", ""), changed, *cells, moved])
    header = ["changed", "both", "both, held-out wording", "plain right", "L_think"]
    return markdown(["", *header], lines)


def _row(board: Path, name: str) -> Row:
    return next(row for row in load_rows(board) if row["name"] == name)


def _require_same(before: Row, after: Row, named: str) -> None:
    for same in ("models", "prompts"):
        if before["key"][same] != after["key"][same]:
            raise ValueError(f"{named}: these boards have other {same}")


def _change(before: Row, after: Row, kind: str, counted: Numbers, counts: Numbers) -> str:
    """Both shares of the counted prompts, and their difference with its interval."""
    old, new = (Ratio(unpacked(row["bits"][kind]) * counted, counted) for row in (before, after))
    apart, low, high = (points(one) for one in difference(new, old, counts))
    values = " → ".join(f"{100 * float(one.estimate()[0]):.0f}" for one in (old, new))
    return f"{values}, {apart} [{low}, {high}]"
