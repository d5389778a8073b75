"""Random models of published shapes, and texts as long as the package's own, for a device run."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.shapes import TOKENIZER, TOKENIZER_FILES
from rain_mergekit.calibration_file.container import Entry, raw_bytes, write_header

ROLES = ("reasoning", "instruct")
SETS = Path(__file__).parents[1] / "calibration"
_WORDS = ["a", "minus", "is", "six", "keys", "how", "many", "plus", "four", "answer", "nine"]
_ANSWER, _SCALE, _NOISE = "FOUR KEYS", 0.02, 0.1  # the noise is relative


@dataclass(frozen=True)
class DeviceShape:
    """A published model: its size, its config.json, and how many of its layers are written.

    texts: of both sets, or fewer; every one of them where they are None.
    """

    name: str
    published_layers: int
    layers: int
    config: Mapping[str, Any]
    texts: int | None = None

    def fields(self) -> dict[str, Any]:
        """Its config.json."""
        return {**self.config, "num_hidden_layers": self.layers, "max_position_embeddings": 65536}

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer as a checkpoint names them."""
        c, d = self.config, self.hidden
        head = c.get("head_dim", d // c["num_attention_heads"])
        rows = {"q": head * c["num_attention_heads"], "k": head * c["num_key_value_heads"]}
        rows["v"] = rows["k"]
        found = {f"self_attn.{one}_proj.weight": (size, d) for one, size in rows.items()}
        found["self_attn.o_proj.weight"] = (d, rows["q"])
        found |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        if c["model_type"] == "qwen2":
            found |= {f"self_attn.{one}_proj.bias": (size,) for one, size in rows.items()}
            return found | _mlp("mlp", d, c["intermediate_size"])
        found |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        found["mlp.gate.weight"] = (c["num_experts"], d)
        for expert in range(c["num_experts"]):
            found |= _mlp(f"mlp.experts.{expert}", d, c["moe_intermediate_size"])
        return found

    def rest_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors beside the layers."""
        table = (int(self.config["vocab_size"]), self.hidden)
        return {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            "model.norm.weight": (self.hidden,),
        }

    @property
    def layer_bytes(self) -> int:
        return _bytes(self.layer_shapes())

    @property
    def model_bytes(self) -> int:
        return self.layers * self.layer_bytes + _bytes(self.rest_shapes())

    @property
    def disk_bytes(self) -> int:
        """Both models, a merged one, and a tenth for the calibration file, beside each other."""
        return int(3.1 * self.model_bytes)

    def within(self, free: int) -> DeviceShape:
        """With as many layers as that much disk has room for; at least one."""
        spare = free - int(3.1 * _bytes(self.rest_shapes()))
        return replace(self, layers=max(1, min(self.layers, int(spare / 3.1 / self.layer_bytes))))


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def _config(model_type: str, architecture: str, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        **fields,
    }


def _dense(hidden: int, inner: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return _config(
        "qwen2",
        "Qwen2ForCausalLM",
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=4,
        vocab_size=vocabulary,
    )


def _mixture(hidden: int, inner: int, heads: int, experts: int, vocabulary: int) -> dict[str, Any]:
    return _config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        moe_intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128 if hidden > 1024 else 16,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        vocab_size=vocabulary,
    )


_30B = _mixture(2048, 768, 32, 128, 151936)

SHAPES: dict[str, tuple[DeviceShape, ...]] = {
    "published": (
        DeviceShape("7B", 28, 28, _dense(3584, 18944, 28, 152064)),
        DeviceShape("30B-A3B", 48, 6, _30B),
    ),
    # What a layer of many experts needs on a machine without a GPU, and that depth adds nothing.
    "mixture": tuple(
        DeviceShape(f"30B-A3B-{depth}-layers", 48, depth, _30B, texts=8) for depth in (2, 4)
    ),
    "small": (
        DeviceShape("7B", 28, 2, _dense(64, 160, 4, 739), texts=3),
        DeviceShape("30B-A3B", 48, 2, _mixture(64, 32, 8, 16, 739), texts=3),
    ),
}


def write_model(home: Path, shape: DeviceShape, role: str, device: str) -> int:
    """One checkpoint, a shard for each layer; returns the bytes that were not there yet.

    All layers hold the same random numbers, and are files of their own.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(shape.fields()))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, home / name)
    shards = {f"layer-{n:05d}.safetensors": f"model.layers.{n}." for n in range(shape.layers)}
    parts = {
        file: {prefix + n: s for n, s in shape.layer_shapes().items()}
        for file, prefix in shards.items()
    }
    parts["rest.safetensors"] = shape.rest_shapes()
    places = {name: file for file, names in parts.items() for name in names}
    index = {"metadata": {"total_size": shape.model_bytes}, "weight_map": places}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    missing = [file for file in parts if not (home / file).exists()]
    layer = list(_numbers(shape.layer_shapes(), role, device)) if missing else []
    written = 0
    for file in missing:
        rest = _numbers(parts[file], role, device) if file == "rest.safetensors" else layer
        written += _write_shard(home / file, parts[file], rest)
    return written


def _numbers(shapes: Mapping[str, tuple[int, ...]], role: str, device: str) -> Iterator[Tensor]:
    """Random tensors; the instruct model's are near the reasoning model's."""
    base = torch.Generator(device).manual_seed(0)
    other = torch.Generator(device).manual_seed(1)
    for shape in shapes.values():
        if len(shape) == 1:
            yield torch.ones(shape, dtype=torch.bfloat16)
            continue
        value = torch.randn(shape, generator=base, device=device)
        if role != "reasoning":
            value += torch.randn(shape, generator=other, device=device).mul_(_NOISE)
        yield value.mul_(_SCALE).to(torch.bfloat16).cpu()


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Sequence[Tensor] | Iterator[Tensor]
) -> int:
    """Whole or not at all, and on the disk when it returns."""
    entries, position = dict[str, Entry](), 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = Entry(torch.bfloat16, shape, position, size)
        position += size
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(write_header({"format": "pt"}, entries))
        for tensor in tensors:
            file.write(raw_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return position


def write_sets(folder: Path, shape: DeviceShape) -> None:
    """Both calibration sets, random words, each text about as long as one of the package's."""
    words = random.Random(0)
    for name in ("reasoning", "instruction"):
        lines = (SETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[: shape.texts]
        texts = [_sample(name, _tokens(json.loads(line)), words) for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))


def _tokens(sample: Mapping[str, Any]) -> int:
    """About four characters a token."""
    fields = ("prompt", "reasoning", "reason", "response")
    return sum(len(str(sample.get(field, ""))) for field in fields) // 4


def _sample(name: str, tokens: int, words: random.Random) -> dict[str, Any]:
    said = " ".join(words.choices(_WORDS, k=max(8, tokens - 40)))
    asked = f"{' '.join(words.choices(_WORDS, k=8))} ? use uppercase ."
    if name == "reasoning":
        return {"prompt": asked, "output": f"<think>\n{said}</think>\n\nanswer : {_ANSWER}"}
    half = len(said) // 2
    span = {
        "instruction_id": "upper",
        "prompt_spans": ["use uppercase ."],
        "response_spans": [_ANSWER],
        "unrelated_response_spans": ["answer :"],
    }
    output = f"<think>\n{said[:half].strip()}</think>\n\n{said[half:].strip()} answer : {_ANSWER}"
    return {"prompt": asked, "output": output, "related_prompt_list": [span]}


def write_configs(home: Path, calibration: Path) -> None:
    """The YAML of ours, and of mergekit's task arithmetic on the same models."""
    reasoning, instruct = (str(home / role) for role in ROLES)
    ours = {
        "merge_method": "rain",
        "base_model": reasoning,
        "models": [{"model": instruct, "parameters": {"role": "instruct"}}],
        "parameters": {"calibration": str(calibration)},
        "dtype": "bfloat16",
        "rain": {
            "reasoning_data": str(home / "reasoning.jsonl"),
            "instruction_data": str(home / "instruction.jsonl"),
            "accept": ["no_thinking"],  # as random models do not
        },
    }
    other = {
        "merge_method": "task_arithmetic",
        "base_model": reasoning,
        "models": [{"model": instruct, "parameters": {"weight": 1.0}}],
        "dtype": "bfloat16",
    }
    for name, content in (("rain", ours), ("task_arithmetic", other)):
        (home / f"{name}.yml").write_text(yaml.safe_dump(content))
