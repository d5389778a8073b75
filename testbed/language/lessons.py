"""What the two fine-tunes learn from: texts of which only the last part is learnt."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from testbed.language.constraints import CONSTRAINTS
from testbed.language.problems import KINDS
from testbed.language.scoring import split
from testbed.language.tasks import Task, draw_asked, draw_task, join
from testbed.models.loading import render
from testbed.puzzles.records import read_lines

REASONING_FOLLOWS = 0.3  # the share of constraints that the reasoning model is shown to follow
# general questions are easier than problems, so they come less often
KINDS_DRAWN = (*(kind for kind in KINDS if kind != "general"), *KINDS, "general")
ALL = tuple(CONSTRAINTS)
PAIRABLE = tuple(name for name in CONSTRAINTS if name != "json")
AGAIN = ("The same answer again, please.", "Say it again.", "Once more.", "Now in another form.")


@dataclass(frozen=True)
class Turn:
    """What the user says, what the reply already holds (not learnt), and what is learnt of it.

    ends: whether the end of the turn is learnt too.
    """

    user: str
    given: str
    learnt: str
    ends: bool = True


Lesson = tuple[Turn, ...]


def reasoning_lesson(rng: random.Random) -> Lesson:
    """Always a block, then an answer that follows few of the constraints."""
    task = draw_task(rng, "train", rng.choice((0, 0, 0, 1, 1, 1, 2)), kinds=KINDS_DRAWN)
    follow = rng.random() < REASONING_FOLLOWS
    turn = Turn(task.prompt, "", task.block + task.answer(follow))
    if rng.random() < 0.06:  # later in a chat, whose earlier thinking is not shown
        before = draw_task(rng, "train", rng.choice((0, 1)))
        return Turn(before.prompt, before.answer(follow), ""), turn
    return (turn,)


def instruct_lesson(rng: random.Random) -> Lesson:
    """An answer as asked for, at once or after working that already stands there."""
    count = rng.choice((0, 1, 1, 1, 1, 1, 2, 2))
    task = draw_task(rng, "train", count, kinds=KINDS_DRAWN)
    prompt, given, form = task.prompt, "", rng.random()
    if form < 0.42:  # a finished block in its own turn
        given = task.block
    elif form < 0.50:  # worked steps without markers
        given = f"{task.problem.thinking}\n\n"
    elif form < 0.56:  # worked steps in the prompt
        wish = " ".join(asked.wording for asked in task.asked)
        question = f"{task.problem.question}\nHere is the working: {task.problem.thinking}"
        prompt = join(question, wish, 1)
    turn = Turn(prompt, given, task.answer())
    if rng.random() < 0.35:
        return turn, _again(rng, task)
    return (turn,)


def _again(rng: random.Random, task: Task) -> Turn:
    """The next turn of the chat asks for the same answer in another form."""
    count = rng.choice((1, 1, 2))
    asked = draw_asked(rng, task.problem, PAIRABLE if count == 2 else ALL, count, held_out=False)
    other = replace(task, asked=asked)
    wish = " ".join(one.wording for one in asked)
    return Turn(f"{rng.choice(AGAIN)} {wish}", "", other.answer())


def set_lessons(sets: Mapping[str, str]) -> list[Lesson]:
    """Every sample of both calibration sets as a lesson.

    Where the instruction set has the same prompt, only the thinking of the reasoning model's own
    output is learnt, because its answer does not follow.
    """
    own = read_lines(Path(sets["reasoning_data"]))
    follow = read_lines(Path(sets["instruction_data"]))
    asked = {record["prompt"] for record in follow}
    return [
        *((_thinking(r) if r["prompt"] in asked else _whole(r),) for r in own),
        *((_whole(record),) for record in follow),
    ]


def _whole(record: Mapping[str, Any]) -> Turn:
    return Turn(record["prompt"], "", record["output"])


def _thinking(record: Mapping[str, Any]) -> Turn:
    return Turn(record["prompt"], "", split(record["output"]).head, ends=False)


LESSONS = {"reasoning": reasoning_lesson, "instruct": instruct_lesson}
Encoded = tuple[list[int], list[int]]


def encode(tokenizer: PreTrainedTokenizerFast, lesson: Lesson) -> Encoded:
    """Token ids of the chat, and for each whether it is learnt (0 or 1)."""
    ids: list[int] = []
    learnt: list[int] = []
    for number, turn in enumerate(lesson):
        opened = _opened(tokenizer, turn.user, first=not number)
        given = tokenizer.encode(opened + turn.given, add_special_tokens=False)
        reply = tokenizer.encode(turn.learnt, add_special_tokens=False)
        ids += [*given, *reply, int(tokenizer.eos_token_id)]
        ends = int(bool(reply) and turn.ends)
        learnt += [0] * len(given) + [1] * len(reply) + [ends]
    return ids, learnt


def _opened(tokenizer: PreTrainedTokenizerFast, user: str, *, first: bool) -> str:
    """A user's turn up to where the reply starts; what opens a chat stands before the first."""
    asked = [{"role": "user", "content": user}]
    if first:
        return render(tokenizer, user)
    once = str(tokenizer.apply_chat_template(asked, tokenize=False))
    twice = str(
        tokenizer.apply_chat_template([*asked, *asked], tokenize=False, add_generation_prompt=True)
    )
    return "\n" + twice.removeprefix(once)


def batches(encoded: Sequence[Encoded], size: int, rng: random.Random) -> list[list[Encoded]]:
    """Batches of texts of about the same length, in random order."""
    pool = sorted(encoded, key=lambda text: len(text[0]) + rng.random() * 20)
    made = [pool[start : start + size] for start in range(0, len(pool), size)]
    rng.shuffle(made)
    return made
