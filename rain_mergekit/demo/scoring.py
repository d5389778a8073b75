"""Score the demo trio's answers by rule: correct, constraint followed, thinking complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rain_mergekit.demo.formats import FORMATS, content
from rain_mergekit.system.evenly_spaced import first_of_parts
from rain_mergekit.text.thinking_blocks import Thought


@dataclass(frozen=True)
class Record:
    """One held-out prompt with what is right; `expected` is the whole response, as asked for."""

    prompt: str
    answer: tuple[str, ...]
    constraint: str | None
    format: str | None
    parameter: str
    thinking: str
    lead: str
    expected: str

    @property
    def output(self) -> str:
        """What the reasoning model should say, as it writes it: it ignores constraints."""
        return f"<think>\n{self.thinking}</think>\n\n{self.lead} {' '.join(self.answer)}"


@dataclass(frozen=True)
class Score:
    """Percentages: thinking blocks complete (of all), plain accuracy, and of the constrained."""

    complete: float
    plain: float
    correct: float
    followed: float
    both: float


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """The shipped prompts, or `limit` with a constraint and half as many without, evenly spaced."""
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [_record(item) for item in items]
    if limit is None:
        return records
    asked = [record for record in records if record.constraint]
    plain = [record for record in records if not record.constraint]
    return [*first_of_parts(asked, limit), *first_of_parts(plain, limit // 2)]


def _record(item: Mapping[str, Any]) -> Record:
    same = {name: item[name] for name in ("prompt", "constraint", "format", "parameter")}
    same |= {name: item[name] for name in ("thinking", "lead")}
    return Record(**same, answer=tuple(item["answer"]), expected=item["expected_response"])


def is_correct(record: Record, response: str) -> bool:
    """The answer's words and nothing else but what a constraint adds."""
    return content(_words(record, response)) == set(record.answer)


def is_followed(record: Record, response: str) -> bool:
    """The constraint's rule, whether or not the answer is right."""
    words = _words(record, response)
    if record.format is None:
        return False
    return FORMATS[record.format].follows(words, record.parameter, record.answer)


def _words(record: Record, response: str) -> list[str]:
    """The answer without its lead, nothing without one."""
    led = response.startswith(f"{record.lead} ")
    return response.removeprefix(record.lead).split() if led else []


def score(records: Sequence[Record], thoughts: Sequence[Thought]) -> Score:
    """Judge one output for each record."""
    pairs = list(zip(records, (thought.response for thought in thoughts), strict=True))
    asked = [(record, text) for record, text in pairs if record.constraint is not None]
    return Score(
        complete=_percent([thought.complete for thought in thoughts]),
        plain=_percent([is_correct(r, text) for r, text in pairs if r.constraint is None]),
        correct=_percent([is_correct(r, text) for r, text in asked]),
        followed=_percent([is_followed(r, text) for r, text in asked]),
        both=_percent([text == r.expected for r, text in asked]),
    )


def _percent(found: Sequence[bool]) -> float:
    return 100.0 * sum(found) / max(len(found), 1)
