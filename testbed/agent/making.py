"""The prompts to judge on and both calibration sets, written by the trained models."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

from testbed.agent.scoring import THINKING
from testbed.agent.tools import (
    HELD,
    TOOLS,
    call_text,
    chains,
    look_ups,
    thinking_text,
)
from testbed.agent.training import SEED
from testbed.models.generation import generate
from testbed.models.loading import load_model, load_tokenizer
from testbed.puzzles.counting import FAMILY
from testbed.puzzles.records import Record, read_lines, write_lines

LOG = logging.getLogger(__name__)
STAYS, COMES = 28, 40  # texts of each tool
MOST = 100  # tokens of thinking, and of a call
VALIDATION, TEST, LOOK_UPS = 20, 45, 15  # prompts of each tool


def generator(purpose: str) -> random.Random:
    """Random numbers for one purpose, independent of what ran before."""
    return random.Random(f"agent/{SEED}/{purpose}")


def said(model: Path, prompts: Sequence[str], given: Sequence[str] | None = None) -> list[str]:
    """What a model says, verbatim, after what is given of it."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    return [output.text for output in generate(loaded, tokenizer, prompts, given, MOST)]


def thought(output: str) -> str:
    """An output up to where its answer begins; empty if there is no whole block of thinking."""
    head, closed, _ = output.partition(THINKING.close)
    return f"{head}{closed}\n\n" if head.startswith(THINKING.open) and closed else ""


def continued(donor: Path, agent: Path, records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """The donor's thinking, and the agent's words where the donor's thinking ends."""
    prompts = [record["prompt"] for record in records]
    heads = [thought(output) for output in said(donor, prompts)]
    return heads, said(agent, prompts, heads)


def right_call(record: Record) -> str:
    """The call that a prompt asks for."""
    return call_text(record["tool"], record["arguments"])


def write_prompts(out: Path) -> None:
    """The prompts of both splits; look-ups of the calibration set are in neither."""
    used = frozenset(record["prompt"] for record in look_ups_that_stay())
    for split, each in (("validation", VALIDATION), ("test", TEST)):
        rng = generator(split)
        tools = (*TOOLS, *HELD)
        asked = chains(FAMILY, rng, SEED, split, tools, each)
        asked += look_ups(FAMILY, rng, tools, LOOK_UPS, used)
        write_lines(out / f"{split}.jsonl", asked)


def look_ups_that_stay() -> list[Record]:
    """What the agent is asked for the set of what stays."""
    return look_ups(FAMILY, generator("stays"), TOOLS, STAYS)


def write_sets(out: Path) -> None:
    """`stays`: the agent's own calls on look-ups; `comes`: the donor's thinking on chains, and the
    agent's own call after it, where both are right; `stays-chains`: the agent's calls at once on
    other chains, whose number is a guess.
    """
    agent = out / "agent"
    calibration = chains(FAMILY, generator("comes"), SEED, "calibration", TOOLS, 2 * COMES)
    heads, calls = continued(out / "donor", agent, calibration)
    pairs = [
        {"prompt": record["prompt"], "output": head + call}
        for record, head, call in zip(calibration, heads, calls, strict=True)
        if head == thinking_text(record["thinking"]) and call == right_call(record)
    ]
    LOG.info("%d of %d texts of thinking and a call are right", len(pairs), len(calibration))
    comes = random.Random(SEED).sample(pairs, min(len(pairs), COMES * len(TOOLS)))
    write_lines(out / "comes.jsonl", comes)
    taken = {record["prompt"] for record in comes}
    asked = look_ups_that_stay()
    write_own(out / "stays.jsonl", agent, asked)
    others = [record for record in calibration if record["prompt"] not in taken]
    write_own(out / "stays-chains.jsonl", agent, others[: len(asked)])


def write_own(path: Path, agent: Path, records: Sequence[Record]) -> None:
    """What the agent says to these prompts, whether it is right or not."""
    prompts = [record["prompt"] for record in records]
    outputs = said(agent, prompts)
    rows = zip(prompts, outputs, strict=True)
    write_lines(path, ({"prompt": prompt, "output": output} for prompt, output in rows))


def prompts_of(out: Path, split: str) -> list[Record]:
    return read_lines(out / f"{split}.jsonl")
