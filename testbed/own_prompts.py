"""The prompts that come with the package: written here, drawn with a seed.

    python -m testbed.own_prompts            # writes rain_mergekit/evaluation/prompts.jsonl
    python -m testbed.own_prompts --check    # fails if that file is another one

Every text is made for this project and has its licence. Keys are computed, not looked up.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "rain_mergekit" / "evaluation" / "prompts.jsonl"
SEED = 20261129
COUNTS = {"arithmetic": 80, "logic": 80, "constraint": 60, "both": 60}
Record = dict[str, Any]
Rule = tuple[str, str, Record]  # the sentence, the rule's id, its arguments

NAMES = ("Ada", "Ben", "Clara", "Deniz", "Emil", "Fatima", "Goran", "Hana", "Ines", "Jonas")
THINGS = ("apples", "books", "marbles", "pencils", "stamps", "tickets", "shells", "coins")
TOPICS = (
    "why the sky is blue",
    "how bread is made",
    "what a library is for",
    "how to learn to swim",
    "what makes a good friend",
    "why we sleep",
    "how a bicycle stays upright",
    "what to pack for a rainy hike",
    "how rivers form",
    "why bees matter",
    "how to write a thank-you note",
    "what inflation means",
    "how a lock works",
    "why leaves change their colour",
    "how to care for a cactus",
)
GENERAL = (Path(__file__).parent / "own_prompts.txt").read_text(encoding="utf-8").splitlines()


def expression(rng: random.Random) -> tuple[str, int]:
    a, b, c = rng.randint(12, 99), rng.randint(3, 19), rng.randint(11, 400)
    return rng.choice(
        (
            (f"What is {a} * {b} + {c}?", a * b + c),
            (f"Compute {a * b} / {b} - {c}.", a - c),
            (f"Work out ({a} + {c}) * {b}.", (a + c) * b),
            (f"What is {c} - {a} * {b}?", c - a * b),
            (f"What is the remainder when {a * c} is divided by {b}?", a * c % b),
        )
    )


def story(rng: random.Random) -> tuple[str, int]:
    one, other = rng.sample(NAMES, 2)
    things, a, b, c = (
        rng.choice(THINGS),
        rng.randint(12, 60),
        rng.randint(2, 9),
        rng.randint(2, 11),
    )
    return rng.choice(
        (
            (
                (
                    f"{one} has {a} {things} and gives {b} of them to {other}, who had {c}. "
                    f"How many {things} do the two have together?"
                ),
                a + c,
            ),
            (
                (
                    f"A box holds {b} {things}. {one} fills {a} boxes and has {c} {things} "
                    f"left over. How many {things} were there?"
                ),
                a * b + c,
            ),
            (
                (
                    f"{one} is {a} years old and {other} is {b} years younger. How old are they "
                    f"together in {c} years?"
                ),
                2 * a - b + 2 * c,
            ),
            (
                (
                    f"{one} buys {b} {things} at {c} coins each and pays with {b * c + a} coins. "
                    "How many coins come back?"
                ),
                a,
            ),
            (
                (
                    f"A bus starts with {a + b} people. At each of {b} stops one gets off and "
                    f"{c} get on. How many people are on it at the end?"
                ),
                a + b + b * (c - 1),
            ),
        )
    )


def problem(rng: random.Random) -> tuple[str, int]:
    return rng.choice((expression, story))(rng)


def arithmetic(rng: random.Random) -> Record:
    text, key = problem(rng)
    return {"prompt": text, "answer": key}


def order(rng: random.Random) -> Record:
    """Who is first, last, or second, from a chain of comparisons in any order."""
    people = rng.sample(NAMES, rng.randint(3, 5))
    more, most, least = rng.choice(
        (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"))
    )
    facts = [f"{one} is {more} than {other}." for one, other in itertools.pairwise(people)]
    rng.shuffle(facts)
    word, key = rng.choice(((most, people[0]), (least, people[-1])))
    shown = sorted(people)
    return {
        "prompt": f"{' '.join(facts)} Who is the {word}?",
        "answer": key,
        "choices": shown,
    }


def syllogism(rng: random.Random) -> Record:
    """Made-up words, so that nothing is known of them beforehand."""
    a, b, c = rng.sample(("blickets", "wugs", "daxes", "torps", "zibs", "morlets"), 3)
    premises, question, key = rng.choice(
        (
            (f"All {a} are {b}. All {b} are {c}.", f"Are all {a} {c}?", "yes"),
            (f"All {a} are {b}. No {b} are {c}.", f"Can any of the {a} be {c}?", "no"),
            (f"All {a} are {b}. Some {b} are {c}.", f"Must some {a} be {c}?", "no"),
            (f"All {a} are {b}. This thing is not one of the {b}.", f"Is it one of the {a}?", "no"),
            (f"Some {a} are {b}. All {b} are {c}.", f"Are some {a} {c}?", "yes"),
        )
    )
    text = f"{premises} {question} Answer with yes or no at the end."
    return {"prompt": text, "answer": key, "choices": ["yes", "no"]}


def sequence(rng: random.Random) -> Record:
    start, step = rng.randint(1, 9), rng.randint(2, 7)
    if rng.random() < 0.5:
        terms = [start + step * i for i in range(6)]
    else:
        terms = [start * (1 + step % 3 + 1) ** i for i in range(6)]
    shown = ", ".join(map(str, terms[:-1]))
    return {"prompt": f"Which number comes next: {shown}?", "answer": terms[-1]}


def weekday(rng: random.Random) -> Record:
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    today, later = rng.randrange(7), rng.randint(8, 60)
    text = f"Today is {days[today]}. Which day of the week is it in {later} days?"
    return {"prompt": text, "answer": days[(today + later) % 7], "choices": list(days)}


def logic(rng: random.Random) -> Record:
    return rng.choice((order, syllogism, sequence, weekday))(rng)


def rules(rng: random.Random) -> Iterator[Rule]:
    """Instructions that any answer can follow."""
    word, number = rng.choice(("Certainly:", "Here goes:", "In short,")), rng.randint(2, 5)
    noun = rng.choice(("water", "morning", "garden"))
    yield f"Begin your reply with the words '{word}'.", "start:phrase", {"phrase": word}
    yield (
        f"Reply in exactly {number} sentences.",
        "length:exact_sentences",
        {"sentences": number},
    )
    yield (
        f"Write exactly {number} paragraphs, with a blank line between them.",
        "paragraphs:exact",
        {"paragraphs": number},
    )
    yield (
        f"Give a numbered list of exactly {number} items (1. 2. ...).",
        "format:numbered_list",
        {"items": number},
    )
    yield (
        f"Use the word '{noun}' exactly {number} times.",
        "keyword:exact_count",
        {"keyword": noun, "count": number},
    )
    yield (
        "Use two sections whose lines begin with 'Facts:' and 'Advice:', in this order.",
        "format:sections",
        {"headings": ["Facts:", "Advice:"]},
    )
    yield (
        f"Answer with one Markdown table with the columns Point and Reason and {number} rows.",
        "table:markdown",
        {"columns": ["Point", "Reason"], "rows": number},
    )
    yield (
        "Give two different answers, with a line of six stars (******) between them.",
        "separator:two_responses",
        {"separator": "******"},
    )


def constraint(rng: random.Random) -> Record:
    text, kind, kwargs = rng.choice(list(rules(rng)))
    prompt = f"Explain {rng.choice(TOPICS)}. {text}"
    return {"prompt": prompt, "instruction_id_list": [kind], "kwargs": [kwargs]}


def both(rng: random.Random) -> Record:
    """A problem with a key, and an instruction for the reply: right, and as asked."""
    question, key = problem(rng)
    text, kind, kwargs = rng.choice(
        (
            (
                "Reply in exactly two sentences; the result is the last number.",
                "length:exact_sentences",
                {"sentences": 2},
            ),
            (
                "Begin your reply with the words 'The result'; the result is its last number.",
                "start:phrase",
                {"phrase": "The result"},
            ),
            (
                'Reply with nothing but a JSON object with the keys "working" and "result".',
                "format:json",
                {"keys": ["working", "result"]},
            ),
            (
                (
                    "Reply with a numbered list of exactly 3 items (1. 2. 3.); the last ends with "
                    "the result."
                ),
                "format:numbered_list",
                {"items": 3},
            ),
            (
                "Use two sections whose lines begin with 'Working:' and 'Result:', in this order.",
                "format:sections",
                {"headings": ["Working:", "Result:"]},
            ),
        )
    )
    prompt = f"{question} {text}"
    return {"prompt": prompt, "answer": key, "instruction_id_list": [kind], "kwargs": [kwargs]}


MAKERS: dict[str, Callable[[random.Random], Record]] = {
    "arithmetic": arithmetic,
    "logic": logic,
    "constraint": constraint,
    "both": both,
}


def prompts() -> list[Record]:
    """All of them; kinds take turns, so that any evenly spaced choice has all kinds."""
    rng = random.Random(SEED)
    groups = [[{"kind": "general", "prompt": text} for text in GENERAL]]
    for kind, count in COUNTS.items():
        found: dict[str, Record] = {}
        while len(found) < count:
            record = MAKERS[kind](rng)
            found.setdefault(record["prompt"], {"kind": kind, **record})
        groups.append(list(found.values()))
    placed = [
        ((index + 0.5) / len(group), record)
        for group in groups
        for index, record in enumerate(group)
    ]
    return [record for _, record in sorted(placed, key=lambda item: item[0])]


def text() -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in prompts())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        FILE.write_text(text(), encoding="utf-8")
    return int(FILE.read_text(encoding="utf-8") != text())


if __name__ == "__main__":
    sys.exit(main())
