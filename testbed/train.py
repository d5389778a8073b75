"""Train a trio: `python -m testbed.train --trio NAME --seed S --out DIR`.

The two fine-tuned models start from the same pretrained one. Everything is drawn from generators
seeded by trio, seed and stage, so a stage can be trained again alone.
"""

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.models.generation import generate
from testbed.models.loading import LONGEST_OUTPUT, build_model, load_model, load_tokenizer
from testbed.models.training import Run, train_stage
from testbed.puzzles.families import FAMILIES
from testbed.puzzles.family import Family
from testbed.puzzles.records import (
    Record,
    instruction_record,
    output_text,
    prompt_record,
    write_lines,
)
from testbed.puzzles.samples import Task, held_tasks
from testbed.puzzles.tokenizer import build_tokenizer, template_for

ROLES = ("pretrained", "reasoning", "instruct")
REASONING, INSTRUCTION = 112, 150
VALIDATION, TEST = (322, 0, 150), (161, 161, 150)
LOG = logging.getLogger(__name__)


def generator(family: Family, seed: int, purpose: str) -> random.Random:
    """Random numbers for one purpose, independent of what ran before."""
    return random.Random(f"{family.name}/{seed}/{purpose}")


def train_role(family: Family, role: str, seed: int, out: Path, scale: float) -> None:
    """Train and save one of the three models."""
    tokenizer = build_tokenizer(family)
    tokenizer.chat_template = template_for(family, role)
    torch.manual_seed(seed)
    fresh = role == "pretrained"
    model = build_model(family, tokenizer) if fresh else load_model(out / "pretrained")
    stage = family.stages[role]
    stage = replace(stage, steps=max(1, round(stage.steps * scale)))
    LOG.info("%s s%d %s: %s", family.name, seed, role, stage)
    run = Run(family, stage, tokenizer, generator(family, seed, role), seed)
    train_stage(model, run, from_scratch=fresh)
    model.bfloat16()
    model.save_pretrained(out / role)
    tokenizer.save_pretrained(out / role)


def write_prompts(family: Family, seed: int, out: Path) -> None:
    """Write the prompts to judge on and the instruction samples; no model is needed for these."""
    for split, counts in (("validation", VALIDATION), ("test", TEST)):
        tasks = held_tasks(family, generator(family, seed, split), seed, split, counts)
        write_lines(out / f"{split}.jsonl", (prompt_record(task, family.surface) for task in tasks))
    rng = generator(family, seed, "instruction")
    tasks = held_tasks(family, rng, seed, "calibration", (INSTRUCTION, 0, 0))
    write_lines(
        out / "instruction.jsonl", (instruction_record(task, family.surface) for task in tasks)
    )


def verbatim_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    family: Family,
    tasks: Sequence[Task],
) -> list[Record]:
    """The model's own outputs where they are complete and right, as it generated them."""
    outputs = generate(model, tokenizer, [task.prompt for task in tasks], most=LONGEST_OUTPUT)
    wanted = [output_text(family.surface, task.problem.thinking, task.response()) for task in tasks]
    pairs = zip(tasks, outputs, wanted, strict=True)
    return [
        {"prompt": task.prompt, "output": output}
        for task, output, right in pairs
        if output.text == right
    ]


def write_reasoning(family: Family, seed: int, out: Path) -> None:
    """Write the reasoning model's own outputs on plain calibration prompts."""
    model, tokenizer = load_model(out / "reasoning"), load_tokenizer(out / "reasoning")
    tasks = held_tasks(
        family,
        generator(family, seed, "reasoning-samples"),
        seed,
        "calibration",
        (0, 0, 2 * REASONING),
    )
    records = verbatim_outputs(model, tokenizer, family, tasks)
    LOG.info("%d of %d calibration outputs are right", len(records), len(tasks))
    write_lines(out / "reasoning.jsonl", records[:REASONING])


def train_trio(
    name: str, seed: int, out: Path, roles: Sequence[str] = ROLES, scale: float = 1.0
) -> None:
    """Train the models asked for and write the trio's files."""
    family = FAMILIES[name]
    out.mkdir(parents=True, exist_ok=True)
    for role in roles:
        train_role(family, role, seed, out, scale)
    write_prompts(family, seed, out)
    if "reasoning" in roles:
        write_reasoning(family, seed, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trio", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES, help="train only these")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the training steps, for trying things out",
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_trio(options.trio, options.seed, options.out, options.roles, options.scale)


if __name__ == "__main__":
    main()
