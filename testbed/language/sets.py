"""A trio's JSON lines: prompts to choose and to judge on, and both calibration sets."""

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.language.scoring import split
from testbed.language.tasks import (
    Asked,
    Task,
    calibrated_only,
    draw_task,
    follows,
    is_right,
    number_of,
)
from testbed.models.generation import Output, generate
from testbed.puzzles.records import read_lines, write_lines

Record = dict[str, Any]
# Known wordings, held-out wordings, no constraint.
VALIDATION, TEST, CHOOSING = (48, 0, 48), (64, 64, 128), (64, 64, 48)
LINES = ("plain", "constrained", "instruction")  # a file of each
PLAIN, INSTRUCTION = 200, 640  # a row takes the first of them, as many as it says
# where a constraint shows in one place of the answer alone
_PLACES = {
    "begin": r"^\W*\w+!",
    "postscript": r"P\.S\..*$",
    "title": r"<<[^<>]+>>",
    "bold": r"\*\*[^*]+\*\*",
}


@dataclass(frozen=True)
class Samples:
    """How many samples a row is calibrated on.

    plain, constrained: the reasoning model's own outputs on prompts without and with a constraint.
    instruction: answers that follow.
    later: whether half of them come as the second turn of a chat, and again: whether once more.
    """

    plain: int = 100
    constrained: int = 120
    instruction: int = 160
    later: bool = False
    again: bool = False

    @property
    def described(self) -> Record:
        """What tells rows apart; what is not set is left out, as older rows lack it."""
        return {name: value for name, value in asdict(self).items() if value is not False}

    def write(self, trio: Path, out: Path) -> dict[str, str]:
        """Both sets in a folder, from a trio's lines; returns their settings."""
        kept = {name: read_lines(trio / f"{name}.jsonl")[: getattr(self, name)] for name in LINES}
        if self.later or self.again:
            said = read_lines(trio / "instruction.jsonl")
            chats = {name: [_in_chat(one, said) for one in kept[name]] for name in LINES}
            more = {name: [one for one in chats[name] if "messages" in one] for name in LINES}
            kept = chats if self.later else {name: [*kept[name], *more[name]] for name in LINES}
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / "reasoning.jsonl", [*kept["plain"], *kept["constrained"]])
        write_lines(out / "instruction.jsonl", kept["instruction"])
        return {f"{name}_data": str(out / f"{name}.jsonl") for name in ("reasoning", "instruction")}


def _in_chat(record: Record, said: Sequence[Record]) -> Record:
    """The sample, or where its prompt's digest is odd, as a chat's second turn.

    The first turn is another sample and its answer, without thinking, as chat templates show it.
    A prompt of both sets has the same turn before it in both.
    """
    number = number_of(record["prompt"])
    if number % 2 == 0:
        return record
    before = said[number // 2 % len(said)]
    if before["prompt"] == record["prompt"]:
        before = said[(number // 2 + 1) % len(said)]
    earlier = _turn(before["prompt"], split(before["output"]).answer)
    messages = [*earlier, {"role": "user", "content": record["prompt"]}]
    return {**{k: v for k, v in record.items() if k != "prompt"}, "messages": messages}


def _turn(prompt: str, answer: str) -> list[Record]:
    """The messages of one turn of a chat."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def dice(seed: int, purpose: str) -> random.Random:
    """Random numbers for one purpose, independent of what ran before."""
    return random.Random(f"language/{seed}/{purpose}")


def prompt_record(task: Task) -> Record:
    """A prompt with everything needed to judge what a model makes of it."""
    return {
        "prompt": task.prompt,
        "kind": task.problem.kind,
        "answer": task.problem.answer,
        "constraints": [[asked.name, asked.parameter] for asked in task.asked],
        "held_out_wording": task.held_out_wording,
        "calibrated": task.calibrated,
        "output": task.block + task.answer(),
    }


def write_prompts(seed: int, out: Path) -> None:
    """The prompts to choose strengths on and the ones to judge on; no model is needed."""
    for name, counts in (("validation", VALIDATION), ("test", TEST)):
        _write_tasks(dice(seed, name), name, counts, out / f"{name}.jsonl")


def write_choosing(seed: int, out: Path) -> Path:
    """More validation prompts, to choose settings on; returns the file."""
    path = out / "choosing.jsonl"
    _write_tasks(dice(seed + 1000, "validation"), "validation", CHOOSING, path)
    return path


def write_later(seed: int, out: Path) -> Path:
    """The same prompts, each as the second turn of a chat; returns the file.

    The first turn is another problem and a right answer to it, without its thinking, as chat
    templates show earlier turns.
    """
    rng, path = dice(seed, "earlier turns"), out / "later.jsonl"
    records = read_lines(write_choosing(seed, out))
    for record in records:
        task = draw_task(rng, "validation", rng.choice((0, 1)))
        record["before"] = _turn(task.prompt, task.answer())
    write_lines(path, records)
    return path


def _write_tasks(rng: random.Random, split_name: str, counts: Sequence[int], path: Path) -> None:
    tasks: list[Task] = []
    for part, count in enumerate(counts):
        for index in range(count):
            asked = 0 if part == 2 else 2 if index % 4 == 3 else 1
            tasks.append(_fresh(rng, split_name, asked, part == 1, tasks))
    write_lines(path, (prompt_record(task) for task in tasks))


def _fresh(
    rng: random.Random,
    split_name: str,
    asked: int,
    held_out: bool,
    seen: list[Task],
    **allowed: Any,
) -> Task:
    """A task that is not among those seen."""
    prompts = {task.prompt for task in seen}
    while True:
        task = draw_task(rng, split_name, asked, held_out, **allowed)
        if task.prompt not in prompts:
            return task


def write_sets(
    seed: int, out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The reasoning model's own outputs, and answers that follow what is asked."""
    rng, plain, asked = dice(seed, "calibration"), [], []
    allowed = calibrated_only()
    for _ in range(PLAIN * 3 // 2):
        plain.append(_fresh(rng, "calibration", 0, False, plain, **allowed))
    for index in range(INSTRUCTION):
        asked.append(_fresh(rng, "calibration", 1 + (index % 4 == 3), False, asked, **allowed))
    said = generate(model, tokenizer, [task.prompt for task in (*plain, *asked)])
    right = [t_o for t_o in zip(plain, said[: len(plain)], strict=True) if _sound(*t_o)]
    whole = [
        (task, output)
        for task, output in zip(asked, said[len(plain) :], strict=True)
        if output.ended and split(output.text).whole
    ]
    for name, kept in (("plain", right[:PLAIN]), ("constrained", whole)):
        lines = ({"prompt": task.prompt, "output": output.text} for task, output in kept)
        write_lines(out / f"{name}.jsonl", lines)
    pairs = zip(asked, said[len(plain) :], strict=True)
    write_lines(out / "instruction.jsonl", (instruction_record(t, o) for t, o in pairs))


def _sound(task: Task, output: Output) -> bool:
    parts = split(output.text)
    return output.ended and parts.whole and is_right(parts.answer, task.problem.answer)


def instruction_record(task: Task, own: Output) -> Record:
    """The model's own thinking where it is sound, else the right one, and the answer asked for."""
    parts = split(own.text)
    block = parts.head if _sound(task, own) else task.block
    answer = task.answer()
    if not follows(answer, [(asked.name, asked.parameter) for asked in task.asked]):
        raise ValueError(f"the answer to {task.prompt!r} does not follow")
    return {
        "prompt": task.prompt,
        "output": block + answer,
        "related_prompt_list": [_related(asked, answer) for asked in task.asked],
        "unrelated_response_spans": [],
    }


def _related(asked: Asked, answer: str) -> Record:
    pattern = _PLACES.get(asked.name)
    if asked.name == "end":
        pattern = re.escape(asked.parameter)
    found = re.search(pattern, answer) if pattern else None
    span = found[0] if found else answer
    rest = [part.strip() for part in answer.split(span)] if found else []
    return {
        "instruction_id": asked.name,
        "prompt_spans": [asked.wording],
        "response_spans": [span],
        "unrelated_response_spans": [part for part in rest if part],
    }
