"""Every architecture through calibration and stock mergekit, against a dense float64 reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architecture_table
import pytest
import torch
from architectures import (
    FAMILIES,
    LEFT_ALONE,
    Reference,
    auto_class,
    layer_means,
    layers_of,
    make,
    recorded_scales,
    recorded_tokens,
    store_as_modules,
)
from click.testing import CliRunner
from merging import merge
from safetensors.torch import load_file, save_file
from tiny import Tiny, read_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.cli import cli
from rain_mergekit.models import experts

# Attention that only the family itself can compute: nobody sees its heads.
CLOSED = {"falcon", "bloom", "mamba"}
# Layers without attention, of the two.
HALF = {
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "lfm2",
    "jamba",
    "bamba",
}
# Not every layer has experts, and mergekit has no table: it finds them only under their own names.
NEEDS_FUSED = {"deepseek_v2", "deepseek_v3", "jamba"}
# What mergekit's tables require although transformers no longer writes it.
BUFFERS = {"gpt_neox": ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")}


def prepared(folder: Path, family: str) -> Tiny:
    tiny = make(folder, family)
    coefficients = "off" if family in CLOSED else "closed_form"
    for role in ("pretrained", "instruct", "reasoning"):
        if family in NEEDS_FUSED:
            store_as_modules(folder / role)
        if family in BUFFERS:
            add_buffers(folder / role, BUFFERS[family])
    return tiny.using(
        projection="oblique",
        rank_by="energy",
        rank_share=0.9,
        lm_head="unseen" if tied(folder) else "all",
        coefficients=coefficients,
        alpha_min=0.0,
        alpha_max=10.0,
        reading_share=0.0,  # of this the reference knows nothing; it has a test of its own
    )


def tied(folder: Path) -> bool:
    """Whether the head is the embedding, in the model itself."""
    config = AutoConfig.from_pretrained(folder / "reasoning")
    model = auto_class(config).from_pretrained(folder / "reasoning")
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def add_buffers(folder: Path, names: tuple[str, ...]) -> None:
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name in names:
            weights[f"gpt_neox.layers.{layer}.{name}"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# One of each kind: with windows, transposed, experts as modules and in one tensor, layers without
# attention, one state space, a part with eyes. The others take minutes.
QUICK = {"gemma2", "gpt2", "mixtral", "deepseek_v3", "qwen3_next", "falcon_h1", "qwen2_5_vl"}


def quick_ones(families: Iterable[str]) -> list[Any]:
    """The families as parameters, of which all but `QUICK` are marked as slow."""
    return [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in families
    ]


# Llama 4's vision tower keeps complex rotary tables, and the reference is converted to float64.
@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("family", quick_ones(FAMILIES))
def test_the_merge_is_what_the_method_says(tmp_path: Path, family: str) -> None:
    tiny = prepared(tmp_path, family)
    summary = tiny.calibrate()
    outcome = merge(tmp_path / "merge", tiny.content(rain=None))
    assert outcome.code == 0, outcome.output
    reference = Reference(tiny)
    expected = reference.merged(scales(reference, tiny.path))
    loader = auto_class(reference.reasoning_model.config)
    merged = loader.from_pretrained(outcome.folder, dtype=torch.float64).state_dict()
    base = reference.reasoning_model.state_dict()
    weights = {name for name, _ in reference.keys}
    for name, value in expected.items():
        if name in weights or value is expected[reference.head]:
            change = (value - base[name]).norm()
            assert change > 0, name
            assert (merged[name] - value).norm() < 1e-3 * change, name
        else:
            assert torch.equal(merged[name], base[name]), name
    assert_untouched(reference, weights)
    idle = [line for line in summary.warnings if "no attention" in line]
    assert len(idle) == (family in HALF)


def scales(reference: Reference, path: Path) -> dict[str, Any]:
    """Of modules with heads as recorded (test_modules shows that they are right), else the mean."""
    recorded = {_tail(name): scale for name, scale in recorded_scales(path).items()}
    means = {_tail(name): mean for name, mean in layer_means(path).items()}
    result: dict[str, Any] = {reference.head: (recorded_tokens(path), None)}
    for name, _ in reference.keys:
        layer = next((one for one in means if _tail(name).startswith(f"{one}.")), None)
        if layer is None:
            continue
        inside = "self_attn" in name or ".attn." in name or ".attention." in name
        rows = reference.deltas[name].shape[-1 if reference.transposed(name) else -2]
        mean: Tensor = torch.full((rows,), means[layer], dtype=torch.float64)
        result[name] = recorded[_tail(name)] if inside else (mean, None)
    return result


def _tail(name: str) -> str:
    """From the layer's number on: what comes before, checkpoints and modules may call otherwise."""
    return re.sub(r"^.*?\.(?=\d+(\.|$))", "", name)


def assert_untouched(reference: Reference, weights: set[str]) -> None:
    """Nothing that multiplies features is left out; the rest is of these kinds."""
    prefix, layers = layers_of(reference.reasoning_model)
    for name, value in layers.named_parameters():
        whole = f"{prefix}.{name}"
        if value.dim() > 1 and whole not in weights and not LEFT_ALONE.search(whole):
            kinds = ("conv1d.weight", "conv.conv.weight", "A_log", "norm.weight", "_bias")
            # JetMoE sorts the tokens by expert itself, so that rows belong to nobody we know.
            kinds += ("input_linear.weight", "output_linear.weight")
            assert name.endswith(kinds), name


@pytest.mark.parametrize("family", quick_ones(["mixtral", "qwen3_moe", "glm4_moe"]))
def test_both_layouts_of_experts_give_the_same_merge(tmp_path: Path, family: str) -> None:
    """One tensor an expert in all three, then the reasoning model with one tensor for all."""
    results = []
    tiny = make(tmp_path, family).using(coefficients="off", rank_by="energy", rank_share=0.9)
    assert any("experts.3." in name for name in read_weights(tmp_path / "reasoning"))
    for attempt in ("single", "mixed"):
        if attempt == "mixed":
            store_as_modules(tmp_path / "reasoning")
        tiny.calibrate()
        outcome = merge(tmp_path / attempt, tiny.content(rain=None))
        results.append(outcome.weights())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# What gives attention its queries, keys and values, by who calls it what.
READING = {
    "mixtral": "self_attn.[qkv]_proj",
    "phi3": "self_attn.qkv_proj",
    "gpt2": "attn.c_attn",
    "gpt_neox": "attention.query_key_value",
    "deepseek_v3": "self_attn.(q_a_proj|kv_a_proj_with_mqa|q_b_proj|kv_b_proj)",
    "qwen3_next": "self_attn.[qkv]_proj",
}


@pytest.mark.parametrize("family", quick_ones(READING))
def test_what_attention_reads_is_protected_to_its_share(tmp_path: Path, family: str) -> None:
    """Of a site's response to prompts, and to responses, at most a tenth is left by the merge."""
    bare = prepared(tmp_path, family)
    left: dict[float, list[float]] = {}
    for share in (0.0, 0.9):
        tiny = bare.using(
            f"{share}.safetensors",
            projection="orthogonal",
            coefficients="off",
            reading_share=share,
            rank_share=0.5,
        )
        tiny.calibrate()
        outcome = merge(tmp_path / str(share), tiny.content(rain=None))
        merged = AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.float64)
        left[share] = shares_left(Reference(tiny), merged.state_dict(), READING[family], share > 0)
    assert max(left[0.9]) < 0.1 + 1e-6
    assert max(left[0.0]) > 0.1


def shares_left(
    reference: Reference, merged: dict[str, Any], pattern: str, responses: bool
) -> list[float]:
    base = reference.reasoning_model.state_dict()
    sites: dict[str, list[str]] = {}
    for name, _ in reference.keys:
        if re.search(f"{pattern}(.weight)?$", name):
            sites.setdefault(re.sub(r"\.[a-z_]+\.weight$", "", name), []).append(name)
    assert sites
    found = []
    for names in sites.values():
        for place in ("prompt_positions", *(["response_positions"] if responses else [])):
            before = after = 0.0
            for name in names:
                rows = reference.rows((name, None), "reasoning", place)
                delta, change = reference.deltas[name], merged[name] - base[name]
                if reference.transposed(name):
                    delta, change = delta.mT, change.mT
                before += float((rows @ delta.mT).square().sum())
                after += float((rows @ change.mT).square().sum())
            found.append(after / before)
    return found


def test_an_expert_that_no_protected_token_reaches_is_unconstrained_and_said(
    tmp_path: Path,
) -> None:
    """The router's correction bias, a buffer, keeps expert 3 from ever being taken."""
    tiny = make(tmp_path, "glm4_moe").using(
        coefficients="off", projection="orthogonal", rank_by="energy", rank_share=0.9
    )
    prefix = "model.layers.1.mlp"
    for role in ("pretrained", "instruct", "reasoning"):
        weights = load_file(tmp_path / role / "model.safetensors")
        weights[f"{prefix}.gate.e_score_correction_bias"][3] = -10.0
        save_file(weights, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
    summary = tiny.calibrate()
    assert any("routed to 1 of the experts" in line for line in summary.warnings)
    plan = CalibrationFile.open(str(tiny.path))
    site = plan.tensors[f"{prefix}.experts.down_proj"].site
    assert isinstance(site, tuple)
    assert [plan.sites[one].rank > 0 for one in site] == [True, True, True, False]
    outcome = merge(tmp_path / "merge", tiny.content(rain=None))
    merged = outcome.weights()[f"{prefix}.experts.down_proj"][3]
    part = f"{prefix}.experts.3.down_proj.weight"
    stored = {role: tiny.weights(role)[part] for role in ("reasoning", "instruct", "pretrained")}
    expected = stored["reasoning"] + stored["instruct"] - stored["pretrained"]
    assert torch.allclose(merged, expected, atol=1e-6)


def test_experts_that_mergekit_leaves_out_are_said(tmp_path: Path) -> None:
    """Dense layers first and no table in mergekit: the experts of the others are not found."""
    summary = make(tmp_path, "deepseek_v3").using(coefficients="off").calibrate()
    text = next(line for line in summary.warnings if "leaves out" in line)
    assert "12 tensors" in text
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in text


def test_the_file_names_the_heads_of_each_layer(tmp_path: Path) -> None:
    tiny = prepared(tmp_path, "deepseek_v3")
    tiny.calibrate()
    layers = CalibrationFile.open(str(tiny.path)).header["layers"]
    assert [one["heads"] for one in layers] == [
        {
            "module": "self_attn",
            "heads": 4,
            "kv_heads": 4,
            "width": 12,
            "value_width": 8,
            "model_type": "deepseek_v3",
        }
    ] * 2
    json.dumps(layers)


@pytest.mark.parametrize("family", ["deepseek_v3", "jamba"])
def test_our_merge_command_adds_what_mergekit_leaves_out(tmp_path: Path, family: str) -> None:
    tiny = make(tmp_path, family).using(
        coefficients="off", projection="oblique", rank_by="energy", rank_share=0.9
    )
    tiny.config()
    yaml = str(tiny.path.with_suffix(".yml"))
    done = CliRunner().invoke(cli, ["merge", yaml, str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 0, done.output
    reference = Reference(tiny)
    expected = reference.merged({})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    base = reference.reasoning_model.state_dict()
    experts = [name for name in expected if ".experts." in name and "shared" not in name]
    assert len(experts) == 2
    for name in experts:
        value, change = expected[name], (expected[name] - base[name]).norm()
        assert (merged.state_dict()[name] - value).norm() < 1e-3 * change


def test_what_mergekit_leaves_out_takes_one_lambda(tmp_path: Path) -> None:
    tiny = make(tmp_path, "deepseek_v3").using(coefficients="off")
    yaml = tiny.path.with_suffix(".yml")
    tiny.config(parameters={"calibration": str(tiny.path), "lambda": [0.5, 1.0]})
    done = CliRunner().invoke(cli, ["merge", str(yaml), str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 1
    assert f"{yaml}: lambda is [0.5, 1.0], not one number: mergekit leaves out" in done.output
    assert not tiny.path.exists()  # said before the calibration


@pytest.mark.slow
def test_the_page_shows_what_the_package_finds() -> None:
    text = architecture_table.PAGE.read_text(encoding="utf-8")
    assert text == architecture_table.page(text), "run: python tests/support/architecture_table.py"


def test_attention_of_no_known_layout_is_scaled_by_layer_and_said(tmp_path: Path) -> None:
    tiny = prepared(tmp_path, "jetmoe")
    summary = tiny.calibrate()
    text = next(line for line in summary.warnings if "no known layout" in line)
    assert "2 weights" in text
    assert "model.layers.0.self_attention.kv_proj.weight" in text
    rows, cols = recorded_scales(tiny.path)["model.layers.0.self_attention.kv_proj.weight"]
    assert cols is None
    assert rows is not None
    mean = layer_means(tiny.path)["model.layers.0"]
    assert torch.allclose(rows, torch.full_like(rows, mean))


def test_experts_of_a_transformers_that_knows_no_norm_after_them() -> None:
    """As before 5.20; two tokens, two experts, by hand."""
    weights = {"up_proj": torch.randn(2, 3, 4), "down_proj": torch.randn(2, 4, 3)}
    about = {"has_gate": False, "has_bias": False, "is_transposed": True, "num_experts": 2}
    module = SimpleNamespace(act_fn=torch.relu, **about, **weights)
    hidden, share = torch.randn(2, 3), torch.tensor([[0.5], [2.0]])
    found = experts._experts(module, hidden, torch.tensor([[1], [0]]), share)
    for token, expert in enumerate((1, 0)):
        inner = torch.relu(hidden[token] @ weights["up_proj"][expert])
        expected = share[token] * (inner @ weights["down_proj"][expert])
        torch.testing.assert_close(found[token], expected)
