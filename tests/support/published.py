"""Tiny checkpoints as people publish them: in the dialect of transformers 4 or 5, with all the
files beside the weights and tensors that no class knows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import Tiny, read_weights
from transformers import AutoModelForCausalLM

ROLES = ("reasoning", "instruct", "pretrained")
DIALECTS = ("transformers 4", "transformers 5")
# Dense; experts that one module holds, one tensor each in the checkpoint; experts that begin with
# dense layers, which mergekit leaves out. Each in one dialect, the other one takes long together.
CHECKPOINTS = [
    pytest.param(family, dialect, marks=[] if index % 2 == number % 2 else pytest.mark.slow)
    for index, family in enumerate(("olmo2", "mixtral", "deepseek_v3"))
    for number, dialect in enumerate(DIALECTS)
]
BESIDE = {
    "special_tokens_map.json": "{}",
    "tekken.json": "{}",
    "qwen.tiktoken": "YQ== 0\n",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "{{ 'TOOLS' }}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "SYSTEM_PROMPT.txt": "Think first.",
    "reasoning_parser.py": "# for a server\n",
    "LICENSE": "Apache-2.0",
    "NOTICE": "Made by somebody.",
    "USE_POLICY.md": "Be kind.",
}
LEFT_BEHIND = {
    "README.md": "the reasoning model's own",
    "params.json": "{}",
    "trainer_state.json": "{}",
    "model.gguf": "other weights",
    ".gitattributes": "*.bin filter=lfs",
}


# Transformers 4 has one more module there.
_OLD_NAMES = {"gemma3": {"vision_tower.": "vision_tower.vision_model."}}
# Attention of these alternates in a way that layer_types alone says.
_TYPED = ("qwen3_5", "qwen3_5_text")


def age(folder: Path) -> None:
    """The config and the names as transformers 4 wrote them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config.get("text_config"), config):
        if part is not None and "hidden_size" in part:
            _age_rope(part)
        if part is not None and "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    path.write_text(json.dumps({**config, "transformers_version": "4.44.0"}))
    if old := _OLD_NAMES.get(config["model_type"]):
        rename_tensors(folder, old)


def _age_rope(part: dict[str, Any]) -> None:
    """Put the numbers of rotary embeddings beside all others, and leave out what follows."""
    rope = dict(part.pop("rope_parameters", None) or {})
    if "full_attention" in rope:  # one for each type of layer
        part["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    part["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if rope.get("rope_type", "default") != "default" or "mrope_section" in rope:
        part["rope_scaling"] = rope
    elif len(rope) > 1:  # such as the part of a head that is rotated
        part |= {key: value for key, value in rope.items() if key != "rope_type"}
    if part["model_type"] not in _TYPED:
        part.pop("layer_types", None)


def rename_tensors(folder: Path, prefixes: Mapping[str, str]) -> None:
    """Give tensors whose names begin so others."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for old, new in prefixes.items():
        weights = {n.replace(old, new) if n.startswith(old) else n: w for n, w in weights.items()}
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def add_files(folder: Path) -> None:
    """All kinds of files beside the weights, those that belong to the model and others."""
    for name, text in {**BESIDE, **LEFT_BEHIND}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(text)


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    """Put more tensors, or others, into the one file of weights."""
    path = folder / "model.safetensors"
    weights = load_file(path) | tensors
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def unknown_tensors() -> dict[str, torch.Tensor]:
    """What no class knows: heads that predict more tokens, and a layer beyond the last."""
    shapes = {
        "mtp.fc.weight": (4, 8),
        "mtp.norm.weight": (4,),
        "model.layers.2.eh_proj.weight": (4, 8),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def published(
    folder: Path, family: str, dialect: str = DIALECTS[0], **parameters: Any
) -> tuple[Tiny, Path]:
    """A trio and its configuration."""
    tiny = make(folder, family).using(coefficients="off", rank_by="energy", rank_share=0.9)
    for role in ROLES if dialect == DIALECTS[0] else ():
        age(folder / role)
    add_files(folder / "reasoning")
    add_tensors(folder / "reasoning", **unknown_tensors())
    tiny.config(parameters={"calibration": str(tiny.path), **parameters})
    return tiny, tiny.path.with_suffix(".yml")


def add_adapter(folder: Path, role: str, *, size: int | None = None, **options: Any) -> Path:
    """An adapter that changes one map of each layer, or what the options say; its folder.

    size: of the vocabulary to which the model below it was resized first.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():  # of tensors that no class knows, and of resized vocabularies
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder / role)
        if size is not None:
            model.resize_token_embeddings(size, mean_resizing=False)
        config = {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": False, **options}
        get_peft_model(model, LoraConfig(**config)).save_pretrained(folder / f"{role}-adapter")
    return folder / f"{role}-adapter"


def change_weights(path: Path, part: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change the first tensor of a safetensors file that has `part` in its name."""
    weights = load_file(path)
    change(weights[min(name for name in weights if part in name)])
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


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
