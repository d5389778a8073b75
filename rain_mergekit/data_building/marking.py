"""Find by rule the spans of an instruction in a prompt, and what follows it in a response.

Some kinds are about certain words or lines (a keyword, a title, bullet points): these follow the
instruction, and the rest has nothing to do with it. The others (case, length, language) are about
the whole response.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rain_mergekit.instructions.own import Kwargs

Ranges = list[tuple[int, int]]
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
# What a sentence says that gives an instruction of this kind; the arguments are looked for too.
_CUES: Mapping[str, str] = {
    # IFEval's
    "change_case:capital_word_frequency": r"capital|upper ?-?case|all caps",
    "change_case:english_capital": r"capital|upper ?-?case|all caps",
    "change_case:english_lowercase": r"lower ?-?case|small letters|(no|without|avoid)\b.*\bcapital",
    "combination:repeat_prompt": r"repeat|word for word|restate",
    "combination:two_responses": r"\*{6}|\btwo\b.*\b(responses|answers|versions)|asterisk",
    "detectable_content:number_placeholders": r"bracket|placeholder|\[\w",
    "detectable_content:postscript": r"",
    "detectable_format:constrained_response": r"my answer is",
    "detectable_format:json_format": r"\bjson\b",
    "detectable_format:multiple_sections": r"\bsections?\b",
    "detectable_format:number_bullet_lists": r"bullet|\bpoints?\b|dash",
    "detectable_format:number_highlighted_sections": r"asterisk|highlight|emphas|italic|bold",
    "detectable_format:title": r"\btitle\b|<<",
    "keywords:existence": r"",
    "keywords:forbidden_words": r"",
    "keywords:frequency": r"",
    "keywords:letter_frequency": r"\bletters?\b",
    "language:response_language": r"",
    "length_constraints:nth_paragraph_first_word": r"paragraph",
    "length_constraints:number_paragraphs": r"paragraph",
    "length_constraints:number_sentences": r"\bsentences?\b",
    "length_constraints:number_words": r"\bwords?\b",
    "punctuation:no_comma": r"comma",
    "startend:end_checker": r"",
    "startend:quotation": r"quot",
    # our own
    "format:json": r"\bjson\b",
    "format:numbered_list": r"\bnumber|\bsteps?\b|\blist\b|\bitems?\b",
    "format:sections": r"",
    "keyword:exact_count": r"",
    "length:exact_sentences": r"\bsentences?\b",
    "paragraphs:exact": r"paragraph",
    "separator:two_responses": r"",
    "start:phrase": r"",
    "table:markdown": r"\btable\b",
}
# Names of languages in English and in the language itself, by the code of IFEval's rule.
_LANGUAGES: Mapping[str, str] = {
    "ar": "arabic|العربية",
    "bg": "bulgarian|български",
    "bn": "bengali|বাংলা",
    "de": "german|deutsch",
    "en": "english",
    "es": "spanish|español|castellano",
    "fa": "persian|farsi|فارسی",
    "fi": "finnish|suomeksi|suomen",
    "fr": "french|français",
    "gu": "gujarati|ગુજરાતી",
    "he": "hebrew|עברית",
    "hi": "hindi|हिन्दी|हिंदी",
    "it": "italian|italiano",
    "ja": "japanese|日本語",
    "kn": "kannada|ಕನ್ನಡ",
    "ko": "korean|한국어",
    "ml": "malayalam|മലയാളം",
    "mr": "marathi|मराठी",
    "ne": "nepali|नेपाली",
    "pa": "punjabi|ਪੰਜਾਬੀ",
    "pl": "polish|polsku",
    "pt": "portuguese|português",
    "ru": "russian|русск",
    "sw": "swahili|kiswahili",
    "ta": "tamil|தமிழ்",
    "te": "telugu|తెలుగు",
    "th": "thai|ไทย",
    "uk": "ukrainian|українськ",
    "ur": "urdu|اردو",
    "vi": "vietnamese|tiếng việt",
}
# Arguments that prompts do not contain literally.
_UNSAID = ("relation", "let_relation", "capital_relation", "prompt_to_repeat", "language")


def prompt_spans(kind: str, kwargs: Kwargs, prompt: str) -> list[str]:
    """The sentences of the prompt that give the instruction, verbatim; none if no sentence does.

    A sentence gives it if it has the kind's words and one of the arguments, where there are any;
    if none has both, either will do.
    """
    pattern = (
        _LANGUAGES.get(kwargs["language"], "") if "language" in kwargs else _CUES.get(kind, "")
    )
    cue, wanted = re.compile(pattern, re.IGNORECASE), list(_arguments(kwargs))
    sentences = _sentences(prompt)
    cued = [s for s in sentences if cue.search(s)] if cue.pattern else []
    told = [s for s in sentences if any(_says(s, argument) for argument in wanted)]
    return [s for s in cued if s in told] or cued or told


def response_spans(kind: str, kwargs: Kwargs, response: str) -> tuple[list[str], list[str]]:
    """Verbatim pieces of the response that follow the instruction, and unrelated ones.

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


def _arguments(kwargs: Kwargs) -> Iterator[str]:
    for name, value in kwargs.items():
        if name not in _UNSAID:
            yield from map(str, value if isinstance(value, list) else [value])
            # "Less than 46 words" is said as "45 words at most" too.
            if type(value) is int and "less than" in kwargs.values():
                yield str(value - 1)


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


def _occurrences(name: str) -> Callable[[Kwargs, str], Ranges]:
    """Every occurrence of the texts that this argument holds, as a word, or else inside of one."""

    def find(kwargs: Kwargs, response: str) -> Ranges:
        found: Ranges = []
        for text in _listed(kwargs[name]):
            words = [match.span() for match in _word(text).finditer(response)]
            inside = re.finditer(rf"\w*{re.escape(text)}\w*", response, re.IGNORECASE)
            found += words or [match.span() for match in inside]
        return found

    return find


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _at_least(find: Callable[[Kwargs, str], Ranges]) -> Callable[[Kwargs, str], Ranges]:
    """Matches for instructions with a minimum; with a maximum the whole response follows."""
    return lambda kwargs, response: (
        _whole(kwargs, response) if "less than" in kwargs.values() else find(kwargs, response)
    )


def _first(name: str) -> Callable[[Kwargs, str], Ranges]:
    """The beginning of the response, as long as that argument."""
    return lambda kwargs, _response: [(0, len(kwargs[name].strip()))]


def _last(kwargs: Kwargs, response: str) -> Ranges:
    phrase = kwargs["end_phrase"].strip()
    start = response.lower().rfind(phrase.lower())
    return [(start, start + len(phrase))] if start >= 0 else []


def _separators(separator: str) -> Callable[[Kwargs, str], Ranges]:
    """Every occurrence of the separator; of the one in the arguments if it is empty."""
    return lambda kwargs, response: [
        match.span() for match in re.finditer(re.escape(separator or kwargs["separator"]), response)
    ]


def _headings(kwargs: Kwargs, response: str) -> Ranges:
    pattern = "|".join(f"^{re.escape(heading)}" for heading in kwargs["headings"])
    return [match.span() for match in re.finditer(pattern, response, re.MULTILINE)]


def _numbered_sections(kwargs: Kwargs, response: str) -> Ranges:
    pattern = rf"{re.escape(kwargs['section_spliter'].strip())}\s?\d+"
    return [match.span() for match in re.finditer(pattern, response)]


def _keys(kwargs: Kwargs, response: str) -> Ranges:
    pattern = "|".join(rf'"{re.escape(key)}"\s*:' for key in kwargs["keys"])
    return [match.span() for match in re.finditer(pattern, response)]


def _postscript(kwargs: Kwargs, response: str) -> Ranges:
    start = response.lower().rfind(kwargs["postscript_marker"].strip().lower())
    return [(start, len(response))] if start >= 0 else []


def _first_word(kwargs: Kwargs, response: str) -> Ranges:
    """The first word of the paragraph that is asked for."""
    starts = [match.end() for match in re.finditer(r"^|\n\n\s*", response)]
    wanted = int(kwargs["nth_paragraph"]) - 1
    start = starts[wanted] if wanted < len(starts) else 0
    found = re.compile(r"\w+").search(response, start)
    return [found.span()] if found else []


def _letters(kwargs: Kwargs, response: str) -> Ranges:
    """The words that hold the letter."""
    letter = str(kwargs["letter"]).lower()
    words = re.finditer(r"\S+", response)
    return [word.span() for word in words if letter in word.group().lower()]


_FOLLOWS: Mapping[str, Callable[[Kwargs, str], Ranges]] = {
    "change_case:capital_word_frequency": _at_least(_found(r"\b[A-Z]{2,}\b")),
    "combination:repeat_prompt": _first("prompt_to_repeat"),
    "combination:two_responses": _separators("******"),
    "detectable_content:number_placeholders": _found(r"\[[^\[\]\n]+\]"),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _found(r"My answer is (yes|no|maybe)\."),
    "detectable_format:multiple_sections": _numbered_sections,
    "detectable_format:number_bullet_lists": _found(r"^[ \t]*(-|\*[^*]).*$"),
    "detectable_format:number_highlighted_sections": _found(
        r"(?<!\*)(?P<mark>\*{1,2})(?=\S)[^*\n]+(?P=mark)(?!\*)"
    ),
    "detectable_format:title": _found(r"<<[^<>\n]+>>"),
    "keywords:existence": _occurrences("keywords"),
    "keywords:frequency": _at_least(_occurrences("keyword")),
    "keywords:letter_frequency": _at_least(_letters),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "startend:end_checker": _last,
    "format:json": _keys,
    "format:numbered_list": _found(r"^\d+[.)] .*$"),
    "format:sections": _headings,
    "keyword:exact_count": _occurrences("keyword"),
    "separator:two_responses": _separators(""),
    "start:phrase": _first("phrase"),
    "table:markdown": _found(r"^[ \t]*\|.*$"),
}


def _apart(text: str, start: int, end: int) -> tuple[int, int]:
    """Extend a word by neighbouring characters if it also occurs inside another word.

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
