"""Checkpoints as people publish them: classes, prefixes, and what mergekit will not find."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from architectures import TWO_CLASSES, auto_class, family_config, layers_of
from commands import refused, run, succeed
from published import (
    CHECKPOINTS,
    DIALECTS,
    ROLES,
    check_folder,
    published,
    rename_tensors,
    unknown_tensors,
)
from tiny import read_weights
from transformers import AutoConfig

from rain_mergekit.models.empty_model import empty_model

OLD, NEW = DIALECTS


def in_both(families: Sequence[str]) -> list[object]:
    """Each family in one dialect, and in the other one where what takes long runs too."""
    return [
        pytest.param(family, dialect, marks=[] if index % 2 == number else pytest.mark.slow)
        for index, family in enumerate(families)
        for number, dialect in enumerate(DIALECTS)
    ]


# With images and for text alone; Gemma 3 with images as transformers 5 saves it: see below.
CLASSES = [
    *in_both(("qwen3_5", "qwen3_5_text", "mistral3", "gemma3_text", "qwen2_5_vl")),
    pytest.param("gemma3", OLD),
]


@pytest.mark.parametrize(("family", "dialect"), CLASSES)
def test_class_is_the_one_that_the_checkpoint_names(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """Its language model is merged, all other parts stay, and the class loads the result whole."""
    _, config = published(tmp_path, family, dialect)
    said = succeed("merge", config, tmp_path / "out")
    assert all(name in said for name in unknown_tensors())
    out = tmp_path / "out"
    (named,) = json.loads((out / "config.json").read_text())["architectures"]
    loader = auto_class(AutoConfig.from_pretrained(out))
    model, loading = loader.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == named
    assert not loading["missing_keys"]
    own, merged = read_weights(tmp_path / "reasoning"), read_weights(out)
    assert merged.keys() == own.keys()
    changed = {name for name, tensor in own.items() if not torch.equal(merged[name], tensor)}
    assert not [name for name in changed if re.search("vis(ion|ual)|embed|mtp|lm_head|norm", name)]
    maps = re.compile(r"\.[01]\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$")
    decoder = {name for name in own if maps.search(name) and "vis" not in name}
    assert changed == decoder
    assert len(decoder) == sum(maps.search(f".{n}") is not None for n, _ in _parts(model))


def _parts(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(layers_of(model)[1].named_parameters())


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", "Qwen3_5ForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
    ],
)
def test_class_of_a_config_that_has_two(family: str, named: str) -> None:
    config = family_config(family)
    config.architectures = [named]
    assert type(empty_model(config, torch.float32)).__name__ == named


@pytest.mark.parametrize("family", TWO_CLASSES)
def test_two_classes_of_one_family_do_not_mix(tmp_path: Path, family: str) -> None:
    """A text model in the trio of a model with images: said before any work."""
    text = {"qwen3_5": "qwen3_5_text", "gemma3": "gemma3_text"}[family]
    tiny, config = published(tmp_path, family, OLD)
    published(tmp_path / "text", text, OLD)
    content = yaml.safe_load(config.read_text())
    content["models"][0]["model"] = str(tmp_path / "text" / "instruct")
    config.write_text(yaml.safe_dump(content))
    message = refused(tmp_path, "calibrate", config)
    assert f"is a {text!r} model, but the reasoning model is {family!r}" in message
    assert not tiny.path.exists()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_prefix_that_one_model_alone_lacks(
    tmp_path: Path, family: str, dialect: str, role: str
) -> None:
    """mergekit looks for one set of names in all three: said from headers, before any work."""
    tiny, config = published(tmp_path, family, dialect)
    rename_tensors(tmp_path / role, {"model.": ""})
    checked = run("check", config)
    assert checked.code == 3
    for message in (checked.output, refused(tmp_path, "calibrate", config)):
        assert f"mergekit cannot merge the {role} model {tmp_path / role} by any method" in message
        assert "it looks for model." in message
    assert not tiny.path.exists()


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_prefix_that_no_model_has(tmp_path: Path, family: str, dialect: str) -> None:
    tiny, config = published(tmp_path, family, dialect)
    for role in ROLES:
        rename_tensors(tmp_path / role, {"model.": ""})
    message = refused(tmp_path, "calibrate", config)
    assert f"mergekit cannot merge the reasoning model {tmp_path / 'reasoning'} by any" in message
    assert not tiny.path.exists()


@pytest.mark.parametrize(
    ("family", "dialect"), [("gemma3", NEW), ("gpt_neox", OLD), ("gpt_neox", NEW)]
)
def test_what_mergekit_will_not_find_is_said_before_the_calibration(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """Gemma 3 with images as transformers 5 saves it, and buffers that no longer exist."""
    tiny, config = published(tmp_path, family, dialect)
    message = refused(tmp_path, "calibrate", config)
    assert f"mergekit cannot merge the reasoning model {tmp_path / 'reasoning'}" in message
    assert "by any method: it looks for" in message
    assert not tiny.path.exists()


@pytest.mark.parametrize("family", ["mistral3", "qwen2_5_vl"])
def test_model_with_images_at_lambda_zero(tmp_path: Path, family: str) -> None:
    _, config = published(tmp_path, family, OLD, **{"lambda": 0.0})
    succeed("merge", config, tmp_path / "out")
    check_folder(tmp_path / "reasoning", tmp_path / "out")
