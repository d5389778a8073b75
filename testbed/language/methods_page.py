"""What docs/companions.md has of the real language models: the companions' rows on every trio."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed.board.tables import NONE, between, markdown, percent
from testbed.language.board import load_rows
from testbed.language.page import DOCS, PAGE, TRIOS
from testbed.language.recipes import companions
from testbed.language.table import DEFAULTS

PAGE_OF_COMPANIONS = DOCS / "companions.md"
BESIDE = ("ceiling", DEFAULTS, "task_arithmetic", "linear", "nuslerp")
SHOWN = ("both", "plain_right", "whole_constrained")
# Boards of other trainings that have rows which those of the first page lack.
MORE = {"trio-s0-fifth": "trio-s0-sixth", "trio-s1-sixth": "trio-s1-third"}


def write_page(results: Path) -> Path:
    """Put the table into the page; returns its path."""
    PAGE_OF_COMPANIONS.write_text(written(results), encoding="utf-8")
    return PAGE_OF_COMPANIONS


def written(results: Path) -> str:
    """The page's text with the table in it. results: the folder of all trios' rows."""
    text = PAGE_OF_COMPANIONS.read_text(encoding="utf-8")
    return between(text, "companions, language", "\n" + table(results) + "\n")


def table(results: Path) -> str:
    """A line a method: both / plain right / whole blocks, and its strength, on each trio."""
    trios = [one for trio in TRIOS[PAGE] for one in (trio, MORE.get(trio)) if one]
    boards = {trio: {row["name"]: row for row in load_rows(results / trio)} for trio in trios}
    names = [*BESIDE, *(row.name for row in companions())]
    lines = [
        [name, *(_cell(rows.get(name)) for rows in boards.values())]
        for name in names
        if any(name in rows for rows in boards.values())
    ]
    return markdown(["", *(trio.removeprefix("trio-") for trio in boards)], lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NONE
    numbers = row["numbers"]
    shares = [percent(numbers[name]["value"]) if name in numbers else NONE for name in SHOWN]
    return " / ".join(shares) + (f" at {row['strength']:g}" if "swept" in row else "")
