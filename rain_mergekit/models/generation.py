"""Greedy answers of a model to many prompts, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import default_dtype, read_model_config
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.thinking_blocks import Thought, split_thinking


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype | None) -> Any:
    """The whole model in evaluation mode; dtype None: float32 on the CPU, else its own.

    Raises RainError if it cannot be loaded, or has weights missing (they would be random).
    """
    dtype = dtype or default_dtype(read_model_config(checkpoint), device)
    model: Any
    found: Any
    try:
        model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            checkpoint.path,
            dtype=dtype,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RainError(f"{checkpoint.reference}: cannot be loaded: {lines[0]}") from None
    if missing := sorted(found["missing_keys"]):
        raise RainError(
            f"{checkpoint.reference}: weights are missing ({len(missing)}), such as {missing[0]}"
        )
    return model.to(device).eval()


_DEFAULT_MARKERS = Markers()
_GREEDY: Mapping[str, Any] = {"do_sample": False}


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one prompt; `finished`: it ended its turn within the token limit."""

    prompt: str
    text: str
    thought: Thought
    finished: bool


class Continued(NamedTuple):
    """What came after a prompt: tokens counts the one that ends the turn too."""

    text: str
    finished: bool
    tokens: int


def generate(  # noqa: PLR0913 - all but three by name
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    markers: Markers = _DEFAULT_MARKERS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tick: Callable[[int], object] = lambda _done: None,
) -> list[Answer]:
    """One answer to each prompt, in their order; `tick` is told of every finished batch.

    Prompts go through the chat template as a user's turn. Greedy: the same call gives the same
    answers, up to rounding that depends on the padding. Raises RainError without a chat template.
    """
    rendered = [render_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    order = sorted(range(len(rendered)), key=lambda index: len(rendered[index]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        written = continue_prompts(
            model, tokenizer, [rendered[index] for index in batch], max_new_tokens
        )
        for index, (text, finished, _) in zip(batch, written, strict=True):
            opened = bool(markers.opening(rendered[index]))
            thought = split_thinking(text, markers, opened_by_template=opened)
            answers[index] = Answer(prompts[index], text, thought, finished)
        tick(len(batch))
    return [answers[index] for index in range(len(rendered))]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The chat template with the prompt as a user's turn; RainError if there is no template."""
    if not tokenizer.chat_template:
        raise RainError(f"the tokenizer {tokenizer.name_or_path} has no chat template")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
    )
    return str(text)


def continue_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    limit: int,
    sampling: Mapping[str, Any] = _GREEDY,
) -> list[Continued]:
    """Each text, without the token that ends a turn, and whether it ended within `limit` tokens.

    prompts: rendered, from `render_prompt`. sampling: fields of transformers' GenerationConfig.
    """
    settings = generation_settings(model, tokenizer, limit, sampling)
    pad = settings.pad_token_id
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width = max(len(ids) for ids in encoded)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    with torch.inference_mode():
        produced = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
    rows: list[list[int]] = produced[:, width:].tolist()
    return [until_end(model, tokenizer, row) for row in rows]


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, limit: int, sampling: Mapping[str, Any]
) -> Any:
    """transformers' GenerationConfig with these fields, a limit, and what ends and pads answers."""
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    build: Any = GenerationConfig  # it has no types
    return build(
        **sampling, max_new_tokens=limit, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def until_end(model: Any, tokenizer: PreTrainedTokenizerBase, row: list[int]) -> Continued:
    """What a model wrote as text, up to the token that ends its turn."""
    ends = _end_tokens(model, tokenizer)
    length = next((i for i, token in enumerate(row) if token in ends), None)
    tokens = len(row) if length is None else length + 1
    return Continued(str(tokenizer.decode(row[:length])), length is not None, tokens)
