"""Small whole numbers in words, both ways."""

import re

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {
    number: _SMALL[number]
    if number < 20
    else _TENS[number // 10 - 2] + (f"-{_SMALL[number % 10]}" if number % 10 else "")
    for number in range(100)
}
_VALUES = {word: number for number, word in WORDS.items()}
_FOUND = re.compile(
    r"\d+|\b(?:" + "|".join(sorted(_VALUES, key=len, reverse=True)) + r")\b", re.IGNORECASE
)


def in_words(text: str) -> str:
    """The text with its numbers below one hundred as words."""
    return re.sub(r"\d+", lambda found: WORDS.get(int(found[0]), found[0]), text)


def numbers(text: str) -> list[int]:
    """All numbers that the text names, as digits or as words, in order."""
    return [
        int(found) if found.isdigit() else _VALUES[found.lower()] for found in _FOUND.findall(text)
    ]
