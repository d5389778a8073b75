"""What stock mergekit leaves out of a merge is known before the work starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference
from tiny import model_config
from transformers import AutoConfig, AutoModelForCausalLM

from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.merge_names import listed_names, lost_tensors, lost_warning, merge_names


def _lost(family: str, folder: Path) -> tuple[str, ...]:
    AutoModelForCausalLM.from_config(model_config(family)).save_pretrained(folder)
    checkpoint = Checkpoint.open(ModelReference.model_validate(str(folder)))
    layerwise = LayerwiseModel.open(checkpoint, checkpoint.reference.config(), torch.float32, "cpu")
    names = merge_names(checkpoint.reference.config(), layerwise.tensors)
    return lost_tensors(layerwise.tensors, names)


def test_models_that_mergekit_knows_in_full_lose_nothing(tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3", "llama", "mistral"):
        assert _lost(family, tmp_path / family) == ()


def test_biases_that_mergekit_does_not_list_are_named(tmp_path: Path) -> None:
    lost = _lost("llama-bias", tmp_path)
    biases = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in lost} == set(biases)
    assert all(name.endswith(".bias") for name in lost)
    assert f"{len(lost)} tensors" in lost_warning(lost)
    assert lost[0] in lost_warning(lost)


def test_an_architecture_that_mergekit_itself_cannot_read_is_named() -> None:
    """transformers 5 keeps the number of layers where mergekit's table does not look for it."""
    config = AutoConfig.for_model("qwen2_vl")
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    with pytest.raises(RainError, match="cannot merge the architecture 'qwen2_vl' by any method"):
        listed_names(config)
