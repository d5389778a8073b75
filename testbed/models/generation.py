"""Greedy generation in batches; finished texts leave their batch, so none waits for a loop."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from testbed.models.loading import render

MOST_TOKENS = 200
BATCH = 48
# transformers 5.2x renamed the argument
_ARGUMENTS = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


@dataclass(frozen=True)
class Output:
    """What the model said, verbatim, without the token that ends its turn."""

    text: str
    tokens: int
    ended: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    given: Sequence[str] | None = None,
    most: int = MOST_TOKENS,
    before: Sequence[Sequence[dict[str, str]]] | None = None,
) -> list[Output]:
    """The model's reply to each prompt, going on after what is `given` of it.

    before: the messages of each prompt's earlier turns.
    """
    begun, turns = given or [""] * len(prompts), before or [()] * len(prompts)
    texts = [
        tokenizer.encode(render(tokenizer, prompt, earlier) + start, add_special_tokens=False)
        for prompt, earlier, start in zip(prompts, turns, begun, strict=True)
    ]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Output] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        replies = _continue(model, [texts[i] for i in chosen], int(tokenizer.eos_token_id), most)
        for index, reply in zip(chosen, replies, strict=True):
            ended = reply[-1:] == [tokenizer.eos_token_id]
            words = reply[:-1] if ended else reply
            found[index] = Output(str(tokenizer.decode(words)), len(reply), ended)
    return [found[i] for i in range(len(texts))]


@torch.inference_mode()
def _continue(
    model: PreTrainedModel, texts: list[list[int]], stop: int, most: int
) -> list[list[int]]:
    """New tokens of each text, the stop token included where it came."""
    width = max(len(text) for text in texts)
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alive, replies, cache = list(range(len(texts))), [[] for _ in texts], DynamicCache()
    for _ in range(most):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        ).logits
        new = logits[:, -1].argmax(-1)
        for row, token in zip(alive, new.tolist(), strict=True):
            replies[row].append(token)
        keep = (new != stop).nonzero()[:, 0]
        if not len(keep):
            break
        if len(keep) < len(alive):
            cache.batch_select_indices(keep)
            alive = [alive[i] for i in keep.tolist()]
        ids, mask = new[keep, None], torch.nn.functional.pad(mask[keep], (0, 1), value=1)
        positions = positions[keep, -1:] + 1
    return replies
