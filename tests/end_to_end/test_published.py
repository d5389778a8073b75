"""Checkpoints as people publish them: the result is the reasoning model's folder, other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_table
import pytest
import torch
import yaml
from architectures import make
from commands import refused, run, succeed
from merging import merge
from published import CHECKPOINTS, ROLES, add_tensors, check_folder, published
from tiny import Tiny, read_weights
from transformers import AutoConfig, AutoModelForImageTextToText

from rain_mergekit.models.config_file import read_config_file
from rain_mergekit.models.empty_model import empty_model


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_result_is_the_reasoning_folder_at_lambda_zero(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """By our command, and by mergekit-yaml with `finish` after it."""
    tiny, config = published(tmp_path, family, dialect, **{"lambda": 0.0})
    said = succeed("merge", config, tmp_path / "ours")
    assert "mtp.fc.weight" in said
    check_folder(tmp_path / "reasoning", tmp_path / "ours")
    content = yaml.safe_load(config.read_text())
    out = merge(tmp_path / "stock", content).folder
    assert read_weights(out).keys() != read_weights(tmp_path / "reasoning").keys()
    assert "Finished" in succeed("finish", out)
    check_folder(tmp_path / "reasoning", out)
    assert "Nothing to change" in succeed("finish", out)
    assert tiny.path.exists()


def test_merged_experts_are_stored_as_in_the_checkpoint(tmp_path: Path) -> None:
    """One tensor for each expert, merged: the numbers are those of transformers' module."""
    tiny, config = published(tmp_path, "deepseek_v3")
    succeed("merge", config, tmp_path / "out")
    own, merged = read_weights(tmp_path / "reasoning"), read_weights(tmp_path / "out")
    assert merged.keys() == own.keys()
    names = [name for name in own if ".experts." in name and "shared" not in name]
    instruct, pretrained = tiny.weights("instruct"), tiny.weights("pretrained")
    assert len(names) == 12
    for name in names:
        change, task = merged[name] - own[name], instruct[name] - pretrained[name]
        assert change.norm() > 0
        # a projection of the task vector: of it, and of no other expert's, much is there
        assert (change * task).sum() > 0.1 * task.square().sum(), name


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_pickled_result_takes_the_place_of_safetensors(
    tmp_path: Path, family: str, dialect: str
) -> None:
    """Loaders prefer safetensors: an earlier merge's must not stay. Additions are pickled too."""
    _, config = published(tmp_path, family, dialect)
    succeed("merge", config, tmp_path / "out")
    content = yaml.safe_load(config.read_text())
    content["parameters"]["lambda"] = 0.0
    config.write_text(yaml.safe_dump(content))
    succeed("merge", config, tmp_path / "out", "--no-safe-serialization")
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    found: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "out").glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    own = read_weights(tmp_path / "reasoning")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"].keys() == own.keys()
    succeed("merge", config, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_experts_that_are_stored_with_their_axes_exchanged(tmp_path: Path) -> None:
    """Qwen3-VL with experts, as transformers 4 stores it: merged as it is stored, to the same."""
    merged: list[dict[str, torch.Tensor]] = []
    for folder in (tmp_path / "as built", tmp_path / "exchanged"):
        tiny = make(folder, "qwen3_vl_moe").using(rank_by="energy", rank_share=0.9)
        for role in ROLES if folder.name == "exchanged" else ():
            weights = tiny.weights(role)
            turned = {n: w.mT.contiguous() for n, w in weights.items() if "experts.down" in n}
            assert len(turned) == 2
            add_tensors(folder / role, **turned)
        tiny.config()
        succeed("merge", tiny.path.with_suffix(".yml"), folder / "out")
        merged.append(read_weights(folder / "out"))
    straight, exchanged = merged
    assert straight.keys() == exchanged.keys()
    for name, tensor in exchanged.items():
        own = tensor.mT if "experts.down" in name else tensor
        torch.testing.assert_close(own, straight[name], rtol=1e-5, atol=1e-6)


def test_what_the_folder_holds_is_documented(tmp_path: Path) -> None:
    """Every kind of file beside the weights, after stock mergekit and after our command."""
    table = folder_table.HEAD + "".join(folder_table.rows(tmp_path))
    page = folder_table.PAGE.read_text(encoding="utf-8")
    assert table in page, "run: python tests/support/folder_table.py"


def test_head_that_is_the_embedding_and_stored_all_the_same(tmp_path: Path) -> None:
    """Some publishers store it twice; the result does, too."""
    tiny = Tiny.make(tmp_path, "qwen2", tie_word_embeddings=True, num_hidden_layers=1)
    for role in ROLES:
        weights = tiny.weights(role)
        assert "lm_head.weight" not in weights
        add_tensors(tmp_path / role, **{"lm_head.weight": weights["model.embed_tokens.weight"]})
    tiny.config(parameters={"calibration": str(tiny.path), "lambda": 0.0})
    succeed("merge", tiny.path.with_suffix(".yml"), tmp_path / "out")
    own, merged = tiny.weights("reasoning"), read_weights(tmp_path / "out")
    assert merged.keys() == own.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("option", ["--safe-serialization", "--no-safe-serialization"])
def test_infinity_in_the_type_of_the_result(tmp_path: Path, option: str) -> None:
    """Found in both formats of the weights: nothing is written."""
    tiny = Tiny.make(tmp_path, "llama", num_hidden_layers=1)
    name = "model.norm.weight"
    large = torch.full_like(tiny.weights("reasoning")[name], 1e6)
    add_tensors(tmp_path / "reasoning", **{name: large})
    tiny.config(out_dtype="float16")
    outcome = run("merge", tiny.path.with_suffix(".yml"), tmp_path / "out", option)
    assert outcome.code == 1
    assert f"{name} holds NaN or infinite values in the result in float16" in outcome.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_type_in_other_spellings(tmp_path: Path, family: str, dialect: str) -> None:
    """The config says it in the field that the checkpoint has for it."""
    _, config = published(tmp_path, family, dialect)
    content = yaml.safe_load(config.read_text())
    spelling = {"olmo2": "bf16", "mixtral": "torch.bfloat16"}.get(family, "bfloat16")
    config.write_text(yaml.safe_dump({**content, "dtype": spelling}))
    succeed("merge", config, tmp_path / "out")
    field = {"transformers 4": "torch_dtype", "transformers 5": "dtype"}[dialect]
    before = read_config_file(tmp_path / "reasoning")
    assert read_config_file(tmp_path / "out") == {**before, field: "bfloat16"}
    weights = read_weights(tmp_path / "out")
    assert {t.dtype for n, t in weights.items() if not n.startswith("mtp.")} == {torch.bfloat16}


def vision_config() -> Any:
    text = {
        "vocab_size": 400, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 3, "sliding_window": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )


def test_what_mergekit_will_not_find_is_said_before_the_calibration(tmp_path: Path) -> None:
    """Gemma 3 with images, as newer transformers save it: mergekit's table has older names."""
    from tiny import make_tokenizer, write_sets  # noqa: PLC0415

    for role in ("reasoning", "instruct", "pretrained"):
        model = AutoModelForImageTextToText.from_config(vision_config())
        model.save_pretrained(tmp_path / role)
        make_tokenizer().save_pretrained(tmp_path / role)
    write_sets(tmp_path)
    tiny = Tiny(tmp_path)
    tiny.config()
    message = refused(tmp_path, "calibrate", tiny.path.with_suffix(".yml"))
    assert "mergekit cannot merge the reasoning model" in message
    assert "by any method: it looks for" in message


@pytest.mark.parametrize(
    ("named", "built"),
    [
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForConditionalGeneration"),
        ("Qwen3_5ForCausalLM", "Qwen3_5ForCausalLM"),
        ("Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration"),
    ],
)
def test_class_is_the_one_that_the_checkpoint_names(named: str, built: str) -> None:
    config = vision_config()
    if named.startswith("Qwen"):
        config = AutoConfig.for_model(
            "qwen3_5",
            text_config={"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4},
            vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32},
        )
    config.architectures = [named]
    assert type(empty_model(config, torch.float32)).__name__ == built


@pytest.mark.parametrize(("family", "dialect"), CHECKPOINTS)
def test_quantised_embedding_is_refused(tmp_path: Path, family: str, dialect: str) -> None:
    """It is copied, and converting it without its scales would give nonsense."""
    _, config = published(tmp_path, family, dialect)
    folder, name = tmp_path / "reasoning", "model.embed_tokens.weight"
    add_tensors(folder, **{name: read_weights(folder)[name].to(torch.float8_e4m3fn)})
    outcome = run("calibrate", config)
    assert outcome.code == 1
    assert f"reasoning: {name} is stored as F8_E4M3, expected a plain weight" in outcome.output
