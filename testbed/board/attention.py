"""Instruction-attention score per layer, before and after a merge (the paper's figure 6).

Teacher-forced on right answers to test prompts with a constraint: how much attention the answer
that follows the constraint pays to it (alignment), and how much the rest of the answer does
(leakage), mean over heads and prompts.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from mergekit.common import ModelReference
from transformers import AutoConfig

from rain_mergekit.capture.attention_statistics import AttentionStatistics
from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.models.attention import observe_attention
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.text.calibration_sets import load_instruction
from rain_mergekit.text.token_positions import InstructionTokens
from testbed.models.loading import load_tokenizer
from testbed.puzzles.families import FAMILIES
from testbed.puzzles.records import instruction_record, write_lines
from testbed.puzzles.samples import held_tasks
from testbed.train import generator

PROMPTS = 70
Scores = dict[str, list[float]]


def has_family(trio: Path) -> bool:
    """Whether the folder's name says how to draw prompts of this trio, like `qwen-s0`."""
    name, _, seed = trio.name.rpartition("-s")
    return name in FAMILIES and seed.isdigit()


def held_samples(trio: Path) -> Sequence[InstructionTokens]:
    """Answers to prompts of the test split, drawn for this purpose alone."""
    name, _, seed = trio.name.rpartition("-s")
    family = FAMILIES[name]
    rng = generator(family, int(seed), "attention")
    tasks = held_tasks(family, rng, int(seed), "test", (PROMPTS, 0, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.jsonl")
        write_lines(path, (instruction_record(task, family.surface) for task in tasks))
        return load_instruction(path, load_tokenizer(trio / "reasoning")).samples


def attention_scores(model: Path, samples: Sequence[InstructionTokens]) -> Scores:
    """Mean alignment and leakage of each layer."""
    checkpoint = Checkpoint.open(ModelReference.model_validate({"model": {"path": str(model)}}))
    shell = LayerwiseModel.open(checkpoint, AutoConfig.from_pretrained(model), torch.float32, "cpu")
    order = sorted(samples, key=lambda sample: -len(sample.input_ids))
    recorded = list(shell.record([sample.input_ids for sample in order]))
    hidden = [embedded for embedded, _ in recorded]
    found: Scores = {"alignment": [], "leakage": []}
    for index in range(len(shell.layers)):
        totals = torch.zeros(2, dtype=torch.float64)
        with shell.layer(index) as layer:
            for number, sample in enumerate(order):
                probe = AttentionStatistics(sample, leakage_from_thinking=False)
                with observe_attention(probe):
                    hidden[number] = run_layer(layer, hidden[number], recorded[number][1][index])
                if probe.alignment is None or probe.leakage is None:
                    raise RuntimeError("the layer computed no attention that can be observed")
                totals += torch.stack([probe.alignment.mean(), probe.leakage.mean()])
        for name, total in zip(found, totals.tolist(), strict=True):
            found[name].append(round(total / len(order), 4))
    return found
