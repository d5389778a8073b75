"""The table of several strengths of one merge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.divergence import Drift
from rain_mergekit.system.atomic_file import replacing

REPORT = "sweep.json"
AUTHOR = "mergekit-rain sweep"


@dataclass(frozen=True)
class Row:
    """One strength, the folder of its model (None: removed), and its drift."""

    strength: float
    folder: str | None
    drift: Drift


def folder_name(strength: float) -> str:
    """Where the model of that strength lies: `lambda-0.25`."""
    return f"lambda-{strength!r}"


def split_numbers(arguments: Iterable[str], option: str) -> list[str]:
    """Repeat the option before each number that follows it: `--x 1 2` -> `--x 1 --x 2`.

    Also where they are written as a list: `1,2`, `1, 2`, `[1, 2]`.
    """
    result: list[str] = []
    following = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == option:
            following = True
            listed = _numbers(value) if equals else []
            result += [part for number in listed for part in (option, number)] or [argument]
        elif following and (numbers := _numbers(argument)):
            bare = result[-1] == option
            result += [part for number in numbers for part in (option, number)][bare:]
        else:
            following = False
            result.append(argument)
    return result


def _numbers(text: str) -> list[str]:
    """The numbers of a list as people write it; empty if it holds anything else."""
    parts = text.strip("[]()").replace(";", ",").replace(",", " ").split()
    return parts if parts and all(map(_is_number, parts)) else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def table(rows: Sequence[Row]) -> list[str]:
    """The table as lines of text, in the order of the rows."""
    head = f"{'lambda':>8}  {'L_think':>10}  {'L_mid':>10}  {'L_rest':>10}  thinking format"
    return [head, *(_line(row) for row in rows)]


def _line(row: Row) -> str:
    places = (row.drift.think, row.drift.content, row.drift.rest)
    numbers = "  ".join(f"{place.mean:>10.3g}" for place in places)
    return f"{row.strength:>8g}  {numbers}  {row.drift.verdict}"


def contents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for programs, each with its verdict."""
    return [{**asdict(row), "verdict": row.drift.verdict} for row in rows]


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write what is measured so far to sweep.json; RainError if it cannot be written."""
    text = json.dumps({"created_by": AUTHOR, "rows": contents(rows)}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RainError(
            f"{folder}: cannot be written ({error.strerror or error}); name another output folder"
        ) from None
    with replacing(folder / REPORT) as out:
        out.write(f"{text}\n".encode())
