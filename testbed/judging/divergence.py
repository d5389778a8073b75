"""How far a model's next-token distributions are from the reasoning model's, by place in the text.

The text is the reasoning model's ideal output, teacher-forced: right thinking, plain answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from rain_mergekit.evaluation.divergence_meter import DivergenceMeter
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, open_checkpoint
from rain_mergekit.text.token_positions import ReasoningTokens
from testbed.judging.scoring import CLOSE, OPEN
from testbed.models.loading import opens_block, render

WINDOW = 5
PLACES = ("L_think", "L_mid", "L_other")


@dataclass(frozen=True)
class Marked:
    """Token ids of one text and, per place, the positions whose next-token distribution counts."""

    input_ids: list[int]
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


def meter(reference: Path, texts: Sequence[Marked | ReasoningTokens]) -> DivergenceMeter:
    """What measures saved models against that one, in float32."""
    how = VerifyOptions(LoadOptions(), dtype=torch.float32)
    return DivergenceMeter.of(checkpoint(reference), texts, how)


def checkpoint(model: Path) -> Checkpoint:
    """A saved model, whatever its folder is called."""
    return open_checkpoint(str(model), LoadOptions())


def divergences(
    measuring: DivergenceMeter, model: Path, texts: Sequence[Marked]
) -> dict[str, float]:
    """Mean KL(reference ‖ model) per place, over all positions of all texts."""
    totals, counts = dict.fromkeys(PLACES, 0.0), dict.fromkeys(PLACES, 0)
    found = measuring.divergences(checkpoint(model))
    for text, apart in zip(texts, found, strict=True):
        for place, positions in text.positions.items():
            totals[place] += float(apart[positions].sum())
            counts[place] += len(positions)
    return {place: totals[place] / max(counts[place], 1) for place in PLACES}
