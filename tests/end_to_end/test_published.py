"""Checkpoints as people publish them: the result is the reasoning model's folder, other weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import make
from commands import refused, run, succeed
from safetensors.torch import load_file, save_file
from tiny import Tiny, read_weights
from transformers import AutoConfig, AutoModelForImageTextToText

from rain_mergekit.models.config_file import read_config_file
from rain_mergekit.models.empty_model import empty_model

WRITTEN = ("README.md", "mergekit_config.yml", "config.json")
BESIDE = {
    "tekken.json": "{}",
    "qwen.tiktoken": "YQ== 0\n",
    "SYSTEM_PROMPT.txt": "Think first.",
    "LICENSE": "Apache-2.0",
    "preprocessor_config.json": "{}",
    "reasoning_parser.py": "# for a server\n",
    "additional_chat_templates/tool_use.jinja": "{{ 'TOOLS' }}",
}
LEFT_BEHIND = {
    "README.md": "the reasoning model's own",
    "trainer_state.json": "{}",
    "params.json": "{}",
    ".gitattributes": "*.bin filter=lfs",
}


def age(folder: Path) -> None:
    """The config as transformers 4 wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", 10000.0)
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps({**config, "transformers_version": "4.44.0"}))


def publish(folder: Path) -> None:
    """Layers that no class knows, and all kinds of files beside the weights."""
    age(folder)
    for name, text in {**BESIDE, **LEFT_BEHIND}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights |= {"mtp.fc.weight": torch.randn(4, 8), "mtp.norm.weight": torch.randn(4)}
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def published(folder: Path, family: str, **parameters: Any) -> tuple[Tiny, Path]:
    tiny = make(folder, family).using(coefficients="off", rank_by="energy", rank_share=0.9)
    for role in ("instruct", "pretrained"):
        age(folder / role)
    publish(folder / "reasoning")
    tiny.config(parameters={"calibration": str(tiny.path), **parameters})
    return tiny, tiny.path.with_suffix(".yml")


def check_folder(reasoning: Path, out: Path) -> None:
    """Nothing but the weights may differ, and at lambda 0 not even they do."""
    files = {p.relative_to(reasoning).as_posix() for p in reasoning.rglob("*") if p.is_file()}
    for name in files - LEFT_BEHIND.keys() - {"config.json"}:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (reasoning / name).read_bytes(), name
    assert not any((out / n).exists() for n in LEFT_BEHIND.keys() - {"README.md"})
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (reasoning / "config.json").read_text()
    )
    own, merged = read_weights(reasoning), read_weights(out)
    assert merged.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("family", ["olmo2", "mixtral", "deepseek_v3"])
def test_result_is_the_reasoning_folder_at_lambda_zero(tmp_path: Path, family: str) -> None:
    """By our command, and by mergekit-yaml with `finish` after it."""
    tiny, config = published(tmp_path, family, **{"lambda": 0.0})
    said = succeed("merge", config, tmp_path / "ours")
    assert "mtp.fc.weight" in said
    check_folder(tmp_path / "reasoning", tmp_path / "ours")
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), "stock"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    out = tmp_path / "stock"
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


def test_pickled_result_takes_the_place_of_safetensors(tmp_path: Path) -> None:
    """Loaders prefer safetensors: an earlier merge's must not stay. Additions are pickled too."""
    _, config = published(tmp_path, "olmo2")
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


@pytest.mark.parametrize("spelling", ["bf16", "torch.bfloat16"])
def test_type_in_other_spellings(tmp_path: Path, spelling: str) -> None:
    _, config = published(tmp_path, "olmo2")
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "dtype": spelling}))
    succeed("merge", config, tmp_path / "out")
    assert read_config_file(tmp_path / "out")["torch_dtype"] == "bfloat16"
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


def test_quantised_embedding_is_refused(tmp_path: Path) -> None:
    """It is copied, and converting it without its scales would give nonsense."""
    _, config = published(tmp_path, "olmo2")
    path = tmp_path / "reasoning" / "model.safetensors"
    weights = load_file(path)
    name = "model.embed_tokens.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    outcome = run("calibrate", config)
    assert outcome.code == 1
    assert f"reasoning: {name} is stored as F8_E4M3, expected a plain weight" in outcome.output
