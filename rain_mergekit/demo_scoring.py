"""Judging the demo trio's answers by rule: right, constraint followed, thinking complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rain_mergekit.thinking import Thought

_LEAD = ["answer", ":"]
_ADDED = {"[", "]", "-", "moon", "cloud"}
_FOLLOWS: Mapping[str, Callable[[list[str]], bool]] = {
    "upper": lambda words: all(word == word.upper() for word in words),
    "brackets": lambda words: words[0] == "[" and words[-1] == "]",
    "end": lambda words: words[-1] == "moon",
    "begin": lambda words: words[0] == "cloud",
    "twice": lambda words: words[: len(words) // 2] == words[len(words) // 2 :],
    "sep": lambda words: words[1::2] == ["-"] * (len(words) // 2) and len(words) % 2 == 1,
}


@dataclass(frozen=True)
class Record:
    """One held-out prompt with what is right."""

    prompt: str
    answer: tuple[str, ...]
    constraint: str | None
    thinking: str

    @property
    def output(self) -> str:
        """What the reasoning model should say, as it writes it: it ignores constraints."""
        return f"<think>\n{self.thinking}</think>\n\nanswer : {' '.join(self.answer)}"


@dataclass(frozen=True)
class Score:
    """Percentages: thinking blocks complete (of all), plain accuracy, and of the constrained."""

    complete: float
    plain: float
    correct: float
    followed: float
    both: float


def read_records(path: Path) -> list[Record]:
    """The shipped prompts."""
    return [_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _record(item: Mapping[str, Any]) -> Record:
    return Record(item["prompt"], tuple(item["answer"]), item["constraint"], item["thinking"])


def is_correct(record: Record, response: str) -> bool:
    """The answer's words and nothing else but what a constraint adds."""
    words = response.split()
    content = [word.lower() for word in words[2:] if word.lower() not in _ADDED]
    right = list(record.answer)
    return words[:2] == _LEAD and content in (right, right * 2)


def is_followed(record: Record, response: str) -> bool:
    """The constraint's rule, whether or not the answer is right."""
    words = response.split()[2:]
    return bool(words) and record.constraint is not None and _FOLLOWS[record.constraint](words)


def score(records: Sequence[Record], thoughts: Sequence[Thought]) -> Score:
    """Judge one output for each record."""
    pairs = list(zip(records, (thought.response for thought in thoughts), strict=True))
    plain = [is_correct(r, text) for r, text in pairs if r.constraint is None]
    asked = [(is_correct(r, t), is_followed(r, t)) for r, t in pairs if r.constraint is not None]
    return Score(
        complete=_percent([thought.complete for thought in thoughts]),
        plain=_percent(plain),
        correct=_percent([right for right, _ in asked]),
        followed=_percent([followed for _, followed in asked]),
        both=_percent([right and followed for right, followed in asked]),
    )


def _percent(found: Sequence[bool]) -> float:
    return 100.0 * sum(found) / max(len(found), 1)
