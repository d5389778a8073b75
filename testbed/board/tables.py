"""Markdown tables; nothing in here knows what the numbers mean."""

from collections.abc import Callable, Mapping, Sequence
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
MODELS = ("pretrained", "reasoning", "instruct", "ceiling")  # rows that are no merges
NONE = "\u2013"  # an en dash, where there is no number
WITH_INTERVAL = ("plain_accuracy", "followed", "both", "L_think")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with the first column left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def between(text: str, name: str, content: str) -> str:
    """A page's text with this between the two comments that name the part."""
    begin, end = f"<!-- {name}: begin", f"<!-- {name}: end -->"
    start = text.index("-->\n", text.index(begin)) + 4
    return text[:start] + content + text[text.index(end) :]


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
    return with_interval(found, say) if name in WITH_INTERVAL else say(found["value"])


def with_interval(found: Mapping[str, Any], say: Callable[[float], str] = percent) -> str:
    """A number and its interval: 43 [34, 52]."""
    low, high = (say(value) for value in found["interval"])
    return f"{say(found['value'])} [{low}, {high}]"


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
