"""Greedy generation in batches, padded on the left."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.models.loading import render

MOST_TOKENS = 96
BATCH = 160


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[str]:
    """What the model says to each prompt, verbatim, without the token that ends its turn."""
    texts = [render(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    outputs = [""] * len(texts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for index, output in zip(
            chosen, _continue(model, tokenizer, [texts[i] for i in chosen]), strict=True
        ):
            outputs[index] = output
    return outputs


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> list[str]:
    inputs = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    produced = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=MOST_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [_text(tokenizer, row.tolist()) for row in produced[:, ids.shape[1] :]]


def _text(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:length]))
