"""The same models judged twice, with other defaults or one setting more, prompt by prompt.

Training repeats its bits on processors of one kind, so a trio that was made again on another day
may be one that has a board already: the digests in the rows say so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from testbed.board.tables import markdown, points, small
from testbed.judging.intervals import Ratio, difference, resamples, unpacked
from testbed.language.board import load_rows
from testbed.language.sets import TEST

STREAMS, TAUGHT = "rain, streams", "rain, streams, instructions taught"
SAME = (  # before, after, and which of the page's seven things, or which setting, came between
    ("trio-s0", "trio-s0-fifth", STREAMS, "4, 5, 7"),
    ("trio-s2", "trio-s2-fifth", STREAMS, "4, 5, 7"),
    ("trio-s2-again", "trio-s2-third", STREAMS, "5"),
    ("trio-s2-third", "trio-s2-sixth", STREAMS, "7"),
    ("trio-gemma-s0", "trio-gemma-s0-third", STREAMS, "5, half of 6, 7"),
    ("trio-gemma-s0-third", "trio-gemma-s0-third", TAUGHT, "`teach_instructions`"),
    ("trio-gemma-s0-sixth", "trio-gemma-s0-sixth", TAUGHT, "`teach_instructions`"),
)
Row = Mapping[str, Any]


def repeats(results: Path) -> str:
    """A line a pair of rows: the defaults on the first board, the row named on the second.

    ValueError if their models or prompts are not the same.
    """
    lines = [
        _line(
            _row(results / before, STREAMS),
            _row(results / after, name),
            before if before == after else f"{before} → {after}",
            changed,
        )
        for before, after, name, changed in SAME
    ]
    header = ["changed", "both", "both, held-out wording", "plain right", "L_think"]
    return markdown(["", *header], lines)


def _row(board: Path, name: str) -> Row:
    return next(row for row in load_rows(board) if row["name"] == name)


def _line(before: Row, after: Row, named: str, changed: str) -> list[str]:
    for same in ("models", "prompts"):
        if before["key"][same] != after["key"][same]:
            raise ValueError(f"{named}: these boards have other {same}")
    known, held, plain = (np.repeat(np.eye(len(TEST))[part], TEST) for part in range(len(TEST)))
    counts = resamples([*np.repeat(range(len(TEST)), TEST)])
    shown = (("both", known + held), ("both", held), ("right", plain))
    cells = []
    for kind, counted in shown:
        old, new = (
            Ratio(unpacked(row["bits"][kind]) * counted, counted) for row in (before, after)
        )
        apart, low, high = (points(one) for one in difference(new, old, counts))
        values = " → ".join(f"{100 * float(one.estimate()[0]):.0f}" for one in (old, new))
        cells.append(f"{values}, {apart} [{low}, {high}]")
    moved = " → ".join(small(row["numbers"]["L_think"]["value"]) for row in (before, after))
    return [named.replace("trio-", ""), changed, *cells, moved]
