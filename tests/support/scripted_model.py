"""Transformers built by hand that write a script: which token comes after which, by prompt.

One layer of Qwen2, nothing trained. An embedding names its token; one attention head finds the
prompt, which is one token, and carries its number to every later place; the output head scores a
token by the one before it and by that number. The token that the script has next scores 2, and
any other at most 1 and what random vectors have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END, BEGIN = "<|end|>", "<|assistant|>"
SPECIAL = ("<|pad|>", "<|user|>", BEGIN, END, "<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WIDEST = 512  # of the part that names a token; up to as many have nothing in common
Script = Sequence[str]


def vocabulary(scripts: Iterable[Mapping[str, Script]]) -> dict[str, int]:
    """A token for every prompt and every text of these scripts."""
    listed = list(scripts)
    texts = [text for script in listed for text in script]
    texts += [text for script in listed for tokens in script.values() for text in tokens]
    return {text: index for index, text in enumerate(dict.fromkeys([*SPECIAL, *texts]))}


def write_model(folder: Path, script: Mapping[str, Script], words: Mapping[str, int]) -> Path:
    """A model that writes each prompt's texts and ends its turn; never, where the last ones repeat.

    A text must have the same follower wherever a script has it; if prompts differ in what follows
    it, in all of them.
    """
    names = _names(len(words))
    width, prompts = names.shape[1], list(script)
    size = width + 1 + 2 * len(prompts)
    size += size % 2 + 2
    model = Qwen2ForCausalLM(_config(len(words), size))
    for parameter in model.parameters():
        parameter.data.zero_()
    flag, own = width, width + 1
    carried = own + len(prompts)
    rows = model.model.embed_tokens.weight.data
    rows[:, :width] = names
    for index, prompt in enumerate(prompts):
        rows[words[prompt], [flag, own + index]] = 1.0
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        norm.weight.data.fill_(1.0)
    # The slowest rotation, so that it does not matter how far back the prompt is.
    layer.self_attn.q_proj.bias.data[-1] = 30.0 * size**0.5
    layer.self_attn.k_proj.weight.data[-1, flag] = 1.0
    for index in range(len(prompts)):
        layer.self_attn.v_proj.weight.data[index, own + index] = (3 / size) ** 0.5
        layer.self_attn.o_proj.weight.data[carried + index, index] = 1.0
    head = model.lm_head.weight.data
    for (before, prompt), after in _followers(script).items():
        named = head[words[after], :width]
        if prompt is None:
            named += 2.0 * names[words[before]]
        else:
            head[words[after], carried + prompts.index(prompt)] = 1.0
            if not named @ names[words[before]] > 0.5:
                named += names[words[before]]
    model.save_pretrained(folder)
    _tokenizer(words).save_pretrained(folder)
    return folder


def _names(count: int) -> Tensor:
    """A unit vector a token (count, width)."""
    if count <= WIDEST:
        return torch.eye(count)
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(count, WIDEST, generator=generator)
    return found / found.norm(dim=1, keepdim=True)


def _config(words: int, size: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        rms_norm_eps=1e-9,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
    )


def _followers(script: Mapping[str, Script]) -> dict[tuple[str, str | None], str]:
    """What follows a text after a prompt; prompt None: after all of them."""
    found: dict[str, dict[str, str]] = {}
    for prompt, tokens in script.items():
        loops = len(tokens) > 1 and tokens[-1] == tokens[-2]
        chain = [BEGIN, *tokens, *([] if loops else [END])]
        for before, after in pairwise(chain):
            known = found.setdefault(before, {}).setdefault(prompt, after)
            assert known == after, f"{before!r} has two followers after {prompt!r}"
    result: dict[tuple[str, str | None], str] = {}
    for before, after in found.items():
        if len(set(after.values())) == 1:
            result[before, None] = next(iter(after.values()))
        else:
            result |= {(before, prompt): text for prompt, text in after.items()}
    return result


def _tokenizer(words: Mapping[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(dict(words), unk_token=SPECIAL[0]))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in words])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[0], pad_token=SPECIAL[0], eos_token=END
    )
    fast.chat_template = TEMPLATE
    return fast
