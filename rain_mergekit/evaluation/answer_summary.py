"""One model's answers in numbers: means of every metric, and how many have each fault."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rain_mergekit.evaluation.answer_files import Answer, AnswerSet
from rain_mergekit.evaluation.answer_measures import FAULTS, faults
from rain_mergekit.evaluation.comparison import METRICS, prompt_means


@dataclass(frozen=True)
class FaultCount:
    """Answers with a fault, of those that can have it (a wrong answer needs a key)."""

    found: int
    of: int


def fault_counts(answers: AnswerSet) -> dict[str, FaultCount]:
    """For every fault that some answer can have."""
    measured = [one.measured for one in answers.answers]
    found = {}
    for fault in FAULTS:
        seen = [value for one in measured if (value := fault.seen(one)) is not None]
        if seen:
            found[fault.name] = FaultCount(sum(seen), len(seen))
    return found


def means(answers: AnswerSet) -> dict[str, float]:
    """The mean of every metric over the prompts that have it, samples averaged first."""
    values = {metric.name: prompt_means(answers, metric) for metric in METRICS}
    return {name: fmean(found.values()) for name, found in values.items() if found}


def summary(answers: AnswerSet) -> dict[str, Any]:
    """Means and faults as plain values, for `--json`."""
    return {
        "name": answers.name,
        "path": answers.path,
        "made_with": dict(answers.head),
        "prompts": len(answers.by_prompt),
        "answers": len(answers.answers),
        "means": means(answers),
        "faults": {n: {"count": c.found, "of": c.of} for n, c in fault_counts(answers).items()},
    }


def answer_row(answer: Answer) -> dict[str, Any]:
    """One answer with its measures as plain values, for `--json`."""
    found = answer.measured
    loop = found.repetition.loop
    return {
        **answer.asked.record(),
        "sample": answer.sample,
        "text": answer.written.text,
        "reasoning": answer.written.reasoning,
        "faults": list(faults(found)),
        "metrics": {metric.name: metric.value(found) for metric in METRICS},
        "loop": None if loop is None else {"period": loop.period, "times": loop.times},
    }
