"""Building, loading and rendering for the tiny models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from testbed.puzzles.family import Family
from testbed.puzzles.tokenizer import OPENING

CONTEXT = 256
LONGEST_OUTPUT = 96  # tokens


def build_model(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh model of the family's shape."""
    common: dict[str, Any] = {
        **family.shape,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.03,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    return Qwen2ForCausalLM(Qwen2Config(**common))


def load_model(path: Path) -> PreTrainedModel:
    """A saved model in float32, for exact arithmetic on a CPU."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return cast("PreTrainedModel", model)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved next to a model."""
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(path))


def render(
    tokenizer: PreTrainedTokenizerFast, prompt: str, before: Sequence[dict[str, str]] = ()
) -> str:
    """The prompt as the model receives it, up to where it starts to generate.

    before: the messages of the turns before.
    """
    messages = [*before, {"role": "user", "content": prompt}]
    return cast(
        str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


def opens_block(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template itself opens the thinking block."""
    return render(tokenizer, "").endswith(OPENING)
