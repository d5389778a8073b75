"""The table: a line of the terminal, and the part of a page that holds the last run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Row
from benchmarks.history import change

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def line(row: Row, past: Sequence[Mapping[str, Any]]) -> str:
    """A row of the printed table."""
    target = "" if row.target is None else f"<= {row.target:g}"
    notes = [note for note in (change(row.name, row.value, past), *_notes(row)) if note]
    return f"{row.name:64} {row.value:8.3f} {target:8} {row.verdict:7} {'; '.join(notes)}"


def page(entry: Mapping[str, Any], rows: Sequence[Row], absent: Sequence[str]) -> str:
    """The run as Markdown: what was measured where, and every row."""
    lines = [
        _origin(entry),
        "",
        "| what | measured | target | | details |",
        "|---|---|---|---|---|",
        *(_cells(row) for row in rows),
        *(f"| {name} | not run | | no GPU | |" for name in absent),
    ]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Put the text between the page's two marks."""
    content = path.read_text(encoding="utf-8")
    before, _, rest = content.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{path}: has no {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _origin(entry: Mapping[str, Any]) -> str:
    where = entry["machine"]
    rates = (f"{name.replace('_', ' ')} {rate:.3g}/s" for name, rate in entry["rates"].items())
    return (
        f"`python -m benchmarks --{entry['size']}`, commit {entry['commit']}, {entry['time']}, "
        f"{entry['seconds'] / 60:.0f} minutes: {where['processor']}, {where['cores']} cores, "
        f"{where['threads']} threads, load before it {where['load']}, Python {where['python']}, "
        f"torch {where['torch']}, GPU {where['gpu'] or 'none'}; {', '.join(rates)}."
    )


def _cells(row: Row) -> str:
    target = "" if row.target is None else f"≤ {row.target:g}"
    cells = (row.name, f"{row.value:.3g}", target, row.verdict, "; ".join(_notes(row)))
    return f"| {' | '.join(cells)} |"


def _notes(row: Row) -> list[str]:
    floor = [] if row.floor is None else [f"{row.floor:.1f} x floor"]
    return floor + ([row.detail] if row.detail else [])
