"""Tiny random models of every supported family, calibration sets over them, and a dense reference.

The reference never streams: it runs transformers' whole model in float64 with eager attention and
hooks, forms every d x d matrix explicitly, and follows the equations one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import CalibrationSummary, calibrate
from rain_mergekit.config.merge_config import RainConfig, read_config
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SITES: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ATTENTION,
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
MODULES = tuple(module for members in SITES.values() for module in members)

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>")

REASONING = (
    ("How many days are in two weeks?", "A week has seven days, so two have fourteen.", "14 days."),
    ("Is 51 prime?", "51 is 3 times 17, so it has divisors.", "No, 51 = 3 x 17."),
    ("Name the larger one: 9 or 11.", "Eleven is two more than nine.", "11 is larger."),
)
INSTRUCTION = (
    {
        "prompt": "Which colour has grass? Answer in capitals.",
        "reason": "Grass is green, and capitals are asked for.",
        "response": "It is GREEN, I think.",
        "related_prompt_list": [
            {
                "instruction_id": "capitals",
                "prompt_spans": ["Answer in capitals."],
                "response_spans": ["GREEN"],
                "unrelated_response_spans": [", I think"],
            }
        ],
    },
    {
        "prompt": "Count to three. Use commas. End with a dot.",
        "reason": "One, two, three; then the dot.",
        "response": "one, two, three.",
        "related_prompt_list": [
            {"prompt_spans": ["Use commas."], "response_spans": [", two, "]},
            {
                "prompt_spans": ["End with a dot."],
                "response_spans": ["."],
                "unrelated_response_spans": ["one"],
            },
        ],
        "unrelated_response_spans": ["three"],
    },
    {
        "prompt": "Say hello in brackets.",
        "reason": "The word goes between brackets.",
        "response": "[hello]",
        "related_prompt_list": [{"prompt_spans": ["in brackets"], "response_spans": ["[hello]"]}],
    },
)

_BASE = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # q/k/v biases, grouped heads, tied embeddings
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    # QK-norm, a head size that is not hidden_size / heads, one KV head
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16},
    # as many KV heads as heads, no bias anywhere, untied embeddings
    "llama": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    # bias on all seven modules
    "llama-bias": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    # a window that is shorter than every text, and reaches some of the instructions
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 36},
}


def model_config(family: str, **changes: Any) -> Any:
    options = {**_BASE, **FAMILIES[family], **changes}
    return AutoConfig.for_model(options.pop("model_type"), **options)


def random_weights(model: nn.Module, scale: float) -> None:
    """Add noise to every parameter, biases and norms too: defaults of 0 and 1 would hide errors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 1.0 if parameter.dim() == 1 else 2.0
            parameter.add_(torch.randn_like(parameter) * scale * size)
            if "embed" in name:
                parameter.add_(torch.randn_like(parameter))


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the texts above, as real models have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [part for sample in REASONING for part in sample] + [json.dumps(INSTRUCTION)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",  # noqa: S106 - no password
        eos_token="<|end|>",  # noqa: S106
    )
    if template is not None:
        fast.chat_template = template
    return fast


@dataclass(frozen=True)
class Tiny:
    """Three models on disk, both calibration sets, and the YAML that drives both steps."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = "tiny.rain.safetensors"

    @classmethod
    def make(
        cls,
        folder: Path,
        family: str,
        dtype: torch.dtype = torch.float32,
        *,
        shard: str | None = None,
        **changes: Any,
    ) -> Tiny:
        """`shard` is the largest size of a checkpoint's part, in transformers' notation."""
        torch.manual_seed(7)
        config = model_config(family, **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        random_weights(model, 0.1)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        tokenizer = make_tokenizer()
        for role in ("pretrained", "instruct", "reasoning"):
            model.load_state_dict(start)
            if role != "pretrained":
                random_weights(model.get_submodule("model.layers"), 0.03)
            save(model, folder / role, dtype, shard)
            tokenizer.save_pretrained(folder / role)
        write_sets(folder)
        return cls(folder)

    def with_head(self, name: str) -> Tiny:
        """Change the instruct model's output head, or the embedding that is its head."""
        path = self.folder / "instruct" / "model.safetensors"
        weights, chance = load_file(path), torch.Generator().manual_seed(5)
        noise = torch.randn(weights[name].shape, generator=chance) * 0.2
        weights[name] += noise.to(weights[name].dtype)
        save_file(weights, path, metadata={"format": "pt"})
        return self

    def using(self, calibration: str = "tiny.rain.safetensors", **settings: Any) -> Tiny:
        """The same models with another `rain:` section."""
        return Tiny(self.folder, settings, calibration)

    @property
    def path(self) -> Path:
        """Of the calibration file."""
        return self.folder / self.calibration

    def content(self, **changes: Any) -> dict[str, Any]:
        """The YAML; `None` removes an entry."""
        rain = changes.get("merge_method", "rain") == "rain"  # the other methods have no `fit`
        content = {
            "merge_method": "rain",
            "base_model": str(self.folder / "reasoning"),
            "models": [
                {"model": str(self.folder / role), "parameters": {"role": role}}
                for role in ("instruct", "pretrained")
            ],
            "parameters": {"calibration": str(self.path)},
            "rain": {
                "reasoning_data": str(self.folder / "reasoning.jsonl"),
                "instruction_data": str(self.folder / "instruction.jsonl"),
                "accept": ["no_thinking"],  # random models do not
                **({"fit": "projection"} if rain else {}),
                **self.settings,
            },
        }
        content.update(changes)
        return {key: value for key, value in content.items() if value is not None}

    def config(self, **changes: Any) -> RainConfig:
        path = self.path.with_suffix(".yml")
        path.write_text(yaml.safe_dump(self.content(**changes)))
        return read_config(path)

    def calibrate(self, **options: Any) -> CalibrationSummary:
        return calibrate(self.config(), RunOptions(quiet=True, **options))

    def weights(self, role: str) -> dict[str, Tensor]:
        return read_weights(self.folder / role)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.folder / "reasoning")

    def model(self, role: str = "reasoning", **options: Any) -> Any:
        """The whole model as transformers loads it."""
        options = {"dtype": torch.float64, "attn_implementation": "eager", **options}
        return AutoModelForCausalLM.from_pretrained(self.folder / role, **options).eval()


def unaccepted(warnings: Sequence[str]) -> list[str]:
    """Those that are not about random models being no reasoning models."""
    return [text for text in warnings if not text.endswith("(accepted)")]


def save(model: Any, folder: Path, dtype: torch.dtype, shard: str | None = None) -> None:
    """Save in `dtype` and go on in float32."""
    model.to(dtype)
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    model.to(torch.float32)


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(part))
    return weights


def shard(folder: Path) -> None:
    """The checkpoint in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sets(folder: Path) -> None:
    keys = ("prompt", "reasoning", "response")
    reasoning = [dict(zip(keys, sample, strict=True)) for sample in REASONING]
    for name, samples in (("reasoning", reasoning), ("instruction", INSTRUCTION)):
        lines = [json.dumps(sample) for sample in samples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@contextmanager
def linear_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs (T, d) of every linear module in the forward pass inside, by the module's name."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, args: inputs.update({name: args[0].detach().flatten(0, -2)})

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@cache
def whole_forward(folder: Path, texts: tuple[tuple[int, ...], ...]) -> list[dict[str, Tensor]]:
    """Inputs of every linear module of the whole reasoning model in float64, for each text."""
    model, found = Tiny(folder).model(), []
    for ids in texts:
        with linear_inputs(model) as inputs, torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        found.append(inputs)
    return found


@dataclass(frozen=True)
class DenseSite:
    """Everything about one input site, d x d matrices formed explicitly, float64."""

    think: Tensor
    moment: Tensor
    instruction_moment: Tensor
    values: Tensor
    basis: Tensor
    v: Tensor

    @property
    def keep(self) -> Tensor:
        """I - U V^T."""
        return torch.eye(len(self.basis), dtype=torch.float64) - self.basis @ self.v.mT


def chosen_positions(sample: Any, name: str) -> list[int]:
    """The positions of that name; `prompt_positions` too, which samples do not hold."""
    if name == "prompt_positions":  # all that comes before the first protected position
        return list(range(min(sample.think_positions)))
    return list(getattr(sample, name))


class Dense:
    """The method on the whole model at once, float64, from its description."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.settings = tiny.config().settings
        window = self.settings.window
        tokenizer = tiny.tokenizer()
        keep = self.settings.protect_response > 0 or self.settings.reading_share > 0
        keep = keep or self.settings.lm_head == "unseen"
        self.reasoning: Sequence[ReasoningTokens] = load_reasoning(
            self.settings.reasoning_data, tokenizer, window=window, keep_response=keep
        ).samples
        self.instruction: Sequence[InstructionTokens] = load_instruction(
            str(self.settings.instruction_data), tokenizer, window=window
        ).samples
        self.weights = {
            role: {name: value.double() for name, value in tiny.weights(role).items()}
            for role in ("reasoning", "instruct", "pretrained")
        }
        self.config = AutoConfig.from_pretrained(tiny.folder / "reasoning")
        self.layers = self.config.num_hidden_layers

    def delta(self, name: str) -> Tensor:
        reasoning, instruct, origin = (weights[name] for weights in self.weights.values())
        return (instruct - origin) - self.settings.gamma * (reasoning - origin)

    @cached_property
    def features(self) -> dict[str, list[dict[str, Tensor]]]:
        """Inputs of every linear module of the reasoning model, by set and sample."""
        sets = {"reasoning": self.reasoning, "instruction": self.instruction}
        texts = {kind: tuple(s.input_ids for s in samples) for kind, samples in sets.items()}
        return {kind: whole_forward(self.tiny.folder, ids) for kind, ids in texts.items()}

    def rows(self, module: str, positions: str, kind: str = "reasoning") -> Tensor:
        """Inputs of one module at the named positions of every sample, stacked."""
        samples = self.reasoning if kind == "reasoning" else self.instruction
        parts = [
            inputs[module][chosen_positions(sample, positions)]
            for sample, inputs in zip(samples, self.features[kind], strict=True)
        ]
        return torch.cat(parts)

    @cached_property
    def sites(self) -> dict[str, DenseSite]:
        return {
            f"model.layers.{layer}.{site}": self._site(f"model.layers.{layer}.", site)
            for layer in range(self.layers)
            for site in SITES
        }

    def head(self, delta: Tensor) -> DenseSite:
        """Of the map to the vocabulary, for the task vector of the rows that are merged."""
        return self._site("", "lm_head", delta)

    def _site(self, prefix: str, site: str, deltas: Tensor | None = None) -> DenseSite:
        options, name = self.settings, prefix + site
        think = self.rows(name, "think_positions")
        moment = think.mT @ think / len(think)
        for positions, weight in (
            ("content_positions", options.protect_thinking),
            ("prompt_positions", options.protect_prompt),
            ("response_positions", options.protect_response),
        ):
            if weight:
                rows = self.rows(name, positions)
                moment = moment + weight * rows.mT @ rows / len(rows)
        rows = self.rows(name, "response_positions", "instruction")
        instruction = rows.mT @ rows / len(rows)
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0), vectors.flip(1)
        if deltas is None:
            deltas = torch.cat([self.delta(f"{prefix}{m}.weight") for m in SITES[site]])
        basis = vectors[:, self._chosen(values, vectors, deltas)]
        if site == "self_attn.q_proj" and options.reading_share > 0:
            for positions in ("prompt_positions", "response_positions"):
                basis = self._covering(basis, self.rows(name, positions), deltas)
        v = basis
        if options.projection == "oblique":
            width = len(moment)
            gamma = options.epsilon * instruction.trace() / width
            metric = torch.linalg.inv(instruction + gamma * torch.eye(width, dtype=torch.float64))
            v = metric @ basis @ torch.linalg.inv(basis.mT @ metric @ basis)
        return DenseSite(think, moment, instruction, values, basis, v)

    def _chosen(self, values: Tensor, vectors: Tensor, deltas: Tensor) -> list[int]:
        options = self.settings
        real = int((values > values[0] * 1e-10).sum())
        if options.rank_by == "full":
            return list(range(real))
        if options.rank_by == "count":
            return list(range(min(options.rank_count or 0, real)))
        if options.rank_by == "tolerance":
            return list(range(int((values > options.rank_tolerance**2 * values[0]).sum())))
        energy = values.clamp_min(0)
        if options.rank_by == "response_energy":
            energy = energy * (deltas @ vectors).square().sum(0)
        order = energy.argsort(descending=True).tolist()
        chosen: list[int] = []
        while energy[chosen].sum() < options.rank_share * energy.sum():
            chosen.append(order[len(chosen)])
        return chosen

    def _covering(self, basis: Tensor, rows: Tensor, deltas: Tensor) -> Tensor:
        """One direction more at a time, until enough of the rows' response is protected."""
        room = min(self.settings.max_rank or 96, basis.shape[0] - 1)
        rest = rows - rows @ basis @ basis.mT
        _, _, found = torch.linalg.svd(rest, full_matrices=False)
        answers = (deltas @ (rest @ found.mT @ found).mT).square().sum()
        allowed = (1 - self.settings.reading_share) * (deltas @ rows.mT).square().sum()
        strength = (
            (rest @ found.mT).square().sum(0) * (deltas @ found.mT).square().sum(0)
        ).tolist()
        for index in sorted(range(len(found)), key=lambda i: -strength[i]):
            if answers <= allowed or basis.shape[1] >= room:
                break
            basis = torch.cat([basis, found[index][:, None]], 1)
            answers = (deltas @ (rows - rows @ basis @ basis.mT).mT).square().sum()
        return basis

    def site_of(self, layer: int, module: str) -> DenseSite:
        owner = next(site for site, members in SITES.items() if module in members)
        return self.sites[f"model.layers.{layer}.{owner}"]

    def merged(self, alphas: Sequence[Tensor] | None = None, strength: float = 1.0) -> Any:
        """The model of Eq. 16 as a state dict; `alphas` by layer, None for ones."""
        heads = self.config.num_attention_heads
        weights = dict(self.weights["reasoning"])
        for layer in range(self.layers):
            alpha = torch.ones(heads, dtype=torch.float64) if alphas is None else alphas[layer]
            for module in MODULES:
                name = f"model.layers.{layer}.{module}.weight"
                scaled = self.scaled(module, self.delta(name), alpha)
                weights[name] = weights[name] + strength * scaled @ self.site_of(layer, module).keep
        return weights

    def scaled(self, module: str, delta: Tensor, alpha: Tensor) -> Tensor:
        """S_row Delta S_col, one head's block after the other."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        result, group = delta.clone(), heads // kv_heads
        if module == "self_attn.q_proj":
            for head in range(heads):
                result[head * size : (head + 1) * size] *= alpha[head]
        elif module in ("self_attn.k_proj", "self_attn.v_proj"):
            for head in range(kv_heads):
                mean = sum(alpha[head * group + member] for member in range(group)) / group
                result[head * size : (head + 1) * size] *= mean
        elif module == "self_attn.o_proj":
            for head in range(heads):
                result[:, head * size : (head + 1) * size] *= alpha[head]
        else:
            result *= sum(alpha) / heads
        return result

    @cached_property
    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """E[a] and E[u] of each layer, from eager attention in the model at alpha = lambda = 1."""
        model = self.tiny.model()
        state = model.state_dict()
        merged = self.merged()
        model.load_state_dict({name: merged.get(name, state[name]) for name in state})
        return attention_statistics(model, self.instruction, self.settings.leakage_from_thinking)


def attention_statistics(
    model: Any, samples: Sequence[InstructionTokens], from_thinking: bool
) -> list[tuple[Tensor, Tensor]]:
    """Eqs. 9-12 with transformers' own attention weights: (E[a], E[u]) of each layer."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    alignment = torch.zeros(layers, heads, dtype=torch.float64)
    leakage = torch.zeros(layers, heads, dtype=torch.float64)
    for sample in samples:
        with torch.no_grad():
            ids = torch.tensor([sample.input_ids])
            attentions = model(input_ids=ids, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            for span in sample.spans:
                unrelated = set(span.unrelated)
                if from_thinking:
                    unrelated |= set(sample.thinking_positions)
                part = len(samples) * len(sample.spans)
                alignment[layer] += _mass(weights[0], span.related, span.prompt) / part
                leakage[layer] += _mass(weights[0], sorted(unrelated), span.prompt) / part
    return list(zip(alignment, leakage, strict=True))


def _mass(attention: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Mean over the rows of the summed attention on the columns, by head; 0 without rows."""
    total = torch.zeros(len(attention), dtype=torch.float64)
    for row in rows:
        for column in columns:
            total += attention[:, row, column].double() / len(rows)
    return total
