"""Rules that say whether a response follows an instruction, one for each kind.

`ARGUMENTS` lists what a rule needs to know. The shipped set (`calibration/instruction.jsonl`) is
checked with them too. The rules are our own rather than a library's, as the marking of spans (see
marking.py) needs a rule for each kind anyway; what there is for benchmarks brings data sets,
language models and downloads with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Kwargs = Mapping[str, Any]
Rule = Callable[[Kwargs, str, str], bool]


def _set(text: str) -> frozenset[str]:
    """Return the words of a string."""
    return frozenset(text.split())


_STOPWORDS: dict[str, frozenset[str]] = {
    "english": _set("the and of to is in that for it with as are you this on be"),
    "spanish": _set("el la los las de y que en un una es con por para se del al no su"),
    "french": _set("le la les de et que en un une est avec pour des du au se il on pas vous"),
    "german": _set("der die das und ist nicht ein eine mit zu den dem für auf sie ich wir im"),
    "italian": _set("il la le gli di e che in un una è con per si del della non al lo i"),
    "portuguese": _set("o a os as de e que em um uma é com por para se do da não no na ao"),
    "dutch": _set("de het een en van is niet met op te dat je voor in zijn er als die maar"),
}


def words(text: str) -> list[str]:
    """Return whitespace-separated tokens that hold at least one letter or digit."""
    return [token for token in text.split() if any(ch.isalnum() for ch in token)]


def sentences(text: str) -> list[str]:
    """Return the sentences of plain prose, split after closing punctuation."""
    pieces = re.split(r"(?<=[.!?])[\"'”)*]*\s+", text.strip())
    return [piece for piece in pieces if any(ch.isalnum() for ch in piece)]


def count_keyword(text: str, keyword: str) -> int:
    """Count whole-word occurrences of a keyword, ignoring case."""
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def compare(value: int, kwargs: Kwargs) -> bool:
    """Compare a count with ``kwargs["count"]`` by ``kwargs["relation"]``."""
    target = int(kwargs["count"])
    relation = kwargs.get("relation", "exactly")
    if relation == "at_least":
        return value >= target
    if relation == "at_most":
        return value <= target
    return value == target


def _all_uppercase(_kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has letters and none of them is lowercase."""
    return response == response.upper() and response != response.lower()


def _all_lowercase(_kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has letters and none of them is uppercase."""
    return response == response.lower() and response != response.upper()


def _max_words(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has at most ``max_words`` words."""
    return 0 < len(words(response)) <= int(kwargs["max_words"])


def _min_words(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has at least ``min_words`` words."""
    return len(words(response)) >= int(kwargs["min_words"])


def _exact_sentences(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has exactly ``sentences`` sentences."""
    return len(sentences(response)) == int(kwargs["sentences"])


def _include(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """Every keyword occurs in the response."""
    return all(count_keyword(response, keyword) > 0 for keyword in kwargs["keywords"])


def _forbid(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """No forbidden word occurs in the response."""
    return not any(count_keyword(response, word) for word in kwargs["forbidden"])


def _frequency(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The keyword occurs the required number of times."""
    return compare(count_keyword(response, kwargs["keyword"]), kwargs)


def _json(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The whole response is one JSON object with exactly the given keys."""
    try:
        value = json.loads(response)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == list(kwargs["keys"])


def _bullets(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has exactly ``bullets`` bullet lines."""
    return len(re.findall(r"^[-*] \S", response, re.MULTILINE)) == int(kwargs["bullets"])


def _numbered(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has lines numbered from one to ``items``, in order."""
    found = [int(n) for n in re.findall(r"^(\d+)[.)] \S", response, re.MULTILINE)]
    return found == list(range(1, int(kwargs["items"]) + 1))


def _title(_kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The first line of the response is a title in double angular brackets."""
    return re.fullmatch(r"<<[^<>\n]+>>", response.strip().split("\n")[0]) is not None


def _sections(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The lines that begin with the given headings follow one another in order."""
    position = 0
    for heading in kwargs["headings"]:
        match = re.compile(rf"^{re.escape(heading)}", re.MULTILINE).search(response, position)
        if match is None:
            return False
        position = match.end()
    return True


def _start(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response starts with the phrase."""
    return response.startswith(kwargs["phrase"])


def _end(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response ends with the phrase, with nothing after it."""
    return response.endswith(kwargs["phrase"])


def _no_commas(_kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has no comma."""
    return bool(response) and "," not in response


def _quotes(_kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The whole response stands between straight double quotation marks."""
    return len(response) > 2 and response[0] == response[-1] == '"'


def _repeat(kwargs: Kwargs, prompt: str, response: str) -> bool:
    """The response begins with the given part of the prompt, then goes on."""
    text = kwargs["text"]
    return text in prompt and response.startswith(text) and len(words(response[len(text) :])) > 3


def _placeholder(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has the required number of placeholders in square brackets."""
    return compare(len(re.findall(r"\[[^\[\]\n]+\]", response)), kwargs)


def _postscript(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The last paragraph of the response starts with the postscript marker."""
    paragraphs = re.split(r"\n\s*\n", response.strip())
    return len(paragraphs) > 1 and paragraphs[-1].startswith(kwargs["marker"])


def _language(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """Common words of the language outnumber those of the other known languages."""
    tokens = re.findall(r"[^\W\d_]+", response.lower())
    scores = {name: sum(t in known for t in tokens) for name, known in _STOPWORDS.items()}
    wanted = scores.pop(kwargs["language"])
    return wanted > max(scores.values()) and wanted >= 0.12 * len(tokens)


def _highlight(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has the required number of parts set between asterisks."""
    found = re.findall(r"(?<!\*)(\*{1,2})(?=\S)[^*\n]+\1(?!\*)", response)
    return compare(len(found), kwargs)


def _paragraphs(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The response has exactly ``paragraphs`` paragraphs, parted by blank lines or a divider."""
    divider = kwargs.get("divider")
    parts = response.split(divider) if divider else re.split(r"\n\s*\n", response)
    return all(part.strip() for part in parts) and len(parts) == int(kwargs["paragraphs"])


def _letter(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """The letter occurs the required number of times, ignoring case."""
    return compare(response.lower().count(str(kwargs["letter"]).lower()), kwargs)


def _two_responses(kwargs: Kwargs, _prompt: str, response: str) -> bool:
    """Two different answers stand on either side of one separator."""
    parts = [part.strip() for part in response.split(kwargs["separator"])]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _table(kwargs: Kwargs, _prompt: str, response: str) -> bool:
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
    "case:all_uppercase": _all_uppercase,
    "case:all_lowercase": _all_lowercase,
    "length:max_words": _max_words,
    "length:min_words": _min_words,
    "length:exact_sentences": _exact_sentences,
    "keyword:include": _include,
    "keyword:forbid": _forbid,
    "keyword:frequency": _frequency,
    "format:json": _json,
    "format:bullets_exact": _bullets,
    "format:numbered_list": _numbered,
    "format:title_brackets": _title,
    "format:sections": _sections,
    "start:phrase": _start,
    "end:phrase": _end,
    "punctuation:no_commas": _no_commas,
    "wrap:double_quotes": _quotes,
    "repeat:prompt_first": _repeat,
    "placeholder:brackets": _placeholder,
    "postscript:marker": _postscript,
    "language:reply": _language,
    "highlight:asterisks": _highlight,
    "paragraphs:exact": _paragraphs,
    "letter:frequency": _letter,
    "separator:two_responses": _two_responses,
    "table:markdown": _table,
}


# What each rule is told; a question mark: may be left out.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "length:max_words": ("max_words",),
    "length:min_words": ("min_words",),
    "length:exact_sentences": ("sentences",),
    "keyword:include": ("keywords",),
    "keyword:forbid": ("forbidden",),
    "keyword:frequency": ("keyword", "count", "relation?"),
    "format:json": ("keys",),
    "format:bullets_exact": ("bullets",),
    "format:numbered_list": ("items",),
    "format:sections": ("headings",),
    "start:phrase": ("phrase",),
    "end:phrase": ("phrase",),
    "repeat:prompt_first": ("text",),
    "placeholder:brackets": ("count", "relation?"),
    "postscript:marker": ("marker",),
    "language:reply": ("language",),
    "highlight:asterisks": ("count", "relation?"),
    "paragraphs:exact": ("paragraphs", "divider?"),
    "letter:frequency": ("letter", "count", "relation?"),
    "separator:two_responses": ("separator",),
    "table:markdown": ("columns", "rows"),
}
RELATIONS = ("exactly", "at_least", "at_most")
LANGUAGES = tuple(_STOPWORDS)


def check(instruction_id: str, kwargs: Kwargs, prompt: str, response: str) -> bool:
    """Say whether ``response`` satisfies the instruction; an unknown kind is a KeyError."""
    return RULES[instruction_id](kwargs, prompt, response)
