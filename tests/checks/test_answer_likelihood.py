"""Swapped roles of the instruct and the pretrained model, by what the models would write."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from commands import TRIO
from transformers import AutoModelForCausalLM

from rain_mergekit.calibration.samples import load_samples
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.checks.answer_likelihood import compared_texts, swapped_answers_hint
from rain_mergekit.config.merge_config import parse_config
from rain_mergekit.models.loading import LoadOptions, Trio, open_trio
from rain_mergekit.text.token_positions import InstructionTokens


def trio_of(folder: Path, instruct: str, pretrained: str) -> tuple[Trio, list[InstructionTokens]]:
    """The packaged trio in these roles, and its three shortest instruction samples."""
    lines = (TRIO / "instruction.jsonl").read_text().splitlines()
    (folder / "instruction.jsonl").write_text("\n".join(sorted(lines, key=len)[:3]))
    roles = {"instruct": instruct, "pretrained": pretrained}
    content = {
        "merge_method": "rain",
        "base_model": str(TRIO / "reasoning"),
        "models": [
            {"model": str(TRIO / name), "parameters": {"role": role}}
            for role, name in roles.items()
        ],
        "parameters": {"calibration": "c"},
        "rain": {
            "reasoning_data": str(TRIO / "reasoning.jsonl"),
            "instruction_data": str(folder / "instruction.jsonl"),
        },
    }
    config = parse_config(yaml.safe_dump(content), "c.yml")
    trio = open_trio(config, LoadOptions())
    found = load_samples(config.settings, trio).instruction
    assert found is not None
    return trio, list(found.samples)


def dense(name: str, samples: list[InstructionTokens]) -> float:
    """Mean log-likelihood of all tokens of the answers, from whole forward passes."""
    model = AutoModelForCausalLM.from_pretrained(TRIO / name, dtype=torch.float64).eval()
    logs: list[float] = []
    for sample in samples:
        ids = torch.tensor(sample.input_ids)
        with torch.no_grad():
            found = model(ids[None]).logits[0].log_softmax(-1)
        places = range(sample.answer_start + 1, len(ids))
        logs += [float(found[place - 1, ids[place]]) for place in places]
    return sum(logs) / len(logs)


def test_swapped_roles(tmp_path: Path) -> None:
    """A warning with both numbers, as whole models give them; silence where the roles are right."""
    trio, samples = trio_of(tmp_path, "pretrained", "instruct")
    layerwise = LayerwiseModel.open(trio.reasoning, trio.config, torch.float32, "cpu")
    hint = swapped_answers_hint(trio, layerwise, compared_texts(trio, samples))
    assert hint is not None
    assert "are the two roles swapped? A hint alone" in hint
    for name in ("instruct", "pretrained"):
        assert f"({dense(name, samples):.3g}" in hint
    right, _ = trio_of(tmp_path, "instruct", "pretrained")
    assert swapped_answers_hint(right, layerwise, compared_texts(right, samples)) is None


def test_nothing_to_compare(tmp_path: Path) -> None:
    """The reasoning model stands for the pretrained one, or there are no answers."""
    trio, samples = trio_of(tmp_path, "instruct", "reasoning")
    layerwise = LayerwiseModel.open(trio.reasoning, trio.config, torch.float32, "cpu")
    assert compared_texts(trio, samples) == []
    assert swapped_answers_hint(trio, layerwise, []) is None
