"""Constraints on an answer's form that code can check."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from testbed.language.numbers import in_words
from testbed.language.problems import Problem
from testbed.language.wordings import HELD_OUT, KNOWN

Apply = Callable[[str, Problem, str], str]
Check = Callable[[str, str], bool]


@dataclass(frozen=True)
class Constraint:
    """One constraint; `group` holds those that exclude each other, `order` when it is applied."""

    name: str
    group: str
    order: int
    apply: Apply
    check: Check
    parameters: tuple[str, ...] = ("",)

    @property
    def known(self) -> tuple[str, ...]:
        """Wordings that are trained."""
        return KNOWN[self.name]

    @property
    def held(self) -> tuple[str, ...]:
        """Wordings that only the test uses."""
        return HELD_OUT[self.name]


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _marked(pattern: str) -> Check:
    return lambda text, _: (
        len(_lines(text)) >= 2 and all(re.match(pattern, x) for x in _lines(text))
    )


def _numbered(text: str, _: str) -> bool:
    lines = _lines(text)
    return len(lines) >= 2 and all(line.startswith(f"{n}. ") for n, line in enumerate(lines, 1))


def _json(text: str, _: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["answer"]


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text.strip()))


def _twice(text: str, _: str) -> bool:
    lines = _lines(text)
    return len(lines) == 2 and lines[0] == lines[1]


def _wrapped(left: str, right: str) -> Check:
    return lambda text, _: len(text) > 2 and text[:1] == left and text[-1:] == right


def _bold(text: str, problem: Problem, _: str) -> str:
    return re.sub(rf"\b{re.escape(problem.answer)}\b", f"**{problem.answer}**", text, count=1)


CONSTRAINTS: dict[str, Constraint] = {
    made.name: made
    for made in (
        Constraint(
            "uppercase",
            "case",
            8,
            lambda text, _p, _a: text.upper(),
            lambda text, _: text.upper() == text and text.lower() != text,
        ),
        Constraint(
            "lowercase",
            "case",
            8,
            lambda text, _p, _a: text.lower(),
            lambda text, _: text.lower() == text and text.upper() != text,
        ),
        Constraint(
            "json",
            "json",
            1,
            lambda _t, problem, _a: json.dumps({"answer": problem.answer}),
            _json,
        ),
        Constraint(
            "postscript",
            "end",
            5,
            lambda text, _p, _a: f"{text}\nP.S. Ask me again any time.",
            lambda text, _: len(_lines(text)) >= 2 and _lines(text)[-1].startswith("P.S."),
        ),
        Constraint(
            "begin",
            "begin",
            4,
            lambda text, _p, word: f"{word}! {text}",
            lambda text, word: text.startswith(word),
            ("Certainly", "Sure", "Hello", "Great", "Okay"),
        ),
        Constraint(
            "end",
            "end",
            5,
            lambda text, _p, phrase: f"{text} {phrase}",
            lambda text, phrase: text.endswith(phrase),
            ("Hope this helps!", "Have a nice day!", "That is all.", "Thanks for asking!"),
        ),
        Constraint(
            "brackets",
            "wrap",
            9,
            lambda text, _p, _a: f"[{text}]",
            _wrapped("[", "]"),
        ),
        Constraint(
            "quotes",
            "wrap",
            9,
            lambda text, _p, _a: f'"{text}"',
            _wrapped('"', '"'),
        ),
        Constraint(
            "bullets",
            "body",
            3,
            lambda text, problem, _a: f"- {problem.fact}\n- {text}",
            _marked(r"[-*] "),
        ),
        Constraint(
            "numbered",
            "body",
            3,
            lambda text, problem, _a: f"1. {problem.fact}\n2. {text}",
            _numbered,
        ),
        Constraint(
            "twice",
            "body",
            3,
            lambda text, _p, _a: f"{text}\n{text}",
            _twice,
        ),
        Constraint(
            "two_sentences",
            "body",
            3,
            lambda text, problem, _a: f"{problem.fact} {text}",
            lambda text, _: _sentences(text) == 2,
        ),
        Constraint(
            "title",
            "body",
            3,
            lambda text, problem, _a: f"<<{problem.topic}>>\n{text}",
            lambda text, _: bool(re.match(r"<<[^<>]+>>\n.", text)),
        ),
        Constraint(
            "no_commas",
            "commas",
            0,
            lambda _t, problem, _a: problem.flat,
            lambda text, _: "," not in text and len(text) > 0,
        ),
        Constraint(
            "words",
            "words",
            2,
            lambda text, _p, _a: in_words(text),
            lambda text, _: not re.search(r"\d", text) and len(text) > 0,
        ),
        Constraint(
            "bold",
            "words",
            2,
            _bold,
            lambda text, _: bool(re.search(r"\*\*[^*\n]+\*\*", text)),
        ),
    )
}
# both models learn these; no calibration set holds them
UNCALIBRATED_CONSTRAINTS = ("json", "postscript")
# pairs of groups that do not go together, besides any group with itself
_APART = {
    frozenset(pair)
    for pair in (
        ("case", "begin"),
        ("case", "end"),
        ("wrap", "begin"),
        ("wrap", "end"),
        ("wrap", "body"),
        ("body", "begin"),
        ("body", "end"),
    )
}


def together(first: Constraint, second: Constraint) -> bool:
    """Whether one answer can follow both."""
    if "json" in (first.group, second.group) or first.group == second.group:
        return False
    if {first.name, second.name} == {"numbered", "words"}:
        return False
    return frozenset((first.group, second.group)) not in _APART
