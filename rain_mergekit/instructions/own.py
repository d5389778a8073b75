"""Rules that IFEval lacks; `ARGUMENTS` lists the arguments of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rain_mergekit.errors import RainError

Kwargs = Mapping[str, Any]
Rule = Callable[[Kwargs, str], bool]


def _sentences(kwargs: Kwargs, response: str) -> bool:
    """The response has exactly `sentences` sentences, told by closing punctuation."""
    pieces = re.split(r"(?<=[.!?])[\"'”)*]*\s+", response.strip())
    found = [piece for piece in pieces if any(ch.isalnum() for ch in piece)]
    return len(found) == int(kwargs["sentences"])


def _exact_count(kwargs: Kwargs, response: str) -> bool:
    """The keyword occurs exactly `count` times as a whole word, ignoring case."""
    pattern = rf"(?<!\w){re.escape(kwargs['keyword'])}(?!\w)"
    return len(re.findall(pattern, response, re.IGNORECASE)) == int(kwargs["count"])


def _json(kwargs: Kwargs, response: str) -> bool:
    """The whole response is one JSON object with exactly the given keys."""
    try:
        value = json.loads(response)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == list(kwargs["keys"])


def _numbered(kwargs: Kwargs, response: str) -> bool:
    """The response has lines numbered from one to `items`, in order."""
    found = [int(n) for n in re.findall(r"^(\d+)[.)] \S", response, re.MULTILINE)]
    return found == list(range(1, int(kwargs["items"]) + 1))


def _sections(kwargs: Kwargs, response: str) -> bool:
    """The lines that begin with the given headings follow one another in order."""
    position = 0
    for heading in kwargs["headings"]:
        match = re.compile(rf"^{re.escape(heading)}", re.MULTILINE).search(response, position)
        if match is None:
            return False
        position = match.end()
    return True


def _start(kwargs: Kwargs, response: str) -> bool:
    """The response starts with the phrase."""
    return response.startswith(kwargs["phrase"])


def _paragraphs(kwargs: Kwargs, response: str) -> bool:
    """The response has exactly `paragraphs` paragraphs, parted by blank lines."""
    parts = re.split(r"\n\s*\n", response)
    return all(part.strip() for part in parts) and len(parts) == int(kwargs["paragraphs"])


def _two_responses(kwargs: Kwargs, response: str) -> bool:
    """Two different answers stand on either side of one separator of your own."""
    parts = [part.strip() for part in response.split(kwargs["separator"])]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _table(kwargs: Kwargs, response: str) -> bool:
    """The response holds one Markdown table with the given columns and number of rows."""
    lines = [line.strip() for line in response.split("\n") if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if len(rows) < 3 or not all(re.fullmatch(r":?-{3,}:?", cell) for cell in rows[1]):
        return False
    width = len(rows[0])
    return (
        rows[0] == list(kwargs["columns"])
        and all(len(row) == width for row in rows)
        and len(rows) - 2 == int(kwargs["rows"])
    )


RULES: dict[str, Rule] = {
    "length:exact_sentences": _sentences,
    "keyword:exact_count": _exact_count,
    "format:json": _json,
    "format:numbered_list": _numbered,
    "format:sections": _sections,
    "start:phrase": _start,
    "paragraphs:exact": _paragraphs,
    "separator:two_responses": _two_responses,
    "table:markdown": _table,
}
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "length:exact_sentences": ("sentences",),
    "keyword:exact_count": ("keyword", "count"),
    "format:json": ("keys",),
    "format:numbered_list": ("items",),
    "format:sections": ("headings",),
    "start:phrase": ("phrase",),
    "paragraphs:exact": ("paragraphs",),
    "separator:two_responses": ("separator",),
    "table:markdown": ("columns", "rows"),
}
_LISTS = ("keys", "headings", "columns")
_TEXTS = ("keyword", "phrase", "separator")


def arguments(where: str, kind: str, given: Kwargs) -> dict[str, Any]:
    """The rule's arguments; RainError that begins with `where` if one is missing or unknown."""
    if unknown := sorted(set(given) - set(ARGUMENTS[kind])):
        raise RainError(f"{where}: rule {kind!r} does not know {', '.join(map(repr, unknown))}")
    return {name: _argument(f"{where}: {name}", name, given.get(name)) for name in ARGUMENTS[kind]}


def _argument(where: str, name: str, value: object) -> Any:
    """The value if it is of the type that goes with the name."""
    if name in _LISTS:
        expected = "a list of texts"
        good = isinstance(value, list) and value and all(_is_text(item) for item in value)
    elif name in _TEXTS:
        expected, good = "a text", _is_text(value)
    else:
        expected, good = "a whole number", type(value) is int and value >= 0
    if not good:
        found = "nothing" if value is None else repr(value)[:60]
        raise RainError(f"{where} must be {expected}, found {found}")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
