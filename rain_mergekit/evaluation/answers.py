"""Counts over a model's answers, and what a merged model does worse than the reasoning model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from scipy.stats import fisher_exact

from rain_mergekit.evaluation.answer_measures import Measured

# What chance would show less often than this, in any of the counts together, is damage.
SIGNIFICANCE = 0.05
LONGER = 2.0  # times the tokens of the reasoning model: worth a look, whatever they say


@dataclass(frozen=True)
class Behaviour:
    """Counts over one model's answers, one to each prompt; lengths are in tokens.

    Attributes:
        prompts: all of them.
        unopened: answers without a thinking block.
        unclosed: answers that ended in the middle of the block.
        empty: answers with nothing in the block.
        cut: answers that the token limit ended before the close marker: whether the block would
            have been closed is not known.
        tokens: mean length of the blocks that were closed; None if there is none.
        asked: prompts with instructions that a rule can check.
        obedient: those of them whose response follows all of its instructions.
        instructions: instructions that a rule can check.
        followed: those of them that the response follows.
        several: answers with more than one block.
        looped: answers that repeat themselves without end.
        switched: answers in scripts that the prompt does not have.
        keys: prompts whose right answer is known.
        correct: those of them that were answered rightly.
        length: mean length of all that was written.
        middle: median length of all that was written.
        bound: prompts with instructions for the thinking.
        heeded: those of them whose thinking follows all of its instructions.
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
    several: int = 0
    looped: int = 0
    switched: int = 0
    keys: int = 0
    correct: int = 0
    length: float = 0.0
    middle: float = 0.0
    bound: int = 0
    heeded: int = 0

    @property
    def broken(self) -> int:
        """Prompts without a whole thinking block, those not counted whose answer was cut."""
        return self.unopened + self.unclosed + self.empty


def behaviour(answers: Sequence[Measured]) -> Behaviour:
    """Sum up one model's answers.

    Only the response after a closed block counts for instructions and keys: an answer without one
    follows none of them, whatever it looks like.
    """
    lengths = [one.thinking for one in answers if one.whole]
    open_ended = [one for one in answers if one.opened and not one.closed]
    checked = [
        [good and _responds(one) for good in one.followed]
        for one in answers
        if one.followed is not None
    ]
    keys = [one for one in answers if one.correct is not None]
    return Behaviour(
        prompts=len(answers),
        unopened=sum(not one.opened for one in answers),
        unclosed=sum(one.finished for one in open_ended),
        empty=sum(one.empty for one in answers),
        cut=sum(not one.finished for one in open_ended),
        tokens=fmean(lengths) if lengths else None,
        asked=len(checked),
        obedient=sum(all(found) for found in checked),
        instructions=sum(len(found) for found in checked),
        followed=sum(sum(found) for found in checked),
        several=sum(one.blocks > 1 for one in answers),
        looped=sum(one.looped for one in answers),
        switched=sum(one.switched for one in answers),
        keys=len(keys),
        correct=sum(bool(one.correct) and _responds(one) for one in keys),
        length=fmean(one.tokens for one in answers) if answers else 0.0,
        bound=sum(one.mindful is not None for one in answers),
        heeded=sum(one.mindful is True for one in answers),
        middle=median(one.tokens for one in answers) if answers else 0.0,
    )


def _responds(one: Measured) -> bool:
    return one.opened and one.closed


@dataclass(frozen=True)
class Count:
    """A count of `Behaviour`: `found` answers out of `of`. bad: a larger count is worse."""

    name: str
    found: Callable[[Behaviour], int]
    of: Callable[[Behaviour], int]
    bad: bool = True


# In the order in which messages name them. Of an answer that was cut nothing is known of its block.
COUNTS = (
    Count("broken blocks", lambda b: b.broken, lambda b: b.prompts - b.cut),
    Count("several blocks", lambda b: b.several, lambda b: b.prompts),
    Count("loops", lambda b: b.looped, lambda b: b.prompts),
    Count("cut off while thinking", lambda b: b.cut, lambda b: b.prompts),
    Count("other language", lambda b: b.switched, lambda b: b.prompts),
    Count("right answers", lambda b: b.correct, lambda b: b.keys, bad=False),
    Count("instructions followed", lambda b: b.obedient, lambda b: b.asked, bad=False),
    Count("thinking as told", lambda b: b.heeded, lambda b: b.bound, bad=False),
)


def worse(merged: Behaviour, reasoning: Behaviour) -> list[Count]:
    """What the merged model does worse than the reasoning model, and not by chance.

    Fisher's exact test, one-sided, of each count; at 5 % for all of them together (Bonferroni),
    those left out in which both models are as good or as bad in every answer.
    """
    pairs = [[_bad(count, one) for one in (merged, reasoning)] for count in COUNTS]
    told = [any(bad for bad, _ in pair) and any(good for _, good in pair) for pair in pairs]
    level = SIGNIFICANCE / max(sum(told), 1)
    return [
        count
        for count, pair, counts in zip(COUNTS, pairs, told, strict=True)
        if counts and float(fisher_exact(pair, alternative="greater").pvalue) < level
    ]


def _bad(count: Count, one: Behaviour) -> tuple[int, int]:
    """Bad answers and good ones."""
    found, of = count.found(one), count.of(one)
    return (found, of - found) if count.bad else (of - found, found)


def longer(merged: Behaviour, reasoning: Behaviour) -> bool:
    """Whether the typical answer takes at least twice as many tokens as before."""
    return merged.middle >= LONGER * reasoning.middle > 0
