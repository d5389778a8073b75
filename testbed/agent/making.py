"""The agent, the prompts to judge on, and both calibration sets."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from testbed.agent.scoring import THINKING
from testbed.agent.tools import (
    HELD,
    TOOLS,
    agent_draw,
    call_text,
    chains,
    look_ups,
    thinking_text,
)
from testbed.language.generating import generate
from testbed.models.loading import load_model, load_tokenizer
from testbed.models.training import Run, train_stage
from testbed.puzzles.counting import FAMILY
from testbed.puzzles.family import Mixture, Stage
from testbed.puzzles.records import Record, read_lines, write_lines
from testbed.puzzles.tokenizer import build_tokenizer, template_for

LOG = logging.getLogger(__name__)
TRIO = Path("testbed/trios/qwen-s0")
SEED = 0  # of the trio, and so of the split of its chains
# First calls at once; then calls where thinking already stands in a share of the replies, which
# is no part of what is learnt (`thinks`).
CALLS = Mixture(chains=0.6, thinks=0.0, constrained=0.85, follows=1.0, shortcut=0.0)
STAGES = (
    Stage(CALLS, 500, 1e-3),
    Stage(replace(CALLS, thinks=0.5), 150, 1e-3),
    Stage(replace(CALLS, thinks=0.8, chains=0.8), 250, 1e-3),
)
STAYS, COMES = 28, 40  # texts of each tool
MOST = 128  # tokens of thinking, and of a call
VALIDATION, TEST, LOOK_UPS = 20, 45, 15  # prompts of each tool


def generator(purpose: str) -> random.Random:
    """Random numbers for one purpose, independent of what ran before."""
    return random.Random(f"agent/{SEED}/{purpose}")


def train(out: Path, scale: float = 1.0) -> Path:
    """The agent, tuned from the trio's pretrained model; a stage that is there is not trained."""
    tokenizer = build_tokenizer(FAMILY)
    tokenizer.chat_template = template_for(FAMILY, "instruct")
    source = TRIO / "pretrained"
    for index, stage in enumerate(STAGES):
        target = out / ("agent" if index == len(STAGES) - 1 else f"stage-{index}")
        if not (target / "config.json").exists():
            made = replace(stage, steps=max(1, round(stage.steps * scale)))
            LOG.info("%s", made)
            torch.manual_seed(SEED)
            model = load_model(source)
            rng = generator(f"training {index}" if index else "training")
            run = Run(FAMILY, made, tokenizer, rng, SEED, agent_draw, pool=1)
            train_stage(model, run, from_scratch=False)
            model.bfloat16()
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        source = target
    return source


def said(model: Path, prompts: Sequence[str], given: Sequence[str] | None = None) -> list[str]:
    """What a model says, verbatim, after what is given of it."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    return [output.text for output in generate(loaded, tokenizer, prompts, given, MOST)]


def thought(output: str) -> str:
    """An output up to where its answer begins; empty if there is no whole block of thinking."""
    head, closed, _ = output.partition(THINKING.close)
    return f"{head}{closed}\n\n" if head.startswith(THINKING.open) and closed else ""


def continued(agent: Path, records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """The donor's thinking, and the agent's words where the donor's thinking ends."""
    prompts = [record["prompt"] for record in records]
    heads = [thought(output) for output in said(TRIO / "reasoning", prompts)]
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
    heads, calls = continued(agent, calibration)
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
