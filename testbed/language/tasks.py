"""Problems with constraints as prompts, and whether an answer is right and follows them."""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from testbed.language.constraints import CONSTRAINTS, UNCALIBRATED_CONSTRAINTS, together
from testbed.language.numbers import numbers
from testbed.language.problems import KINDS, NAMES, UNCALIBRATED_KINDS, Problem

# a problem belongs to one split by the hash of its question alone
SPLITS = {"train": range(60), "calibration": range(60, 75), "validation": range(75, 85)}
SPLITS["test"] = range(85, 100)
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Asked:
    """One constraint as it is asked for."""

    name: str
    parameter: str
    wording: str


@dataclass(frozen=True)
class Task:
    """A prompt: a problem and the constraints on its answer."""

    problem: Problem
    asked: tuple[Asked, ...] = ()
    held_out_wording: bool = False
    layout: int = 0

    @property
    def prompt(self) -> str:
        """What the user says in this turn."""
        wish = " ".join(asked.wording for asked in self.asked)
        return join(self.problem.question, wish, self.layout)

    @property
    def calibrated(self) -> bool:
        """Whether its kind of problem and its constraints may stand in a calibration set."""
        names = {asked.name for asked in self.asked}
        return self.problem.kind not in UNCALIBRATED_KINDS and not names & set(
            UNCALIBRATED_CONSTRAINTS
        )

    @property
    def block(self) -> str:
        """The right thinking block with the white space behind it."""
        return f"{OPEN}\n{self.problem.thinking}\n{CLOSE}\n\n"

    def answer(self, follow: bool = True) -> str:
        """The right answer, in the form asked for or plain."""
        text = self.problem.sentence
        asked = sorted(self.asked, key=lambda a: CONSTRAINTS[a.name].order) if follow else []
        for one in asked:
            text = CONSTRAINTS[one.name].apply(text, self.problem, one.parameter)
        return text


def join(question: str, wish: str, layout: int) -> str:
    """The question and the wish about the answer's form in one of three layouts."""
    if not wish:
        return question
    return (f"{question} {wish}", f"{question}\n{wish}", f"{wish} {question}")[layout]


def follows(text: str, asked: Sequence[tuple[str, str]]) -> bool:
    """Whether the answer has every form asked for, as pairs of name and parameter."""
    stripped = text.strip()
    return bool(stripped) and all(CONSTRAINTS[name].check(stripped, value) for name, value in asked)


def is_right(text: str, expected: str) -> bool:
    """Whether the answer gives the expected number, name, day or word, and no other one."""
    plain = re.sub(r"^\s*[\"\[]*\s*\d+[.)] ", "", text.replace("*", ""), flags=re.MULTILINE)
    if expected.isdigit():
        return numbers(plain)[-1:] == [int(expected)]
    found = re.search(rf"\b{re.escape(expected)}\b", plain, re.IGNORECASE) is not None
    others = [name for name in NAMES if expected in NAMES and name != expected]
    return found and not any(re.search(rf"\b{name}\b", plain, re.IGNORECASE) for name in others)


def number_of(text: str) -> int:
    """A large number that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def split_of(question: str) -> str:
    number = number_of(question) % 100
    return next(name for name, numbers_of in SPLITS.items() if number in numbers_of)


def draw_problem(rng: random.Random, split: str, kinds: Sequence[str]) -> Problem:
    """A problem of one of the kinds that belongs to the split."""
    kind = rng.choice(kinds)
    while True:
        problem = KINDS[kind](rng)
        if split_of(problem.question) == split:
            return problem


def draw_asked(
    rng: random.Random, problem: Problem, names: Sequence[str], count: int, held_out: bool
) -> tuple[Asked, ...]:
    """That many constraints that go together and suit the problem."""
    usable = [n for n in names if n != "words" or problem.answer.isdigit()]
    chosen = [rng.choice(usable)]
    while len(chosen) < count:
        other = rng.choice(usable)
        if together(CONSTRAINTS[chosen[0]], CONSTRAINTS[other]):
            chosen.append(other)
    asked = []
    for name in chosen:
        constraint = CONSTRAINTS[name]
        parameter = rng.choice(constraint.parameters)
        wording = rng.choice(constraint.held if held_out else constraint.known)
        asked.append(Asked(name, parameter, wording.format(parameter)))
    return tuple(asked)


def draw_task(
    rng: random.Random,
    split: str,
    count: int,
    held_out: bool = False,
    kinds: Sequence[str] = tuple(KINDS),
    names: Sequence[str] = tuple(CONSTRAINTS),
) -> Task:
    """A task with that many constraints; json goes with no other one."""
    problem = draw_problem(rng, split, kinds)
    pairable = [name for name in names if count == 1 or name != "json"]
    asked = draw_asked(rng, problem, pairable, count, held_out) if count else ()
    return Task(problem, asked, held_out, rng.choice((0, 0, 0, 1, 2)))


def calibrated_only() -> dict[str, list[str]]:
    """The kinds and constraints that calibration sets may hold."""
    return {
        "kinds": [kind for kind in KINDS if kind not in UNCALIBRATED_KINDS],
        "names": [name for name in CONSTRAINTS if name not in UNCALIBRATED_CONSTRAINTS],
    }
