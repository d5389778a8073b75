"""Judging generated text by rule, and the numbers over prompts; no model and no torch in here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.judging.intervals import Ratio, interval, packed, resamples
from testbed.language.tasks import CLOSE, OPEN, follows, is_right

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """An output taken apart: `head` is the block with the white space behind it."""

    head: str
    answer: str
    whole: bool


def split(output: str) -> Parts:
    """Exactly one complete block that is not empty and comes first, or none."""
    marks = output.count(OPEN), output.count(CLOSE)
    if marks == (0, 0):
        return Parts("", output.strip(), whole=False)
    before, _, after = output.partition(CLOSE)
    inside = before.strip().removeprefix(OPEN).strip()
    whole = marks == (1, 1) and before.strip().startswith(OPEN) and bool(inside)
    if not marks[1]:
        return Parts("", "", whole=False)
    answer = after.lstrip()
    head = before + CLOSE + after[: len(after) - len(answer)]
    return Parts(head, answer.strip(), whole)


@dataclass(frozen=True)
class Score:
    """What one output did."""

    right: bool
    followed: bool
    both: bool
    whole: bool
    loop: bool
    tokens: int

    @property
    def all_three(self) -> bool:
        """Right and as asked, after one whole block."""
        return self.both and self.whole


def score(record: Record, output: str, tokens: int, ended: bool) -> Score:
    """Judge one output against its record."""
    parts = split(output)
    right = is_right(parts.answer, record["answer"])
    asked = record["constraints"]
    followed = bool(asked) and follows(parts.answer, asked)
    return Score(right, followed, followed and right, parts.whole, not ended, tokens)


def numbers(
    records: Sequence[Record], scores: Sequence[Score], more: Mapping[str, Ratio] | None = None
) -> dict[str, Any]:
    """Every number with its 95 % interval, and yes or no per prompt for paired comparisons."""
    ratios = {**_ratios(records, scores), **(more or {})}
    strata = [f"{bool(r['constraints'])}/{r['held_out_wording']}" for r in records]
    counts = resamples(strata)
    found = {
        name: {"value": float(ratio.estimate()[0]), "interval": list(interval(ratio, counts))}
        for name, ratio in ratios.items()
        if ratio.weights.any()
    }
    kept = ("right", "followed", "both", "whole", "loop")
    return {
        "numbers": found,
        "bits": {name: packed([bool(getattr(s, name)) for s in scores]) for name in kept},
    }


def _ratios(records: Sequence[Record], scores: Sequence[Score]) -> dict[str, Ratio]:
    def over(name: str, counted: Callable[[Record], bool]) -> Ratio:
        weights = np.array([float(counted(record)) for record in records])
        values = np.array([float(getattr(one, name)) for one in scores])
        return Ratio(values * weights, weights)

    def asked(record: Record) -> bool:
        return bool(record["constraints"])

    def plain(record: Record) -> bool:
        return not record["constraints"]

    def known(record: Record) -> bool:
        return asked(record) and not record["held_out_wording"]

    def held(record: Record) -> bool:
        return asked(record) and bool(record["held_out_wording"])

    def unseen(record: Record) -> bool:
        return asked(record) and not record["calibrated"]

    return {
        "plain_right": over("right", plain),
        "plain_right_uncalibrated": over("right", lambda r: plain(r) and not r["calibrated"]),
        "whole_plain": over("whole", plain),
        "whole_constrained": over("whole", asked),
        "followed": over("followed", asked),
        "followed_known": over("followed", known),
        "followed_held_out": over("followed", held),
        "constrained_right": over("right", asked),
        "both": over("both", asked),
        "all_three": over("all_three", asked),
        "both_known": over("both", known),
        "both_held_out": over("both", held),
        "both_uncalibrated": over("both", unseen),
        "followed_uncalibrated": over("followed", unseen),
        "tokens": over("tokens", lambda _: True),
        "loops": over("loop", lambda _: True),
    }
