"""Whether a response gives the right answer, where the prompt has a key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_fields import JsonFields

_NUMBER = re.compile(r"(?<![\w.])[-\u2212+]?\d+(?:,\d{3})*(?:\.\d+)?(?:\s*/\s*\d+)?")
_ANNOUNCED = re.compile(r"\banswer\b\W{0,8}(?:is\b|:|=)\W{0,4}([^\n]*)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
# A set whose `answer` holds the whole solution gives the result after this (GSM8K); longer texts
# are solutions, not answers.
_RESULT, _LONGEST = "####", 200


@dataclass(frozen=True)
class AnswerKey:
    """What is right: a number, a text, one of several choices, or words in their order.

    choices: where given, the last of them that the response names is its answer.
    """

    parts: tuple[str, ...]
    choices: tuple[str, ...] = ()

    @property
    def number(self) -> Fraction | None:
        """The key as a number; None if it is none."""
        return as_number(self.parts[0]) if len(self.parts) == 1 and not self.choices else None

    def right(self, response: str) -> bool:
        r"""Whether the response gives this answer.

        A number is looked for in `\boxed{...}`, after "answer:" or "answer is", else it is the
        last number of the response. A text must be what is boxed or announced, or the last line.
        Several parts must all be there as words, in order. Case and punctuation do not count.
        """
        response = _FRACTION.sub(r"\1/\2", response)
        if self.choices:
            return last_named(response, self.choices) == plain(self.parts[0])
        if len(self.parts) > 1:
            return _in_order(self.parts, response)
        if (wanted := self.number) is not None:
            return final_number(response) == wanted
        return _says(plain(self.parts[0]), response)


def read_key(fields: JsonFields) -> AnswerKey | None:
    """`answer` (a text, a number, or a list of words) and `choices` of a prompt; None without.

    Of a text with `####` the key is what follows; a text of several lines, or of more than 200
    characters, is no key. RainError names the field.
    """
    value = fields.value("answer")
    if value is None:
        return None
    choices = fields.spans("choices", optional=True)
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(_usable(part) for part in listed):
        raise RainError(
            f"{fields.source}: field 'answer' must be a text, a number, or a list of texts"
        )
    parts = tuple(str(part).rpartition(_RESULT)[2].strip() for part in listed)
    if any("\n" in part or len(part) > _LONGEST for part in parts):
        return None
    key = AnswerKey(parts, tuple(map(plain, choices)))
    if choices and plain(key.parts[0]) not in key.choices:
        raise RainError(f"{fields.source}: field 'answer' is not among the 'choices'")
    return key


def _usable(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or (isinstance(value, str) and bool(value.strip()))


def plain(text: str) -> str:
    """Lower case, words and signs of numbers only, one space between them."""
    return " ".join(re.findall(r"[\w.+\-/%]+", text.casefold())).strip(". ")


def as_number(text: str) -> Fraction | None:
    """The value of `1,024`, `-3.5`, `3/4`; None for anything else."""
    if _NUMBER.fullmatch(text.strip()) is None:
        return None
    digits = re.sub(r"[,\s+]", "", text).replace("\u2212", "-")
    try:
        return Fraction(digits)
    except ZeroDivisionError:
        return None


def final_number(response: str) -> Fraction | None:
    """The number in the surest place that holds one: the first where it is announced."""
    boxed, announced = _boxed(response), _last(_ANNOUNCED, response)
    for place, which in ((boxed, -1), (announced, 0), (response, -1)):
        if place is not None and (found := _NUMBER.findall(place)):
            return as_number(found[which])
    return None


def _says(key: str, response: str) -> bool:
    """Whether a text is what is boxed, what an announcement begins with, or the last line."""
    boxed, announced = _boxed(response), _last(_ANNOUNCED, response)
    begins = announced is not None and f"{plain(announced)} ".startswith(f"{key} ")
    return begins or key in (plain(place or "") for place in (boxed, _last_line(response)))


def last_named(response: str, choices: Sequence[str]) -> str | None:
    """The choice (as `plain` gives it) that the response names last as a word."""
    text = plain(response)
    found = {
        match.end(): choice
        for choice in choices
        for match in re.finditer(rf"(?<![\w]){re.escape(choice)}(?![\w])", text)
    }
    return found[max(found)] if found else None


def _in_order(parts: Sequence[str], response: str) -> bool:
    rest = iter(plain(response).split())
    return all(any(word.strip(".,") == part for word in rest) for part in map(plain, parts))


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces inside it included."""
    places = list(_BOXED.finditer(text))
    if not places:
        return None
    start, depth = places[-1].end(), 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start:at]
    return None


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
