"""What earlier runs measured, so that a regression shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HISTORY = Path(__file__).with_name("history.jsonl")
RUNS = 3
WORSE = 1.1
_SAME = ("processor", "cores", "threads", "gpu")


def read(path: Path = HISTORY) -> list[dict[str, Any]]:
    """All entries, the oldest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def comparable(
    entries: Sequence[dict[str, Any]], size: str, machine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Those of the same size on the same kind of machine."""
    return [
        entry
        for entry in entries
        if entry["size"] == size
        and all(entry["machine"].get(key) == machine.get(key) for key in _SAME)
    ]


def change(name: str, value: float, entries: Sequence[Mapping[str, Any]]) -> str:
    """How a row compares with the median of its last runs; all rows are better when smaller."""
    past = [entry["rows"][name] for entry in entries if name in entry["rows"]][-RUNS:]
    if not past or not median(past):
        return ""
    ratio = value / median(past)
    return f"{ratio:.2f} of before" + (", WORSE" if ratio > WORSE else "")
