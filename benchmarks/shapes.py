"""Random trios of a wanted shape on disk: big layers, few of them, thrown away afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import rain_mergekit

TOKENIZER = Path(rain_mergekit.__file__).parent / "trio" / "reasoning"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ROLES = ("reasoning", "instruct", "pretrained")
PHRASE = "a minus 4 is six . "
PHRASE_TOKENS = 6
ANSWER = "FOUR KEYS"


@dataclass(frozen=True)
class Shape:
    """A Qwen2-like decoder; weights are bfloat16 on disk."""

    hidden: int = 1024
    ffn: int = 4096
    layers: int = 4
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 4096

    @property
    def layer_parameters(self) -> int:
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.kv_heads)
        return attention + head * (self.heads + 2 * self.kv_heads) + self.mlp + 2 * self.hidden

    @property
    def mlp(self) -> int:
        return 3 * self.hidden * self.ffn

    @property
    def layer_bytes(self) -> int:
        """One decoder layer as the checkpoint stores it."""
        return 2 * self.layer_parameters

    @property
    def embedding_bytes(self) -> int:
        return 2 * self.vocabulary * self.hidden

    @property
    def model_bytes(self) -> int:
        return self.layers * self.layer_bytes + self.embedding_bytes

    def deep(self, layers: int) -> Shape:
        return replace(self, layers=layers)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
        }


def make_trio(folder: Path, shape: Shape) -> None:
    """Three checkpoints, one shard a layer; all layers hold the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    base = _layer(shape, generator)
    embedding = torch.randn(shape.vocabulary, shape.hidden, generator=generator).bfloat16()
    for role in ROLES:
        home = folder / role
        home.mkdir(parents=True)
        layer = {name: _moved(value, role, generator) for name, value in base.items()}
        _write(home, shape, layer, embedding)


def _layer(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    head = shape.hidden // shape.heads
    rows = {"q": shape.heads * head, "k": shape.kv_heads * head, "v": shape.kv_heads * head}
    sizes = {f"self_attn.{name}_proj": (count, shape.hidden) for name, count in rows.items()}
    sizes["self_attn.o_proj"] = (shape.hidden, shape.heads * head)
    sizes["mlp.gate_proj"] = sizes["mlp.up_proj"] = (shape.ffn, shape.hidden)
    sizes["mlp.down_proj"] = (shape.hidden, shape.ffn)
    weights = {
        f"{name}.weight": torch.randn(size, generator=generator).mul_(size[1] ** -0.5)
        for name, size in sizes.items()
    }
    weights |= {f"self_attn.{name}_proj.bias": torch.zeros(size) for name, size in rows.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    weights |= {f"{name}.weight": torch.ones(shape.hidden) for name in norms}
    return weights


def _moved(value: Tensor, role: str, generator: torch.Generator) -> Tensor:
    if role == "pretrained" or value.dim() == 1:
        return value.bfloat16()
    noise = torch.randn(value.shape, generator=generator)
    return noise.mul_(0.05 * value.shape[1] ** -0.5).add_(value).bfloat16()


def _write(home: Path, shape: Shape, layer: dict[str, Tensor], embedding: Tensor) -> None:
    (home / "config.json").write_text(json.dumps(shape.config()))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, home / name)
    places: dict[str, str] = {}
    for index in range(shape.layers):
        part = {f"model.layers.{index}.{name}": value for name, value in layer.items()}
        _shard(home, f"model-{index:05d}.safetensors", part, places)
    rest = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(shape.hidden)}
    _shard(home, "model-rest.safetensors", rest, places)
    text = json.dumps({"metadata": {"total_size": shape.model_bytes}, "weight_map": places})
    (home / "model.safetensors.index.json").write_text(text)


def _shard(home: Path, file: str, tensors: dict[str, Tensor], places: dict[str, str]) -> None:
    save_file({name: value.bfloat16() for name, value in tensors.items()}, home / file)
    places.update(dict.fromkeys(tensors, file))


@dataclass(frozen=True)
class TextSet:
    """Calibration texts: how many tokens each, about, and how many texts."""

    tokens: int
    samples: int

    @property
    def text(self) -> str:
        """The part that makes its length."""
        return (PHRASE * max(1, (self.tokens - 40) // PHRASE_TOKENS)).strip()


def write_samples(folder: Path, reasoning: TextSet, instruction: TextSet | None = None) -> None:
    """Both calibration sets; alike if one is given."""
    instruction = instruction or reasoning
    span = {
        "instruction_id": "upper",
        "prompt_spans": ["use uppercase ."],
        "response_spans": [ANSWER],
        "unrelated_response_spans": ["answer :"],
    }
    thinks = {"output": f"<think>\n{reasoning.text}</think>\n\nanswer : {ANSWER}"}
    answer = f"{instruction.text} answer : {ANSWER}"
    answers = {"output": f"<think>\n{PHRASE.strip()}</think>\n\n{answer}"}
    _write_set(folder / "reasoning.jsonl", thinks, reasoning.samples)
    answers = {**answers, "related_prompt_list": [span]}
    _write_set(folder / "instruction.jsonl", answers, instruction.samples)


def _write_set(path: Path, sample: dict[str, Any], samples: int) -> None:
    question = "nine keys . a minus 7 . how many keys ? use uppercase ."
    path.write_text((json.dumps({"prompt": question, **sample}) + "\n") * samples)


def write_config(folder: Path, method: str = "rain", **settings: Any) -> Path:
    """The YAML of a calibration and merge, or of mergekit's task arithmetic on the same trio."""
    if method == "task_arithmetic":
        return _write_task_arithmetic(folder)
    content = {
        "merge_method": "rain",
        "base_model": str(folder / "reasoning"),
        "models": [
            {"model": str(folder / role), "parameters": {"role": role}} for role in ROLES[1:]
        ],
        "parameters": {"calibration": str(folder / "c.rain.safetensors")},
        "dtype": "bfloat16",
        "rain": {
            "reasoning_data": str(folder / "reasoning.jsonl"),
            "instruction_data": str(folder / "instruction.jsonl"),
            "accept": ["no_thinking"],  # as random models do not
            "fit": "projection",
            **settings,
        },
    }
    path = folder / "rain.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def _write_task_arithmetic(folder: Path) -> Path:
    weights = {"instruct": 1.0, "pretrained": -1.0}
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "reasoning"),
        "models": [
            {"model": str(folder / role), "parameters": {"weight": weight}}
            for role, weight in weights.items()
        ],
        "dtype": "bfloat16",
    }
    path = folder / "task_arithmetic.yml"
    path.write_text(yaml.safe_dump(content))
    return path
