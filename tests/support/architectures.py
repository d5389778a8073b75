"""Tiny random models of many architectures, and what a merge of them must give, dense and float64.

The reference watches the whole model with module hooks and computes every projection from its
definition; it knows nothing of how the package finds weights, sites or experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import Tiny, chosen_positions, make_tokenizer, save, write_sets
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning

_BASE = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA = {
    "head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 256}

_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
    }
}
_EYES = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 48}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # dense
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 36},
    "gemma3_text": {"head_dim": 12, "sliding_window": 36, "query_pre_attn_scalar": 12},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "olmo2": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 36},
    "starcoder2": {"use_bias": True},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "smollm3": {},
    "exaone4": {"sliding_window": 36},
    "stablelm": {"partial_rotary_factor": 0.5, "hidden_size": 64},
    "nemotron": {},
    "apertus": {},
    "arcee": {},
    "seed_oss": {"head_dim": 12},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "falcon": {
        "ffn_hidden_size": 64,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "tie_word_embeddings": False,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    # mixture of experts
    "mixtral": _LOCAL,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": {**_MOE, "head_dim": 12, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**_ROUTED, "head_dim": 12},
    "gpt_oss": {**_LOCAL, "head_dim": 12, "sliding_window": 36},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "phimoe": _LOCAL,
    "granitemoe": _LOCAL,
    "afmoe": {**_MOE, "head_dim": 12, "num_dense_layers": 1},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "head_dim": 12,
    },
    # hybrids
    "qwen3_next": {
        **_MOE,
        **_DELTA,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "qwen3_5_text": _DELTA,
    "granitemoehybrid": {
        **_LOCAL,
        **_MAMBA,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
        "mamba_expand": 2,
        "mamba_n_groups": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 96, "head_dim": 12},
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    "mamba": {"state_size": 8, "time_step_rank": 8},
    # attention heads as experts: of no known layout
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 12},
    # with eyes
    "qwen2_5_vl": {
        "text_config": {**_BASE, **_MROPE},
        "vision_config": {**_EYES, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": {**_BASE, **_MROPE, "head_dim": 12},
        "vision_config": {
            **_EYES,
            "depth": 4,
            "num_heads": 2,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_BASE,
            **_MROPE,
            **_MOE,
            "head_dim": 12,
            "decoder_sparse_step": 1,
        },
        "vision_config": {
            **_EYES,
            "depth": 4,
            "num_heads": 2,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    },
    "llama4": {
        "text_config": {
            **_BASE,
            **_LOCAL,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "head_dim": 12,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "mistral3": {
        "text_config": {**_BASE, "model_type": "mistral", "head_dim": 12},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
}

# Families that pick their keys themselves, by scores that they mask with the mask of attention.
INDEXED = (
    *("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text"),
    "mistral_large4_text",
)
_INDEXED = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "index_topk": 12,
    "index_head_dim": 32, "index_n_heads": 4, "shared_experts_intermediate_size": 32,
    "pad_token_id": 0, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip
_DENSE_FIRST = {"glm_moe_dsa": {"mlp_layer_types": ["dense", "sparse"]}}
# Families with a class for text and images and one for text alone, for one config or for two.
TWO_CLASSES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_5": {
        "text_config": {**_BASE, **_DELTA},
        "vision_config": {
            **_EYES, "depth": 2, "num_heads": 2, "patch_size": 8, "num_position_embeddings": 16,
        },
    },
    "gemma3": {
        "text_config": {**_BASE, "head_dim": 12, "sliding_window": 36},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}  # fmt: skip

# Routers, gates of shared experts, linear attention: the projection leaves them.
LEFT_ALONE = re.compile(r"\.(gate|router|shared_expert_gate|linear_attn)\.")


def family_config(family: str) -> Any:
    """A transformers config of the family, small."""
    if family in INDEXED:
        return AutoConfig.for_model(family, **_INDEXED, **_DENSE_FIRST.get(family, {}))
    options = TWO_CLASSES.get(family) or FAMILIES[family]
    nested = "text_config" in options
    return AutoConfig.for_model(family, **(options if nested else {**_BASE, **options}))


def auto_class(config: Any) -> Any:
    """The class that loads a model of this config."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name: the only list of two modules that has one."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in ("layers", "h")
        and "vision" not in name
    ]
    assert len(found) == 1
    return found[0]


def run_whole(model: nn.Module, ids: Sequence[int]) -> None:
    """One text through the whole model, for what hooks see of it."""
    with torch.no_grad(), fault_of_transformers(model.config.model_type):
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)


def fault_of_transformers(model_type: str) -> AbstractContextManager[object]:
    """Demands the fault of those versions that have it; fails as soon as one has mended it.

    Llama 4 with eyes: where there is no image, making the output object fails, after everything
    was computed.
    """
    if model_type == "llama4" and Version(transformers.__version__) >= Version("5.24"):
        return pytest.raises(AttributeError, match="image_outputs")
    return nullcontext()


def make(folder: Path, family: str) -> Tiny:
    """Three models of the family with own layers; the instruct model's head differs too."""
    torch.manual_seed(11)
    config = family_config(family)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    _disturb(model, 0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = make_tokenizer()
    for role in ("pretrained", "instruct", "reasoning"):
        model.load_state_dict(start)
        if role != "pretrained":
            _disturb(model.get_submodule(layers_of(model)[0]), 0.03)
        if role == "instruct":
            with torch.random.fork_rng():
                _disturb(model.get_output_embeddings(), 0.03)
        save(model, folder / role, torch.float32)
        tokenizer.save_pretrained(folder / role)
    write_sets(folder)
    return Tiny(folder)


def _disturb(module: nn.Module, scale: float) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "A_log" not in name:  # a recurrence that grows would overflow
                parameter.add_(torch.randn_like(parameter) * scale)


@dataclass(frozen=True)
class Watched:
    """What a weight saw in one text: its inputs (n, d_in) and the tokens that they belong to."""

    inputs: Tensor
    tokens: Tensor


class _Watch:
    """Hooks that write down what the weights of a model see."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[tuple[str, int | None], Watched] = {}

    def plain(self, name: str, _module: Any, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        self.seen[f"{name}.weight", None] = Watched(rows, torch.arange(len(rows)))

    def routed(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        rows, index = args[0].detach(), args[1]
        for expert in range(module.num_experts):
            self.seen[f"{name}.{up}", expert] = Watched(rows, torch.arange(len(rows)))
            tokens = (index == expert).any(-1).nonzero().flatten()
            inner = _inner(module, up, expert, rows[tokens])
            self.seen[f"{name}.down_proj", expert] = Watched(inner, tokens)

    def batched(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        """Llama 4: every expert sees every token, those of others times zero."""
        count = module.gate_up_proj.shape[0]
        for expert, rows in enumerate(args[0].detach().view(count, -1, args[0].shape[-1])):
            tokens = rows.any(-1).nonzero().flatten()
            gate, up = (rows[tokens] @ module.gate_up_proj[expert].detach()).chunk(2, -1)
            self.seen[f"{name}.gate_up_proj", expert] = Watched(rows[tokens], tokens)
            self.seen[f"{name}.down_proj", expert] = Watched(up * module.act_fn(gate), tokens)

    def time_step(self, name: str, _module: Any, _args: Any, output: Tensor) -> None:
        """Mamba multiplies by the weight of `dt_proj` itself."""
        rank = self.model.get_parameter(f"{name}.dt_proj.weight").shape[1]
        rows = output.detach()[0, :, :rank]
        self.seen[f"{name}.dt_proj.weight", None] = Watched(rows, torch.arange(len(rows)))

    def hooks(self) -> Iterator[Any]:
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            matrix = isinstance(weight, Tensor) and weight.dim() == 2
            norm = "norm" in name.rpartition(".")[2]
            if hasattr(module, "dt_proj") and hasattr(module, "x_proj"):
                last: Any = getattr(module, "dt_layernorm", module.x_proj)
                yield last.register_forward_hook(partial(self.time_step, name))
            if type(module).__name__ == "Llama4TextExperts":
                yield module.register_forward_pre_hook(partial(self.batched, name))
            elif hasattr(module, "is_transposed"):
                yield module.register_forward_pre_hook(partial(self.routed, name))
            elif matrix and not norm and not isinstance(module, nn.Embedding):
                yield module.register_forward_pre_hook(partial(self.plain, name))


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[tuple[str, int | None], Watched]]:
    """By parameter and expert (None for a plain matrix), filled by the forward pass inside."""
    watch = _Watch(model)
    handles = list(watch.hooks())
    try:
        yield watch.seen
    finally:
        for handle in handles:
            handle.remove()


def _inner(module: Any, up: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, up)[expert].detach()
    product = rows @ (weight if module.is_transposed else weight.mT)
    if module.has_bias:
        product = product + getattr(module, f"{up}_bias")[expert].detach()
    inner: Tensor = module._apply_gate(product) if module.has_gate else module.act_fn(product)
    return inner


class Reference:
    """What the merge of a tiny trio must give, given the coefficients that the file records."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.settings = tiny.config().settings
        self.reasoning_model = self.model("reasoning")
        self.prefix = layers_of(self.reasoning_model)[0]
        head = self.reasoning_model.get_output_embeddings()
        modules = self.reasoning_model.named_modules()
        self.head = next(f"{name}.weight" for name, module in modules if module is head)

    def model(self, role: str) -> Any:
        """As transformers loads it, float64, with its own eager attention and experts."""
        folder = self.tiny.folder / role
        model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        for parameter in model.parameters():  # of some families routers are loaded as float32
            parameter.data = parameter.data.double()
        return model.eval()

    @cached_property
    def deltas(self) -> dict[str, Tensor]:
        """Task vector by parameter."""
        origin = self.model("pretrained").state_dict()
        return {name: w - origin[name] for name, w in self.model("instruct").state_dict().items()}

    @cached_property
    def samples(self) -> dict[str, Any]:
        tokenizer = self.tiny.tokenizer()
        reasoning = load_reasoning(
            self.settings.reasoning_data, tokenizer, keep_response=self.settings.reading_share > 0
        ).samples
        instruction = load_instruction(str(self.settings.instruction_data), tokenizer).samples
        return {"reasoning": reasoning, "instruction": instruction}

    @cached_property
    def seen(self) -> dict[str, list[dict[tuple[str, int | None], Watched]]]:
        """By set, for each sample what every weight saw."""
        found: dict[str, list[Any]] = {}
        for kind, samples in self.samples.items():
            for sample in samples:
                with watched(self.reasoning_model) as seen:
                    run_whole(self.reasoning_model, sample.input_ids)
                kept = (self.prefix, self.head) if self.settings.lm_head != "off" else self.prefix
                found.setdefault(kind, []).append(
                    {key: one for key, one in seen.items() if key[0].startswith(kept)}
                )
        return found

    @property
    def every(self) -> list[tuple[str, int | None]]:
        """Every weight (and expert) of the layers that multiplies features."""
        return list(dict.fromkeys(key for seen in self.seen["reasoning"] for key in seen))

    @property
    def keys(self) -> list[tuple[str, int | None]]:
        """Those that the projection merges."""
        return [key for key in self.every if not LEFT_ALONE.search(key[0])]

    def rows(self, key: tuple[str, int | None], kind: str, positions: str) -> Tensor:
        """The inputs of one weight at the named positions of all samples of a set."""
        parts = []
        for sample, seen in zip(self.samples[kind], self.seen[kind], strict=True):
            if key in seen:
                wanted = torch.tensor(chosen_positions(sample, positions))
                parts.append(seen[key].inputs[torch.isin(seen[key].tokens, wanted)])
        return torch.cat(parts)

    def keep(self, key: tuple[str, int | None]) -> Tensor:
        """I - U V^T for one weight (and expert): rank by energy, oblique, all d x d explicit."""
        think = self.rows(key, "reasoning", "think_positions")
        content = self.rows(key, "reasoning", "content_positions")
        width = think.shape[1]
        eye = torch.eye(width, dtype=torch.float64)
        moment = sum((r.mT @ r / len(r) for r in (think, content) if len(r)), torch.zeros(()))
        if moment.dim() == 0:
            return eye
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        share = values.cumsum(0) / values.sum()
        rank = int((share < self.settings.rank_share).sum()) + 1
        basis = vectors[:, :rank]
        rows = self.rows(key, "instruction", "response_positions")
        if not len(rows):
            return eye - basis @ basis.mT
        other = rows.mT @ rows / len(rows)
        gamma = self.settings.epsilon * other.trace() / width
        metric = torch.linalg.inv(other + gamma * eye)
        v = metric @ basis @ torch.linalg.inv(basis.mT @ metric @ basis)
        return eye - basis @ v.mT

    def change(
        self, key: tuple[str, int | None], rows: Tensor | None, cols: Tensor | None
    ) -> Tensor:
        """(S_row Delta S_col)(I - U V^T) of one weight, in the orientation (d_out, d_in)."""
        name, expert = key
        delta = self.deltas[name] if expert is None else self.deltas[name][expert]
        delta = delta.mT if self.transposed(name) else delta
        delta = delta if rows is None else rows[:, None] * delta
        delta = delta if cols is None else delta * cols
        return delta @ self.keep(key)

    def transposed(self, name: str) -> bool:
        """Whether the weight is stored as (d_in, d_out)."""
        module = self.reasoning_model.get_submodule(
            name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
        )
        batched = type(module).__name__ == "Llama4TextExperts"
        return batched or isinstance(module, Conv1D) or getattr(module, "is_transposed", False)

    def merged(self, scales: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> dict[str, Any]:
        """State dict of the merge with the given S_row and S_col, by parameter."""
        state = {n: w.clone() for n, w in self.reasoning_model.state_dict().items()}
        for key in self.keys:
            name, expert = key
            change = self.change(key, *scales.get(name, (None, None)))
            change = change.mT if self.transposed(name) else change
            (state[name] if expert is None else state[name][expert]).add_(change)
        embedding = self.reasoning_model.get_input_embeddings().weight
        if embedding is self.reasoning_model.get_output_embeddings().weight:
            shared = [
                n
                for n, w in self.reasoning_model.state_dict(keep_vars=True).items()
                if w is embedding
            ]
            state |= dict.fromkeys(shared, state[self.head])
        return state


Scales = tuple["Tensor | None", "Tensor | None"]


def recorded_scales(path: Path) -> dict[str, Scales]:
    """S_row and S_col by parameter, read with safetensors alone; of what has heads only."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["header"])

        def vector(key: str | None) -> Tensor | None:
            return None if key is None else file.get_tensor(key).double()

        return {
            name: (vector(plan["rows"]), vector(plan["cols"]))
            for name, plan in header["tensors"].items()
        }


def recorded_tokens(path: Path) -> Tensor:
    """Which rows of the head are merged: 0 or 1 for each token."""
    with safe_open(path, framework="pt") as file:
        plans = json.loads(file.metadata()["header"])["tensors"].values()
        (key,) = {plan["rows"] for plan in plans if plan.get("tokens")}
        return file.get_tensor(key).double()


def layer_means(path: Path) -> dict[str, float]:
    """The mean coefficient of each layer that has some."""
    with safe_open(path, framework="pt") as file:
        layers = json.loads(file.metadata()["header"])["layers"]
        return {one["name"]: float(file.get_tensor(one["stats"]["alpha"]).mean()) for one in layers}


def store_as_modules(folder: Path) -> None:
    """The checkpoint as transformers' modules have it, experts in one tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {n: w.clone().contiguous() for n, w in model.state_dict().items() if n != "lm_head"}
    # Written anew: mergekit still maps the other file, in this process.
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
