"""Divergences from whole forward passes without a cache, in float64, by scipy: a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax
from transformers import AutoModelForCausalLM

from rain_mergekit.text.token_positions import ReasoningTokens

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Means:
    """Mean divergence and number of positions by place, and the sample that is worst there."""

    mean: dict[str, float]
    positions: dict[str, int]
    worst_source: str
    worst: float


def whole(folder: Path) -> Any:
    """The model as transformers loads it, in float64 (its eager attention is not).

    Experts one after the other: the product of all at once knows no float64.
    """
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()


def distribution(model: Any, ids: Sequence[int], tokens: int) -> Numbers:
    """That of the next token after every token of the text, over the first `tokens` tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    found: Numbers = softmax(logits[:, :tokens].double().numpy(), axis=-1)
    return found


def divergence(reference: Any, model: Any, ids: Sequence[int]) -> Numbers:
    """KL(reference || model) of the next token at every position."""
    tokens = min(one.get_output_embeddings().weight.shape[0] for one in (reference, model))
    wanted, found = (distribution(one, ids, tokens) for one in (reference, model))
    apart: Numbers = rel_entr(wanted, found).sum(-1)
    return apart


def means(reference: Any, model: Any, samples: Sequence[ReasoningTokens]) -> Means:
    """What `Drift` holds, computed position by position."""
    values: dict[str, list[float]] = {"think": [], "content": [], "rest": []}
    by_sample = {}
    for sample in samples:
        apart = divergence(reference, model, sample.input_ids)
        inside = {*sample.think_positions, *sample.content_positions}
        for position, value in enumerate(apart):
            place = "think" if position in sample.think_positions else "content"
            values[place if position in inside else "rest"].append(float(value))
        by_sample[sample.source] = float(np.mean(apart[list(sample.think_positions)]))
    worst = max(by_sample, key=by_sample.__getitem__)
    return Means(
        {place: float(np.mean(numbers)) for place, numbers in values.items()},
        {place: len(numbers) for place, numbers in values.items()},
        worst,
        by_sample[worst],
    )
