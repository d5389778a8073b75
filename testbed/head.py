"""The map to the vocabulary, which rain leaves alone, added to a calibration and projected."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rain_mergekit.data import InstructionTokens, ReasoningTokens, load_instruction, load_reasoning
from rain_mergekit.rows import FeatureRows
from rain_mergekit.settings import RainSettings
from rain_mergekit.solve import solve_site
from testbed.models import load_model, load_tokenizer

SITE = "lm_head"
EMBEDDING = "model.embed_tokens.weight"
Rows = list[Tensor]


def add_head(header: dict[str, Any], tensors: dict[str, Tensor], trio: Path) -> None:
    """One site and one tensor more, by the settings of the calibration.

    Where the head is the embedding, only tokens that responses of the instruction set write and the
    reasoning set never has: a change of the embedding would be a change of what the thinking reads.
    """
    settings = RainSettings.model_validate(header["settings"])
    reasoning, instruction = _samples(trio)
    weights = {role: load_file(trio / role / "model.safetensors") for role in header["models"]}
    name = f"{SITE}.weight" if f"{SITE}.weight" in weights["reasoning"] else EMBEDDING
    delta = weights["instruct"][name].float() - weights["pretrained"][name].float()
    think, content, responses = _inputs(trio, reasoning, instruction)
    groups = FeatureRows(
        (think, content), (len(think) ** -0.5, (settings.protect_thinking / len(content)) ** 0.5)
    )
    found = solve_site(SITE, groups, len(think), responses, [delta], settings, 96)
    site = {"width": found.width, "rank": found.rank, "spectrum": None, "damping": None}
    site |= {"kept_energy": found.kept_energy, "positions": found.positions, "capped": found.capped}
    header["sites"][SITE] = {**site, "u": f"basis.{SITE}.u", "v": f"basis.{SITE}.v"}
    tensors[f"basis.{SITE}.u"] = found.factors.u.float().contiguous()
    tensors[f"basis.{SITE}.v"] = found.factors.v.float().contiguous()
    plan = {"site": SITE, "shape": list(delta.shape), "input_axis": -1, "rows": None, "cols": None}
    if name == EMBEDDING:
        plan["rows"] = f"rows.{SITE}"
        tensors[plan["rows"]] = _written_by_instructions(len(delta), reasoning, instruction)
    header["tensors"][name] = plan


def _samples(trio: Path) -> tuple[list[ReasoningTokens], list[InstructionTokens]]:
    tokenizer = load_tokenizer(trio / "reasoning")
    reasoning = load_reasoning(trio / "reasoning.jsonl", tokenizer, keep_response=True)
    instruction = load_instruction(str(trio / "instruction.jsonl"), tokenizer)
    return list(reasoning.samples), list(instruction.samples)


@torch.inference_mode()
def _inputs(
    trio: Path, reasoning: Iterable[ReasoningTokens], instruction: Iterable[InstructionTokens]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head receives at think, content and response positions, rows x d."""
    model: Any = load_model(trio / "reasoning").get_decoder()

    def states(sample: ReasoningTokens | InstructionTokens) -> Tensor:
        hidden: Tensor = model(torch.tensor([sample.input_ids])).last_hidden_state[0]
        return hidden

    think: Rows = []
    content: Rows = []
    for sample in reasoning:
        found = states(sample)
        think.append(found[list(sample.think_positions)])
        content.append(found[list(sample.content_positions)])
    responses = [states(sample)[list(sample.response_positions)] for sample in instruction]
    return torch.cat(think), torch.cat(content), torch.cat(responses)


def _written_by_instructions(
    vocabulary: int, reasoning: Iterable[ReasoningTokens], instruction: Iterable[InstructionTokens]
) -> Tensor:
    seen = {token for sample in reasoning for token in sample.input_ids}
    written = {sample.input_ids[i] for sample in instruction for i in sample.response_positions}
    mask = torch.zeros(vocabulary)
    mask[sorted(written - seen)] = 1.0
    return mask
