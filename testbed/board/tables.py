"""Markdown tables; nothing in here knows what the numbers mean."""

from collections.abc import Mapping, Sequence
from typing import Any

Numbers = Mapping[str, Mapping[str, Any]]
SHARES = {
    "plain_accuracy": "reasoning right",
    "constrained_accuracy": "right, constrained",
    "followed": "followed",
    "both": "both",
    "both_held_out": "both, held out",
    "no_close": "no close",
    "no_thinking": "no thinking",
    "content_lost": "content lost",
}
MEANS = {"thinking_words": "words"}
PLACES = {"L_think": "L_think", "L_mid": "L_mid", "L_other": "L_other"}
NONE = "\u2013"  # an en dash, where there is no number
WITH_INTERVAL = ("plain_accuracy", "followed", "both", "L_think")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with the first column left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def percent(share: float) -> str:
    """Without a trailing .0: 86.0 is said to be known better than it is."""
    return NONE if share != share else f"{100 * share:.0f}"  # noqa: PLR0124 - not a number


def small(value: float) -> str:
    """Two significant digits."""
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.2g}"


def cell(numbers: Numbers, name: str) -> str:
    """One number, with its interval where the table shows it."""
    if name not in numbers:
        return NONE
    found = numbers[name]
    say = percent if name in SHARES else small if name in PLACES else "{:.1f}".format
    text = say(found["value"])
    if name in WITH_INTERVAL:
        low, high = (say(value) for value in found["interval"])
        text += f" [{low}, {high}]"
    return text


def header() -> list[str]:
    return [
        "method",
        "λ",
        *SHARES.values(),
        "both, random halves",
        *MEANS.values(),
        *PLACES.values(),
    ]


def line(name: str, strength: str, numbers: Numbers) -> list[str]:
    """One row of the main table."""
    halves = "/".join(percent(value) for value in numbers["both"]["halves"])
    return [
        name,
        strength,
        *(cell(numbers, key) for key in SHARES),
        halves,
        *(cell(numbers, key) for key in (*MEANS, *PLACES)),
    ]


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.0f}".replace("-", "\u2212")
