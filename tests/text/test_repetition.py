"""Loops, repeated spans and n-grams against a search through all spans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rain_mergekit.text.repetition import (
    find_loop,
    longest_repeat,
    repeated_ngrams,
    repetition,
    units,
)
from rain_mergekit.text.writing_systems import LEAST_SHARE, foreign_share, scripts

PROSE = (
    "A river begins as a spring high in the hills, where rain has gone into the ground and comes "
    "out again. It runs down, takes in other brooks, and cuts a valley. Where the land is flat it "
    "slows, bends, and leaves sand and mud behind. At last it meets the sea, and the water rises "
    "into the air once more to fall as rain somewhere else. "
)
TABLE = "| point | reason |\n|---|---|\n" + "".join(
    f"| {i} | because of {i} |\n" for i in range(30)
)
CODE = "".join(f"    values[{i}] = table[{i}].get('a')\n" for i in range(40))


def longest_by_search(words: list[int]) -> int:
    for length in range(len(words) // 2, 0, -1):
        seen: dict[tuple[int, ...], int] = {}
        for start in range(len(words) - length + 1):
            span = tuple(words[start : start + length])
            if start - seen.setdefault(span, start) >= length:
                return length
    return 0


@given(st.lists(st.integers(0, 2), max_size=40))
def test_longest_repeat_equals_a_search_through_all_spans(words: list[int]) -> None:
    assert longest_repeat(torch.tensor(words).long()) == longest_by_search(words)


@given(st.lists(st.integers(0, 1), max_size=40))
def test_ngrams_are_counted(words: list[int]) -> None:
    texts = [str(word) for word in words]
    grams = [tuple(texts[i : i + 4]) for i in range(len(texts) - 3)]
    expected = sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0
    assert repeated_ngrams(texts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "period", "times"),
    [
        ("Wait, let me check again. " * 30, 7, 30),
        ("so " * 60, 1, 60),
        ("!" * 500, 1, 62),
        ("\u6211\u4eec\u518d\u770b\u770b" * 20, 5, 20),
        (PROSE * 5, len(units(PROSE)), 5),
    ],
)
def test_loops_are_found_with_their_period(text: str, period: int, times: int) -> None:
    found = repetition(f"First a plan. {text}").loop
    assert found is not None
    assert found.period == period
    assert int(found.times) == times


@pytest.mark.parametrize("text", ["", "a", PROSE, PROSE * 2, TABLE, CODE, "so " * 12])
def test_tables_code_and_prose_do_not_loop(text: str) -> None:
    assert repetition(text).loop is None


def test_a_loop_compresses_and_repeats_far_more_than_prose() -> None:
    prose, loop = repetition(PROSE), repetition(PROSE * 20)
    assert prose.compression < 2.5
    assert loop.compression > 15
    assert prose.ngrams == 0
    assert loop.ngrams > 0.9
    assert loop.longest == 10 * len(units(PROSE))


def test_shortest_period_is_told() -> None:
    found = find_loop(torch.arange(3).repeat(40))
    assert found is not None
    assert (found.start, found.period, found.length) == (0, 3, 120)


# Scripts

CHINESE, RUSSIAN = (
    "\u4e3a\u4ec0\u4e48\u6708\u4eae\u4f1a\u6709\u5706\u7f3a",
    "\u043f\u043e\u0447\u0435\u043c\u0443 \u043b\u0451\u0434",
)
JAPANESE = "\u3069\u3046\u3057\u3066\u7a7a\u306f"


def test_letters_are_counted_by_script() -> None:
    greek = "\u03b1 + \u03b2"
    assert scripts(f"Hello x {CHINESE} {greek}") == {"LATIN": 5, "CJK": 9}
    assert scripts(JAPANESE) == {"CJK": 6}
    assert scripts("1 + 2 = 3") == {}


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Why?", "Because it is so.", False),
        ("Why?", f"Because {CHINESE}.", True),
        ("Why?", f"{RUSSIAN} {RUSSIAN}", True),
        ("Why?", "The angle \u03b1 is \u03c0 / 2.", False),
        ("Why?", PROSE + "\u4e3a", False),
        (CHINESE, "Because of the sun.", True),
        (CHINESE, f"{CHINESE} NASA {CHINESE}", False),
        (f"Translate: {CHINESE}", "Why does the moon wane?", False),
        ("2 + 2", RUSSIAN, False),
        ("Why?", "", False),
    ],
)
def test_leaving_the_language_of_the_prompt(prompt: str, text: str, expected: bool) -> None:
    assert (foreign_share(prompt, text) > LEAST_SHARE) == expected
    assert 0 <= foreign_share(prompt, text) <= 1
