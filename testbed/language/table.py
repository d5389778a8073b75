"""The board as a Markdown table, written from the rows' JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.board.tables import MODELS, NONE, markdown, percent, small, with_interval
from testbed.language.board import load_rows

DEFAULTS = "rain, streams"  # the name of the row of rain as it is
COLUMNS = {
    "plain right": "plain_right",
    "whole, plain": "whole_plain",
    "whole, constrained": "whole_constrained",
    "followed": "followed",
    "followed, held-out wording": "followed_held_out",
    "both": "both",
    "right, followed and thought": "all_three",
    "both, held-out wording": "both_held_out",
    "both, uncalibrated": "both_uncalibrated",
    "tokens": "tokens",
    "loops": "loops",
    "L_think": "L_think",
}
WITH_INTERVAL = ("plain_right", "followed", "both")


def _cell(row: Mapping[str, Any], name: str) -> str:
    plain_only = name.endswith("plain") or name.startswith("plain")
    if name not in row["numbers"] or (row["name"] == "ceiling" and plain_only):
        return NONE
    found = row["numbers"][name]
    if name == "tokens":
        return f"{found['value']:.0f}"
    if name == "L_think":
        return small(found["value"])
    return with_interval(found) if name in WITH_INTERVAL else percent(found["value"])


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS) -> str:
    """One line a row: the trio's models first, then the merges by what they reach in both.

    columns: the names of the numbers by what stands above them.
    """

    def order(row: Mapping[str, Any]) -> tuple[int, float]:
        place = MODELS.index(row["name"]) if row["name"] in MODELS else len(MODELS)
        return place, -row["numbers"]["both"]["value"]

    lines = []
    for row in sorted(rows, key=order):
        strength = f" at {row['strength']:g}" if "strength" in row else ""
        lines.append([row["name"] + strength, *(_cell(row, name) for name in columns.values())])
    return markdown(["", *columns], lines)


def write_table(results: Path) -> Path:
    """The table beside its rows."""
    out = results / "table.md"
    out.write_text(table(load_rows(results)) + "\n", encoding="utf-8")
    return out
