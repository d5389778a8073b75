"""Counts over a model's answers: complete thinking blocks, and instructions followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from scipy.stats import fisher_exact
from transformers import PreTrainedTokenizerBase

from rain_mergekit.instructions.prompts import Asked
from rain_mergekit.instructions.rules import follows
from rain_mergekit.models.generation import Answer

# More broken blocks than the reasoning model's count as damage below this p-value.
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Behaviour:
    """Counts over the answers to `prompts` prompts.

    unopened: no thinking block; unclosed: the turn ended in the middle of one; empty: nothing in
    it; cut: the token limit came before the close marker, so that nothing is known of the block.
    tokens: mean length of the blocks that were closed, None if there is none.
    instructions, followed, obedient: instructions that a rule can check, those followed, and
    prompts with all of theirs followed, out of `asked` prompts that have any.
    """

    prompts: int
    unopened: int
    unclosed: int
    empty: int
    cut: int
    tokens: float | None
    asked: int
    obedient: int
    instructions: int
    followed: int

    @property
    def broken(self) -> int:
        """Prompts without a whole thinking block, those not counted whose answer was cut."""
        return self.unopened + self.unclosed + self.empty


def behaviour(
    asked: Sequence[Asked], answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase
) -> Behaviour:
    """Sum up one model's answers to the prompts, in the same order.

    Only the response after a closed block is checked against the instructions: an answer without
    one follows none of them, whatever the thinking looks like.
    """
    thoughts = [answer.thought for answer in answers]
    closed = [thought for thought in thoughts if thought.complete]
    lengths = [len(_ids(tokenizer, thought.thinking)) for thought in closed]
    open_ended = [a for a in answers if a.thought.opened and not a.thought.closed]
    checked = [
        follows(prompt, answer.thought.response if answer.thought.closed else "")
        for prompt, answer in zip(asked, answers, strict=True)
        if prompt.instructions
    ]
    return Behaviour(
        prompts=len(answers),
        unopened=sum(not thought.opened for thought in thoughts),
        unclosed=sum(answer.finished for answer in open_ended),
        empty=sum(t.opened and t.closed and not t.thinking for t in thoughts),
        cut=sum(not answer.finished for answer in open_ended),
        tokens=fmean(lengths) if lengths else None,
        asked=len(checked),
        obedient=sum(all(found) for found in checked),
        instructions=sum(len(found) for found in checked),
        followed=sum(sum(found) for found in checked),
    )


def breaks_more(merged: Behaviour, reasoning: Behaviour) -> bool:
    """Whether the merged model breaks more blocks than the reasoning model, and not by chance.

    Fisher's exact test, one-sided, on the prompts whose answers were not cut.
    """
    table = [[one.broken, one.prompts - one.cut - one.broken] for one in (merged, reasoning)]
    return float(fisher_exact(table, alternative="greater").pvalue) < SIGNIFICANCE


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
