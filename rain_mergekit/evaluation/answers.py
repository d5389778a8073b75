"""Counts over a model's answers: complete thinking blocks, loops, instructions followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import fisher_exact

from rain_mergekit.evaluation.answer_measures import Measured

# More broken blocks than the reasoning model's count as damage below this p-value.
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Behaviour:
    """Counts over the answers to `prompts` prompts.

    unopened: no thinking block; unclosed: the turn ended in the middle of one; empty: nothing in
    it; cut: the token limit came before the close marker, so that nothing is known of the block.
    tokens: mean length of the blocks that were closed, None if there is none; length: of all that
    was written. instructions, followed, obedient: instructions that a rule can check, those
    followed, and prompts with all of theirs followed, out of `asked` prompts that have any.
    keys, correct: prompts whose answer is known, and those answered rightly.
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
    )


def _responds(one: Measured) -> bool:
    return one.opened and one.closed


def breaks_more(merged: Behaviour, reasoning: Behaviour) -> bool:
    """Whether the merged model breaks more blocks than the reasoning model, and not by chance.

    Fisher's exact test, one-sided, on the prompts whose answers were not cut.
    """
    table = [[one.broken, one.prompts - one.cut - one.broken] for one in (merged, reasoning)]
    return _more(table)


def loops_more(merged: Behaviour, reasoning: Behaviour) -> bool:
    """The same for answers that loop, of all."""
    return _more([[one.looped, one.prompts - one.looped] for one in (merged, reasoning)])


def _more(table: list[list[int]]) -> bool:
    return float(fisher_exact(table, alternative="greater").pvalue) < SIGNIFICANCE
