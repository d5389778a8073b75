"""`mergekit-rain dequantize`: published formats become plain models that calibrate and merge."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import ROLES, Workplace, refused, run, succeed
from mergekit.common import ModelReference
from merging import merge as stock_merge
from quantised import (
    BLOCK,
    FP8_SECTION,
    Maker,
    compressed,
    fp8_blocks,
    fp8_rows,
    integers,
    mxfp4,
    quantise,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rain_mergekit.dequantize.checkpoint_writer import write_weights
from rain_mergekit.dequantize.recipes import Recipe, recipes
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.published_format import published_format

INT4 = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
ROWS = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
FORMATS: Mapping[str, tuple[Mapping[str, Any], Maker]] = {
    "reasoning": (FP8_SECTION, fp8_blocks),
    "instruct": (INT4, integers(4, 16)),
    "pretrained": (ROWS, fp8_rows),
}
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_quantised_trio_is_dequantised_and_merged(place: Workplace) -> None:
    """Each role in another format; `auto` names the command."""
    before = {role: quantise(place.model(role), *FORMATS[role]) for role in ROLES}
    merged = place.folder / "merged"
    pair = [place.model("reasoning"), place.model("instruct")]
    auto = refused(place.folder, "auto", *pair, "-o", place.folder / "auto", "-y")
    assert f"`mergekit-rain dequantize {pair[0]} {pair[0]}-bf16`" in auto
    for role in ROLES:
        plain = place.folder / f"{role}-bf16"
        assert f"Next: name {plain} where" in succeed("dequantize", place.model(role), plain)
        weights = load_file(plain / "model.safetensors")
        assert set(weights) == set(before[role])
        for name, tensor in before[role].items():
            if not name.endswith("_proj.weight"):
                assert torch.equal(weights[name], tensor)
                continue
            assert weights[name].dtype == torch.bfloat16
            change = (weights[name].double() - tensor.double()).norm() / tensor.double().norm()
            assert 0 < change < 0.15
    text = place.yaml.read_text()
    for role in ROLES:
        text = re.sub(rf"(?m){re.escape(str(place.model(role)))}$", r"\g<0>-bf16", text)
    place.yaml.write_text(text)
    assert yaml.safe_load(text)["base_model"].endswith("reasoning-bf16")
    succeed("merge", place.yaml, merged)
    names = set(load_file(merged / "model.safetensors"))
    assert names == set(before["reasoning"])
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


def test_stock_merge_names_the_command(place: Workplace) -> None:
    """mergekit-yaml with a calibration that is there, and a model that has become quantised."""
    succeed("calibrate", place.yaml)
    quantise(place.model("pretrained"), ROWS, fp8_rows)
    content = {key: value for key, value in place.config.items() if key != "rain"}
    message = stock_merge(place.folder / "stock", content).error()
    folder = place.model("pretrained")
    assert f"run `mergekit-rain dequantize {folder} {folder}-bf16`" in message


def test_what_stands_beside_the_weights(place: Workplace) -> None:
    source = place.model("reasoning")
    (source / "README.md").write_text("# A model\n", encoding="utf-8")
    config = json.loads((source / "config.json").read_text())
    quantise(source, FP8_SECTION, fp8_blocks)
    out = place.folder / "new" / "plain"
    outcome = run("dequantize", source, out, "--json")
    assert outcome.code == 0
    said = json.loads(outcome.stdout)
    assert said["from"] == f"FP8 with scales of blocks of {BLOCK[0]} x {BLOCK[1]}"
    assert said["dequantised"] == 7
    for path in source.iterdir():
        if path.name not in ("config.json", "README.md", "model.safetensors"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    found = json.loads((out / "config.json").read_text())
    types = {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
    assert found == {**config, **types}
    assert list(found) == list(config)
    card = (out / "README.md").read_text()
    assert card.startswith("# A model\n\nThe weights in this folder were dequantised from FP8")
    assert sorted(p.name for p in (place.folder / "new").iterdir()) == ["plain"]


def test_gpt_oss_is_as_transformers_dequantises_it(tmp_path: Path) -> None:
    """Names and shapes are those of the plain model; its weights load without a word."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    source, out = tmp_path / "published", tmp_path / "plain"
    model.save_pretrained(source)
    before = quantise(source, {"quant_method": "mxfp4"}, mxfp4, ending="experts.gate_up_proj")
    quantise(source, {"quant_method": "mxfp4"}, mxfp4, ending="experts.down_proj")
    stored = load_file(source / "model.safetensors")
    succeed("dequantize", source, out)
    found = load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in before.items()}
    for name in before:
        if name in stored:
            assert torch.equal(found[name], stored[name])
        else:
            parts = (stored[f"{name}_blocks"], stored[f"{name}_scales"])
            assert torch.equal(found[name], convert_moe_packed_tensors(*parts))
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16


# What is broken -> how, and what the refusal says.
def without_scale(weights: dict[str, Tensor]) -> str:
    del weights[f"{WEIGHT}_scale_inv"]
    return f"{WEIGHT} has no scale"


def wrong_scale(weights: dict[str, Tensor]) -> str:
    scale = weights[f"{WEIGHT}_scale_inv"]
    weights[f"{WEIGHT}_scale_inv"] = scale[:-1].contiguous()
    return f"{WEIGHT}_scale_inv is [{len(scale) - 1}, {scale.shape[1]}], expected [{len(scale)}, "


def integer_scale(weights: dict[str, Tensor]) -> str:
    weights[f"{WEIGHT}_scale_inv"] = weights[f"{WEIGHT}_scale_inv"].to(torch.int32)
    return f"{WEIGHT}_scale_inv is stored as I32, expected F32 or BF16 or F16"


def left_over_scale(weights: dict[str, Tensor]) -> str:
    weights[WEIGHT] = weights[WEIGHT].to(torch.bfloat16)
    return f"{WEIGHT}_scale_inv belongs to no quantised weight"


def of_another_format(weights: dict[str, Tensor]) -> str:
    weights["model.layers.0.mlp.other"] = torch.zeros(4, 4, dtype=torch.int8)
    return "model.layers.0.mlp.other is stored as I8 [4, 4], which is not FP8"


def nothing_quantised(weights: dict[str, Tensor]) -> str:
    for name in list(weights):
        if name.endswith("_scale_inv"):
            del weights[name]
        elif weights[name].dtype == torch.float8_e4m3fn:
            weights[name] = weights[name].to(torch.bfloat16)
    return "no tensor is stored as FP8"


def not_a_number(weights: dict[str, Tensor]) -> str:
    weights[f"{WEIGHT}_scale_inv"][0, 0] = torch.nan
    return f"tensor {WEIGHT} contains NaN or Inf once it is dequantised"


@pytest.mark.parametrize(
    "change",
    [
        without_scale,
        wrong_scale,
        integer_scale,
        left_over_scale,
        of_another_format,
        nothing_quantised,
        not_a_number,
    ],
)
def test_broken_checkpoints(place: Workplace, change: Callable[[dict[str, Tensor]], str]) -> None:
    quantise(place.model("reasoning"), FP8_SECTION, fp8_blocks)
    expected: list[str] = []
    place.change_weights("reasoning", lambda weights: expected.append(change(weights)))
    out = place.folder / "plain"
    assert expected[0] in refused(place.folder, "dequantize", place.model("reasoning"), out)


@pytest.mark.parametrize(
    ("ending", "change", "says"),
    [
        ("_shape", lambda t: t * 2, "does not hold"),
        ("_scale", lambda t: t[:, 1:].contiguous(), "_scale is ["),
        ("_shape", None, "_shape is missing"),
        ("_zero_point", None, "_zero_point is missing"),
        ("_g_idx", lambda t: t - 1, "names groups that are not among the"),
    ],
)
def test_broken_integers(
    place: Workplace, ending: str, change: Callable[[Tensor], Tensor] | None, says: str
) -> None:
    section = json.loads(json.dumps(INT4))
    section["config_groups"]["group_0"]["weights"]["symmetric"] = False
    columns = load_file(place.model("reasoning") / "model.safetensors")[WEIGHT].shape[1]
    order = torch.arange(columns) // 16
    make = integers(4, 16, zero_points=True, order=order)
    quantise(place.model("reasoning"), section, make, ending="up_proj.weight")

    def spoil(weights: dict[str, Tensor]) -> None:
        part = weights.pop(WEIGHT + ending)
        if change is not None:
            weights[WEIGHT + ending] = change(part)

    place.change_weights("reasoning", spoil)
    out = place.folder / "plain"
    assert says in refused(place.folder, "dequantize", place.model("reasoning"), out)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ, which is not read here: take the model as"),
        ({"quant_method": "awq"}, "AWQ, which"),
        ({"bits": 8}, "unknown, which is not read here"),
        ({"quant_method": "hqq"}, "hqq, which is not read here"),
        (compressed("nvfp4-pack-quantized", num_bits=4), "compressed-tensors nvfp4-pack-quantized"),
        (compressed("pack-quantized", num_bits=3, type="int"), "pack-quantized of 3 bits"),
        ({"quant_method": "fp8", "weight_block_size": [0, "x"]}, "expected two whole numbers"),
    ],
)
def test_other_formats_are_named(place: Workplace, section: Mapping[str, Any], says: str) -> None:
    """By the command, and by the merge, which has another format than it can read before it."""
    quantise(place.model("instruct"), section, fp8_blocks)
    out = place.folder / "out"
    assert says in refused(place.folder, "dequantize", place.model("instruct"), out)
    assert says in refused(place.folder, "merge", place.yaml, out)


def test_nothing_is_overwritten(place: Workplace) -> None:
    source, out = place.model("reasoning"), place.folder / "out"
    assert "names no quantisation" in refused(place.folder, "dequantize", source, out)
    out.mkdir()
    assert "exists, and is not overwritten" in refused(place.folder, "dequantize", source, out)
    name = f"{source}+{source}"
    assert "a model with an adapter" in refused(place.folder, "dequantize", name, out / "new")


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """However many there are: what was read before is gone, and so is each expert's result."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {f"layers.{i}.experts_proj": torch.randn(3, 32, 40) for i in range(4)}
    stored = {key: t for name, w in weights.items() for key, t in mxfp4(name, w).items()}
    save_file(stored, folder / "model.safetensors")
    checkpoint = Checkpoint.open(ModelReference.parse(str(folder)))
    found = published_format({"quantization_config": {"quant_method": "mxfp4"}})
    assert found is not None
    plan = recipes(checkpoint, found)
    read_now, made_now = weakref.WeakSet[Tensor](), weakref.WeakSet[Tensor]()
    most = {"read": 0, "made": 0}

    def read(name: str) -> Tensor:
        tensor = checkpoint.get(name)
        read_now.add(tensor)
        most["read"] = max(most["read"], len(read_now))
        return tensor

    def counted(formula: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        made = formula(*parts)
        made_now.add(made)
        most["made"] = max(most["made"], len(made_now))
        return made

    def watched(one: Recipe) -> Recipe:
        assert one.formula is not None
        return replace(one, formula=partial(counted, one.formula))

    out = tmp_path / "out"
    out.mkdir()
    size = 3 * 32 * 40 * 2
    files = write_weights(out, [*map(watched, plan)], read, {}, shard_bytes=2 * size)
    assert files == 2
    assert most == {"read": 2, "made": 1}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(weights)
    for name, weight in weights.items():
        tensor = load_file(out / index[name])[name]
        assert (tensor.float() - weight).norm() < 0.2 * weight.norm()
