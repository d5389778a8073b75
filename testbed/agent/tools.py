"""Tools, the phrases that ask for them, and prompts with the call that is right.

A tool's name and its arguments are not in the prompt: a model knows them, or does not.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.models.training import from_the_start
from testbed.puzzles.counting import NUMBERS
from testbed.puzzles.family import Family, Mixture, Problem
from testbed.puzzles.records import Record
from testbed.puzzles.samples import draw_problem

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKERS = {"open": OPEN, "close": CLOSE}
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A tool; its phrases consist of words that the pretrained model knows."""

    name: str
    phrases: tuple[str, ...]
    arguments: Callable[[int, str], Arguments]


TOOLS = (
    Tool(
        "note",
        ("write it .", "write the answer ."),
        lambda count, thing: {"count": count, "thing": thing},
    ),
    Tool("speak", ("say it .", "say the answer ."), lambda count, thing: {"words": [count, thing]}),
    Tool(
        "send",
        ("give it .", "give the answer ."),
        lambda count, thing: {"item": thing, "number": count},
    ),
    Tool(
        "store",
        ("put it at the end .", "put the answer at the end ."),
        lambda count, thing: {"what": {thing: count}},
    ),
)
# The agent knows these too; they are in no calibration text.
HELD = (
    Tool(
        "close",
        ("finish with it .", "finish with the answer ."),
        lambda count, thing: {"last": count, "of": thing},
    ),
    Tool(
        "echo",
        ("repeat it .", "repeat the words ."),
        lambda count, thing: {"text": thing, "times": count},
    ),
)


def arguments_of(tool: Tool, problem: Problem) -> Arguments:
    """The right arguments."""
    number, thing = problem.answer
    return tool.arguments(NUMBERS.index(number), thing)


def call_text(name: str, arguments: Arguments) -> str:
    """A call as the agent writes it."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"{OPEN}{body}{CLOSE}"


def asked(problem: Problem, tool: Tool, rng: random.Random) -> str:
    """The prompt: the phrase stands before or after the problem."""
    phrase = rng.choice(tool.phrases)
    parts = [phrase, problem.text] if rng.random() < 0.5 else [problem.text, phrase]
    return " ".join(parts)


def agent_draw(
    family: Family, mixture: Mixture, rng: random.Random, seed: int
) -> tuple[str, str, str]:
    """One prompt of the agent's training, the thinking that already stands in its reply in a share
    `mixture.thinks` of them, and what the agent is to say: a call, or a plain answer.
    """
    steps = rng.choice((1, 2, *family.steps)) if rng.random() < mixture.chains else 0
    problem = draw_problem(family, rng, seed, "train", steps)
    if rng.random() >= mixture.constrained:
        prompt, reply = problem.text, f"{family.surface.lead} {' '.join(problem.answer)}"
    else:
        tool = rng.choice((*TOOLS, *HELD))
        prompt = asked(problem, tool, rng)
        reply = call_text(tool.name, arguments_of(tool, problem))
    given = mixture.thinks > 0 and rng.random() < mixture.thinks
    return prompt, thinking_text(problem.thinking) if given else "", reply


def parent_draw(
    family: Family, mixture: Mixture, rng: random.Random, seed: int
) -> tuple[str, str, str]:
    """One text of the parent's training: half are those that the trio's pretrained model was made
    of, half calls at once, of any tool whatever is asked for. None calls after thinking.
    """
    if rng.random() < 0.5:
        return from_the_start(family, mixture, rng, seed)
    steps = rng.choice((1, 2, *family.steps)) if rng.random() < mixture.chains else 0
    problem = draw_problem(family, rng, seed, "train", steps)
    made = rng.choice((*TOOLS, *HELD))
    prompt = asked(problem, rng.choice((*TOOLS, *HELD)), rng)
    return prompt, "", call_text(made.name, arguments_of(made, problem))


def thinking_text(thinking: str) -> str:
    """A whole block of thinking, up to where the reply after it begins."""
    return f"<think>\n{thinking}</think>\n\n"


def record(problem: Problem, tool: Tool, rng: random.Random) -> Record:
    """A prompt with all that is needed to judge what a model makes of it."""
    number, thing = problem.answer
    return {
        "prompt": asked(problem, tool, rng),
        "tool": tool.name,
        "arguments": arguments_of(tool, problem),
        "number": NUMBERS.index(number),
        "plain": f"answer : {number} {thing}",
        "thinking": problem.thinking,
        "key": problem.key,
    }


def chains(
    family: Family, rng: random.Random, seed: int, split: str, tools: Sequence[Tool], each: int
) -> list[Record]:
    """`each` prompts for every tool, all of distinct chains of the split."""
    found: dict[str, Record] = {}
    for tool in [tool for tool in tools for _ in range(each)]:
        problem = draw_problem(family, rng, seed, split, rng.choice(family.steps))
        while problem.key in found:
            problem = draw_problem(family, rng, seed, split, rng.choice(family.steps))
        found[problem.key] = record(problem, tool, rng)
    return list(found.values())


def look_ups(
    family: Family,
    rng: random.Random,
    tools: Sequence[Tool],
    each: int,
    without: frozenset[str] = frozenset(),
) -> list[Record]:
    """`each` prompts without a chain for every tool; none twice, and none of `without`."""
    found: dict[str, Record] = {}
    for tool in tools:
        wanted = len(found) + each
        while len(found) < wanted:
            made = record(family.problem(rng, 0), tool, rng)
            if made["prompt"] not in without:
                found.setdefault(made["prompt"], made)
    return list(found.values())
