"""Published shapes, and texts as long as the package's own, for a device run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml

ROLES = ("reasoning", "instruct")
SETS = Path(__file__).parents[1] / "calibration"
_WORDS = ["a", "minus", "is", "six", "keys", "how", "many", "plus", "four", "answer", "nine"]
_ANSWER = "FOUR KEYS"

Stored: TypeAlias = "tuple[torch.dtype, tuple[int, ...]]"  # type and shape of a tensor in a file


@dataclass(frozen=True)
class DeviceShape:
    """A published model: its size, its config.json, and how many of its layers are written.

    texts: of both sets, or fewer; every one of them where they are None.
    block: of FP8 weights, the rows and columns that share a scale, which divide all sizes; None
        for bfloat16.
    """

    name: str
    published_layers: int
    layers: int
    config: Mapping[str, Any]
    texts: int | None = None
    block: int | None = None

    def fields(self) -> dict[str, Any]:
        """Its config.json."""
        found = {**self.config, "num_hidden_layers": self.layers, "max_position_embeddings": 65536}
        if self.block is None:
            return found
        published = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        published["weight_block_size"] = [self.block, self.block]
        return {**found, "quantization_config": published}

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

    def layer_stored(self) -> dict[str, Stored]:
        """How a checkpoint stores the tensors of one layer."""
        found: dict[str, Stored] = {}
        for name, shape in self.layer_shapes().items():
            if self.block is None or not name.endswith("_proj.weight"):
                found[name] = torch.bfloat16, shape
                continue
            found[name] = torch.float8_e4m3fn, shape
            scales = tuple(size // self.block for size in shape)
            found[f"{name}_scale_inv"] = torch.float32, scales
        return found

    def rest_stored(self) -> dict[str, Stored]:
        """The tensors beside the layers."""
        table = torch.bfloat16, (int(self.config["vocab_size"]), self.hidden)
        return {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            "model.norm.weight": (torch.bfloat16, (self.hidden,)),
        }

    @property
    def layer_bytes(self) -> int:
        return _bytes(self.layer_stored())

    @property
    def model_bytes(self) -> int:
        return self.layers * self.layer_bytes + _bytes(self.rest_stored())

    @property
    def merges(self) -> bool:
        """Whether the run ends with merges; stock mergekit-yaml reads no FP8."""
        return self.block is None

    @property
    def _copies(self) -> float:
        """Times its own bytes: both models, and beside them a merged one and the calibration file.

        The file is a tenth of a model in bfloat16, and while it is written there twice.
        """
        return 3.1 if self.merges else 2.4

    @property
    def disk_bytes(self) -> int:
        """What is on the disk at the most."""
        return int(self._copies * self.model_bytes)

    def within(self, free: int) -> DeviceShape:
        """With as many layers as that much disk has room for; at least one."""
        room = free / self._copies - _bytes(self.rest_stored())
        return replace(self, layers=max(1, min(self.layers, int(room / self.layer_bytes))))


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}


def _bytes(stored: Mapping[str, Stored]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in stored.values())


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
    # Small enough to be calibrated twice, the second time with `--experts-budget 0`.
    "experts": (DeviceShape("64-experts", 48, 3, _mixture(1024, 512, 16, 64, 739), texts=16),),
    # All layers of it, as its publisher stores it in 8 bits: two models of 31 GB fit a disk.
    "whole": (DeviceShape("30B-A3B-FP8", 48, 48, _30B, texts=4, block=128),),
    "small": (
        DeviceShape("7B", 28, 2, _dense(64, 160, 4, 739), texts=3),
        DeviceShape("30B-A3B", 48, 2, _mixture(64, 32, 8, 16, 739), texts=3),
        DeviceShape("30B-A3B-FP8", 48, 2, _mixture(64, 32, 8, 16, 739), texts=3, block=16),
    ),
}


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
