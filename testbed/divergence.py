"""How far a model's next-token distributions are from the reasoning model's, by place in the text.

The text is the reasoning model's ideal output, teacher-forced: right thinking, plain answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from testbed.models import opens_block, render
from testbed.scoring import CLOSE, OPEN

WINDOW = 5
BATCH = 64
PLACES = ("L_think", "L_mid", "L_other")


@dataclass(frozen=True)
class Marked:
    """Token ids of one text and, per place, the positions whose next-token distribution counts."""

    ids: list[int]
    positions: dict[str, list[int]]


def places(
    length: int, prompt: int, opening: int, closing: int, opened: bool
) -> dict[str, list[int]]:
    """Think positions (markers and their windows), the rest of the block, and what follows it.

    Where the template does not open the block, the token before the open marker belongs to the
    think positions: its distribution decides that thinking starts.
    """
    first = opening if opened else prompt - 1
    think = [t for t in range(first, closing + 1) if t <= opening + WINDOW or t >= closing - WINDOW]
    middle = [t for t in range(first, closing + 1) if t not in set(think)]
    return {"L_think": think, "L_mid": middle, "L_other": list(range(closing + 1, length - 1))}


def marked(tokenizer: PreTrainedTokenizerFast, record: Mapping[str, Any]) -> Marked:
    """One text with its places."""
    head, opened = render(tokenizer, record["prompt"]), opens_block(tokenizer)
    block = f"{record['thinking']}{record['before_close']}{CLOSE}\n\n"
    start = block if opened else f"{OPEN}\n{block}"
    answer = f"{record['lead']} {' '.join(record['answer'])}"
    text = f"{head}{start}{answer}{tokenizer.eos_token}"
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    prompt = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    opening = ids.index(tokenizer.convert_tokens_to_ids(OPEN))
    closing = ids.index(tokenizer.convert_tokens_to_ids(CLOSE))
    return Marked(ids, places(len(ids), prompt, opening, closing, opened))


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, texts: Sequence[Marked]) -> list[torch.Tensor]:
    """Log-probabilities at every position of every text."""
    found: list[torch.Tensor] = []
    for start in range(0, len(texts), BATCH):
        chosen = texts[start : start + BATCH]
        width = max(len(text.ids) for text in chosen)
        ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in chosen])
        logits = model(input_ids=ids).logits.float().log_softmax(-1)
        found += [logits[row, : len(text.ids)] for row, text in enumerate(chosen)]
    return found


def divergences(
    reference: PreTrainedModel, model: PreTrainedModel, texts: Sequence[Marked]
) -> dict[str, float]:
    """Mean KL(reference ‖ model) per place, over all positions of all texts."""
    totals, counts = dict.fromkeys(PLACES, 0.0), dict.fromkeys(PLACES, 0)
    pairs = zip(log_probabilities(reference, texts), log_probabilities(model, texts), strict=True)
    for text, (wanted, got) in zip(texts, pairs, strict=True):
        apart = (wanted.exp() * (wanted - got)).sum(-1)
        for place, positions in text.positions.items():
            totals[place] += float(apart[positions].sum())
            counts[place] += len(positions)
    return {place: totals[place] / max(counts[place], 1) for place in PLACES}
