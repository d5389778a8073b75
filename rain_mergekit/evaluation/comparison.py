"""Compare two models on the same prompts: paired differences, intervals, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_files import Answer, AnswerSet
from rain_mergekit.evaluation.answer_measures import Measured

RESAMPLES = 4000
_TAIL = 0.025
FEW = 30  # with fewer prompts intervals are rough


@dataclass(frozen=True)
class Metric:
    """One quantity of an answer. good: 1 if more of it is better, -1 if less is, 0 if neither.

    share: it is between 0 and 1, and told in percent.
    """

    name: str
    label: str
    good: int
    share: bool
    value: Callable[[Measured], float | bool | None]


METRICS = (
    Metric("whole", "whole thinking block", 1, True, lambda m: m.whole),
    Metric("unclosed", "block never closed", -1, True, lambda m: m.opened and not m.closed),
    Metric("several", "more than one block", -1, True, lambda m: m.blocks > 1),
    Metric("empty", "nothing in the block", -1, True, lambda m: m.empty),
    Metric("cut", "ended by the token limit", -1, True, lambda m: not m.finished),
    Metric("looped", "loops", -1, True, lambda m: m.looped),
    Metric("switched", "other language", -1, True, lambda m: m.switched),
    Metric("correct", "right answer", 1, True, lambda m: m.correct),
    Metric("followed", "instructions followed", 1, True, lambda m: m.obedient),
    Metric("both", "right and followed", 1, True, lambda m: m.both),
    Metric("heeded", "thinking as told", 1, True, lambda m: m.mindful),
    Metric("tokens", "tokens", 0, False, lambda m: m.tokens),
    Metric("thinking", "tokens of thinking", 0, False, lambda m: m.thinking),
    Metric("answering", "tokens of the response", 0, False, lambda m: m.answering),
    Metric("ngrams", "4-grams said before", 0, False, lambda m: m.repetition.ngrams),
    Metric("longest", "longest repeated span", 0, False, lambda m: m.repetition.longest),
    Metric("compression", "compression", 0, False, lambda m: m.repetition.compression),
)


@dataclass(frozen=True)
class Difference:
    """second - first over the prompts that both have: mean, and the interval that holds 95 %.

    verdict: better, worse, more or fewer where the interval leaves out 0 and the difference is as
    large as what counts; equal where all of the interval is smaller than that; else not known.
    """

    metric: Metric
    prompts: int
    first: float
    second: float
    low: float
    high: float
    least: float

    @property
    def mean(self) -> float:
        """The mean of second - first."""
        return self.second - self.first

    @property
    def verdict(self) -> str:
        """The verdict in a word, as the class describes."""
        if max(abs(self.low), abs(self.high)) < self.least:
            return "equal"
        real = self.low > 0 or self.high < 0
        if not real or abs(self.mean) < self.least:
            return "not known"
        if not self.metric.good:
            return "more" if self.mean > 0 else "fewer"
        return "better" if self.mean * self.metric.good > 0 else "worse"

    @property
    def loss(self) -> float:
        """How much worse the second is, at least; 0 if chance may explain the difference.

        Of a share as a part of 1, of other quantities relative to the first's mean.
        """
        towards = self.metric.good or -1
        ends = (self.low * towards, self.high * towards)
        if max(ends) >= 0:
            return 0.0
        scale = 1.0 if self.metric.share else self.first
        return -self.mean * towards / scale if scale else math.inf


def difference(
    first: AnswerSet, second: AnswerSet, metric: Metric, least: float
) -> Difference | None:
    """The paired difference of two models in one metric; None if no prompt has a value in both.

    Samples of one prompt are averaged. least: the smallest difference that counts, as a part of 1
    for shares, else of the first model's mean.
    """
    one, other = (prompt_means(answers, metric) for answers in (first, second))
    shared = [text for text in one if text in other]
    if not shared:
        return None
    before = torch.tensor([one[text] for text in shared], dtype=torch.float64)
    after = torch.tensor([other[text] for text in shared], dtype=torch.float64)
    low, high = interval(after - before, share=metric.share)
    mean = float(before.mean())
    counts = least if metric.share else least * abs(mean)
    return Difference(metric, len(shared), mean, float(after.mean()), low, high, counts)


def prompt_means(answers: AnswerSet, metric: Metric) -> dict[str, float]:
    """The mean over each prompt's samples; prompts without a value are left out."""
    found = {
        text: [float(v) for one in group if (v := metric.value(one.measured)) is not None]
        for text, group in answers.by_prompt.items()
    }
    return {text: fmean(values) for text, values in found.items() if values}


def interval(apart: Tensor, *, share: bool, seed: int = 0) -> tuple[float, float]:
    """The central 95 % of the means of resampled prompts; apart: a difference a prompt (N).

    Of shares, a prompt that was won and one that was lost are among those that are drawn from:
    prompts that have not differed so far may do so, and the interval is never of no width.
    """
    drawn_from = torch.cat([apart, apart.new_tensor([1.0, -1.0])]) if share else apart
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(RESAMPLES // 500):
        chosen = torch.randint(len(drawn_from), (500, len(apart)), generator=generator)
        means.append(drawn_from[chosen].mean(-1))
    ends = torch.cat(means).quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def differences(first: AnswerSet, second: AnswerSet, least: float) -> list[Difference]:
    """All metrics that both have; RainError if they share no prompt."""
    found = [difference(first, second, metric, least) for metric in METRICS]
    if not any(found):
        raise RainError(
            f"{first.path} and {second.path} share no prompt; let both models answer the same ones"
        )
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class Example:
    """Both answers to one prompt, the one good and the other not."""

    metric: Metric
    first: Answer
    second: Answer
    won: bool


def examples(first: AnswerSet, second: AnswerSet, names: Sequence[str], most: int) -> list[Example]:
    """Up to `most` prompts lost and as many won for each of the named metrics."""
    both = second.by_prompt
    pairs = [
        (one, other)
        for text, group in first.by_prompt.items()
        for one, other in zip(group, both.get(text, ()), strict=False)
    ]
    found = []
    for metric in (metric for metric in METRICS if metric.name in names):
        changed = [_example(metric, *pair) for pair in pairs]
        for won in (False, True):
            found += [one for one in changed if one is not None and one.won == won][:most]
    return found


def _example(metric: Metric, first: Answer, second: Answer) -> Example | None:
    values = [metric.value(answer.measured) for answer in (first, second)]
    before, after = (None if value is None else float(value) for value in values)
    if before is None or after is None or before == after:
        return None
    return Example(metric, first, second, (after - before) * metric.good > 0)


def broken_bounds(
    found: Sequence[Difference], bounds: Mapping[str, float]
) -> list[tuple[Difference, float]]:
    """The differences whose loss, beyond chance, is larger than its bound (a part of 1)."""
    return [
        (one, bounds[one.metric.name])
        for one in found
        if one.metric.name in bounds and one.loss > bounds[one.metric.name]
    ]
