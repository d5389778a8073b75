"""Where an instruction stands in a prompt, and what in a response follows it: spans, by rule.

Some kinds are about certain words or lines (a keyword, a title, bullet points): these follow the
instruction, and the rest has nothing to do with it. The others (case, length, language) are about
the whole response.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rain_mergekit.building.rules import Kwargs

Ranges = list[tuple[int, int]]
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
# What a sentence says that gives an instruction of this kind; the arguments are looked for too.
_CUES: Mapping[str, str] = {
    "case:all_uppercase": r"capital|upper ?-?case|all caps",
    "case:all_lowercase": r"lower ?-?case|small letters|(no|without|avoid)\b.*\bcapital",
    "length:max_words": r"\bwords?\b",
    "length:min_words": r"\bwords?\b",
    "length:exact_sentences": r"\bsentences?\b",
    "keyword:include": r"",
    "keyword:forbid": r"",
    "keyword:frequency": r"",
    "format:json": r"\bjson\b",
    "format:bullets_exact": r"bullet|\bpoints?\b|dash",
    "format:numbered_list": r"\bnumber|\bsteps?\b|\blist\b|\bitems?\b",
    "format:title_brackets": r"\btitle\b|<<",
    "format:sections": r"",
    "start:phrase": r"",
    "end:phrase": r"",
    "punctuation:no_commas": r"comma",
    "wrap:double_quotes": r"quot",
    "repeat:prompt_first": r"repeat|word for word|restate",
    "placeholder:brackets": r"bracket|placeholder|\[\w",
    "postscript:marker": r"",
    "language:reply": r"español|français|deutsch|italiano|português|nederlands",
    "highlight:asterisks": r"asterisk|highlight|emphas|italic|bold",
    "paragraphs:exact": r"paragraph",
    "letter:frequency": r"\bletter\b",
    "separator:two_responses": r"",
    "table:markdown": r"\btable\b",
}


def prompt_spans(kind: str, kwargs: Kwargs, prompt: str) -> list[str]:
    """The sentences of the prompt that give the instruction, verbatim; none if no sentence does.

    A sentence gives it if it has the kind's words and one of the arguments, where there are any;
    if none has both, either will do.
    """
    cue, wanted = re.compile(_CUES[kind], re.IGNORECASE), list(_arguments(kind, kwargs))
    sentences = _sentences(prompt)
    cued = [s for s in sentences if cue.search(s)] if cue.pattern else []
    told = [s for s in sentences if any(_says(s, argument) for argument in wanted)]
    return [s for s in cued if s in told] or cued or told


def response_spans(kind: str, kwargs: Kwargs, response: str) -> tuple[list[str], list[str]]:
    """What in the response follows the instruction, and what is unrelated to it; verbatim pieces.

    The two never overlap. A response of which nothing is unrelated gives an empty second list.
    """
    ranges = _FOLLOWS.get(kind, _whole)(kwargs, response)
    ranges = [_apart(response, *place) for place in ranges] or _whole(kwargs, response)
    unrelated = _pieces(response, _between(ranges, len(response)))
    return _pieces(response, ranges), [piece for piece in unrelated if re.search(r"\w", piece)]


def _sentences(text: str) -> list[str]:
    """Sentences and lines, verbatim, without the space around them."""
    # Not after abbreviations; closing quotes are dropped, so that each piece is still verbatim.
    parts = re.split(r"(?<=[.!?])(?<![.][A-Za-z][.])[\"'”)*]*\s+|\n+", text)
    return [part.strip() for part in parts if part and part.strip()]


def _arguments(kind: str, kwargs: Kwargs) -> Iterator[str]:
    for name, value in kwargs.items():
        if name == "relation" or (kind == "repeat:prompt_first" and name == "text"):
            continue  # said in other words; the repeated text is not the instruction
        for item in value if isinstance(value, list) else [value]:
            yield str(int(item)) if isinstance(item, (int, float)) else str(item)


def _says(sentence: str, argument: str) -> bool:
    words = [argument]
    if argument.isdecimal() and int(argument) < len(_NUMBERS):
        words.append(_NUMBERS[int(argument)])
        words += {"1": ["once", "single"], "2": ["twice", "both"]}.get(argument, [])
    return any(_word(word).search(sentence) for word in words)


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _whole(_kwargs: Kwargs, response: str) -> Ranges:
    return [(0, len(response))]


def _found(pattern: str) -> Callable[[Kwargs, str], Ranges]:
    """Every match in the response."""
    return lambda _kwargs, response: [
        match.span() for match in re.finditer(pattern, response, re.MULTILINE)
    ]


def _occurrences(*names: str) -> Callable[[Kwargs, str], Ranges]:
    """Every whole-word occurrence of the texts that these arguments hold."""

    def find(kwargs: Kwargs, response: str) -> Ranges:
        texts = [t for name in names for t in _listed(kwargs[name])]
        return [m.span() for text in texts for m in _word(text).finditer(response)]

    return find


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _first(name: str) -> Callable[[Kwargs, str], Ranges]:
    """The beginning of the response, as long as that argument."""
    return lambda kwargs, _response: [(0, len(kwargs[name]))]


def _last(kwargs: Kwargs, response: str) -> Ranges:
    return [(len(response) - len(kwargs["phrase"]), len(response))]


def _separators(kwargs: Kwargs, response: str) -> Ranges:
    pattern = re.escape(kwargs["separator"])
    return [match.span() for match in re.finditer(pattern, response)]


def _headings(kwargs: Kwargs, response: str) -> Ranges:
    pattern = "|".join(f"^{re.escape(heading)}" for heading in kwargs["headings"])
    return [match.span() for match in re.finditer(pattern, response, re.MULTILINE)]


def _keys(kwargs: Kwargs, response: str) -> Ranges:
    pattern = "|".join(rf'"{re.escape(key)}"\s*:' for key in kwargs["keys"])
    return [match.span() for match in re.finditer(pattern, response)]


def _postscript(kwargs: Kwargs, response: str) -> Ranges:
    start = response.rfind(kwargs["marker"])
    return [(start, len(response))] if start >= 0 else []


def _letters(kwargs: Kwargs, response: str) -> Ranges:
    """The words that hold the letter."""
    letter = str(kwargs["letter"]).lower()
    words = re.finditer(r"\S+", response)
    return [word.span() for word in words if letter in word.group().lower()]


_FOLLOWS: Mapping[str, Callable[[Kwargs, str], Ranges]] = {
    "keyword:include": _occurrences("keywords"),
    "keyword:frequency": _occurrences("keyword"),
    "format:json": _keys,
    "format:bullets_exact": _found(r"^[-*] .*$"),
    "format:numbered_list": _found(r"^\d+[.)] .*$"),
    "format:title_brackets": _found(r"<<[^<>\n]+>>"),
    "format:sections": _headings,
    "start:phrase": _first("phrase"),
    "end:phrase": _last,
    "repeat:prompt_first": _first("text"),
    "placeholder:brackets": _found(r"\[[^\[\]\n]+\]"),
    "postscript:marker": _postscript,
    "highlight:asterisks": _found(r"(?<!\*)(?P<mark>\*{1,2})(?=\S)[^*\n]+(?P=mark)(?!\*)"),
    "letter:frequency": _letters,
    "separator:two_responses": _separators,
    "table:markdown": _found(r"^[ \t]*\|.*$"),
}


def _apart(text: str, start: int, end: int) -> tuple[int, int]:
    """Widen a word to its neighbouring characters where it also is a part of another word.

    Readers look for spans as substrings: `cat` alone would be found in `catalogue` too.
    """
    inside = re.compile(rf"(?<=\w){re.escape(text[start:end])}|{re.escape(text[start:end])}(?=\w)")
    if inside.search(text) is None:
        return start, end
    return max(0, start - 1), min(len(text), end + 1)


def _between(ranges: Ranges, length: int) -> Ranges:
    found, at = [], 0
    for start, end in sorted(ranges):
        if start > at:
            found.append((at, start))
        at = max(at, end)
    return [*found, (at, length)] if at < length else found


def _pieces(text: str, ranges: Ranges) -> list[str]:
    """The distinct texts of the ranges, without the space around them."""
    parts = (text[start:end].strip() for start, end in sorted(ranges))
    return list(dict.fromkeys(part for part in parts if part))
