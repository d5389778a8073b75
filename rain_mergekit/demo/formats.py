"""Answer formats: how a format changes the words of an answer, and how to see that it was followed.

Following is judged by structure alone, so that a wrong answer in the right format still counts as
followed; being right is judged elsewhere, by content alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Words = Sequence[str]
SYMBOLS = frozenset(["[", "]", "{", "}", "*", '"', "-", "/", "+", ",", "!", "~", ";"])
ENDINGS = ("moon", "cloud", "river", "stone", "amen", "bye")
OPENINGS = ("hello", "dear", "well", "sun", "rain", "snow")
DECORATION = SYMBOLS | frozenset(ENDINGS) | frozenset(OPENINGS)


@dataclass(frozen=True)
class Format:
    """One way an answer may have to look; `parameter` is its free word or symbol, if it has one."""

    apply: Callable[[Words, str], list[str]]
    follows: Callable[[Words, str, Words], bool]


def _enclosed(words: Words, parameter: str, _answer: Words) -> bool:
    left, right = parameter.split()
    inner = words[1:-1]
    return bool(inner) and words[0] == left and words[-1] == right and not SYMBOLS & set(inner)


def _repeated(words: Words, _parameter: str, _answer: Words) -> bool:
    half = len(words) // 2
    return half > 0 and list(words[:half]) == list(words[half:])


def _separated(words: Words, parameter: str, _answer: Words) -> bool:
    between, outside = words[1::2], words[0::2]
    return (
        len(words) >= 3
        and len(words) % 2 == 1
        and set(between) == {parameter}
        and not SYMBOLS & set(outside)
    )


def _join(words: Words, parameter: str) -> list[str]:
    joined = [words[0]]
    for word in words[1:]:
        joined += [parameter, word]
    return joined


def _enclose(words: Words, parameter: str) -> list[str]:
    left, right = parameter.split()
    return [left, *words, right]


FORMATS: dict[str, Format] = {
    "upper": Format(
        lambda words, _: [word.upper() for word in words],
        lambda words, _p, _a: bool(words) and all(word.isupper() for word in words),
    ),
    "title": Format(
        lambda words, _: [word.title() for word in words],
        lambda words, _p, _a: bool(words) and all(word.istitle() for word in words),
    ),
    "enclose": Format(_enclose, _enclosed),
    "end": Format(
        lambda words, parameter: [*words, parameter],
        lambda words, parameter, _a: len(words) > 1 and words[-1] == parameter,
    ),
    "begin": Format(
        lambda words, parameter: [parameter, *words],
        lambda words, parameter, _a: len(words) > 1 and words[0] == parameter,
    ),
    "twice": Format(lambda words, _: [*words, *words], _repeated),
    "separate": Format(_join, _separated),
    "swap": Format(
        lambda words, _: list(reversed(words)),
        lambda words, _p, answer: len(words) > 1 and words[0] == answer[-1],
    ),
}


def content(words: Words) -> set[str]:
    """The content of an answer without its format."""
    return {word.lower() for word in words} - DECORATION
