"""Stream matching of every architecture, through stock mergekit, judged by whole models.

The judge knows nothing of how the changes were found: transformers runs the merged model and both
teachers, and the hidden states after the last layer are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, auto_class, layers_of, run_whole
from merging import merge
from test_architectures import prepared, quick_ones
from tiny import Tiny
from torch import Tensor
from transformers import AutoConfig

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.text.calibration_sets import load_instruction


def last_states(folder: Path, texts: list[tuple[int, ...]]) -> list[Tensor]:
    """Hidden states (n, d) after the last decoder layer of a whole model."""
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    found: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0])

    layers_of(model)[1][-1].register_forward_hook(keep)
    for ids in texts:
        run_whole(model, ids)
    return found


def distance(found: list[Tensor], other: list[Tensor], rows: list[list[int]]) -> float:
    return sum(
        float((a[chosen] - b[chosen]).square().sum())
        for a, b, chosen in zip(found, other, rows, strict=True)
    )


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("family", quick_ones(FAMILIES))
def test_the_merged_model_follows_both_teachers(tmp_path: Path, family: str) -> None:
    tiny: Tiny = prepared(tmp_path, family).using(
        fit="streams", stream_rank_share=1.0, max_rank=500
    )
    tiny.calibrate()
    outcome = merge(tmp_path / "merge", tiny.content(rain=None))
    assert outcome.code == 0, outcome.output
    samples = load_instruction(str(tmp_path / "instruction.jsonl"), tiny.tokenizer()).samples
    texts = [sample.input_ids for sample in samples]
    states = {
        name: last_states(folder, texts)
        for name, folder in (
            ("reasoning", tmp_path / "reasoning"),
            ("instruct", tmp_path / "instruct"),
            ("merged", outcome.folder),
        )
    }
    answers = [list(range(s.answer_start, len(s.input_ids))) for s in samples]
    thinking = [sorted({*s.thinking_positions, *s.think_positions}) for s in samples]
    near = 1.0 if family == "jetmoe" else 0.9  # of JetMoE one map of the attention alone is fitted
    apart = distance(states["reasoning"], states["instruct"], answers)
    assert distance(states["merged"], states["instruct"], answers) < near * apart
    apart = distance(states["instruct"], states["reasoning"], thinking)
    assert distance(states["merged"], states["reasoning"], thinking) < near * apart


@pytest.mark.parametrize(
    ("family", "maps"),
    [
        ("qwen3_5_text", {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}),
        pytest.param(
            "qwen3_next", {"in_proj_qkvz", "in_proj_ba", "out_proj"}, marks=pytest.mark.slow
        ),
    ],
)
def test_maps_of_linear_attention_are_fitted_and_not_projected(
    tmp_path: Path, family: str, maps: set[str]
) -> None:
    """The two fits differ here, and the pages of both say so; its convolution stays in both."""
    tiny = prepared(tmp_path, family)
    for fit, expected in (("streams", maps), ("projection", set())):
        one = tiny.using(f"{fit}.rain.safetensors", fit=fit)
        one.calibrate()
        found = [
            name for name in CalibrationFile.open(str(one.path)).tensors if ".mlp." not in name
        ]
        assert {name.split(".")[-2] for name in found if ".linear_attn." in name} == expected
        assert any(name.endswith("self_attn.q_proj.weight") for name in found)
