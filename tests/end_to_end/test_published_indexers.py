"""Families whose attention picks its keys by scores of its own, which the mask goes into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import INDEXED, Reference
from commands import refused, succeed
from published import DIALECTS, check_folder, published
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# Layers of HY 4 exchange several streams; Mistral Large 4 is a model with images.
LAYERWISE = ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text")
KNOWN = [family for family in INDEXED if family in CONFIG_MAPPING]
CHECKPOINTS = [
    pytest.param(family, dialect, marks=[] if index % 2 == number else pytest.mark.slow)
    for index, family in enumerate(family for family in LAYERWISE if family in KNOWN)
    for number, dialect in enumerate(DIALECTS)
]


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_merge_is_what_the_method_says(tmp_path: Path, family: str, dialect: str) -> None:
    """Against the formula in float64 on features of transformers' own eager attention.

    12 of up to some 80 keys are kept, so a mask that is not respected shows in every feature.
    """
    tiny, config = published(tmp_path, family, dialect)
    reference = Reference(tiny.using(rank_by="energy", rank_share=0.9, reading_share=0.0))
    tiny = reference.tiny
    tiny.config()
    config = tiny.path.with_suffix(".yml")
    succeed("merge", config, tmp_path / "out")
    expected, base = reference.merged({}), reference.reasoning_model.state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    found = merged.state_dict()
    weights = {name for name, _ in reference.keys}
    assert any("indexer" in name for name in weights)
    for name, value in expected.items():
        if name in weights:
            change = (value - base[name]).norm()
            assert (found[name] - value).norm() < 1e-3 * change, name
        else:
            assert torch.equal(found[name], base[name]), name


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_streams_and_lambda_zero(tmp_path: Path, family: str, dialect: str) -> None:
    """The other fit runs these layers too; at lambda 0 the folder is the reasoning model's."""
    tiny, _ = published(tmp_path, family, dialect)
    tiny = tiny.using(fit="streams")
    tiny.config(parameters={"calibration": str(tiny.path), "lambda": 0.0})
    succeed("merge", tiny.path.with_suffix(".yml"), tmp_path / "out")
    check_folder(tmp_path / "reasoning", tmp_path / "out")


@pytest.mark.parametrize("family", [family for family in ("hy_v4",) if family in KNOWN])
def test_layers_with_several_streams_are_refused(tmp_path: Path, family: str) -> None:
    tiny, config = published(tmp_path, family)
    message = refused(tmp_path, "calibrate", config)
    assert "its layers exchange something other than one hidden state per token" in message
    assert json.loads((tmp_path / "reasoning" / "config.json").read_text())["torch_dtype"]
    assert not tiny.path.exists()
