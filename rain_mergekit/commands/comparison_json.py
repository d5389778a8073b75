"""What `mergekit-rain compare` found, for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rain_mergekit.commands.answer_text import sentence
from rain_mergekit.evaluation.answer_files import AnswerSet
from rain_mergekit.evaluation.answer_summary import answer_row, summary
from rain_mergekit.evaluation.comparison import Difference, Example
from rain_mergekit.evaluation.strengths import Strength, best


def content(
    sets: list[AnswerSet],
    found: dict[str, tuple[list[Difference], list[Example]]],
    broken: dict[str, list[tuple[Difference, float]]],
    over: list[Strength],
    divergences: Mapping[str, float],
) -> dict[str, Any]:
    """The object that is printed: models, pairs, strengths.

    broken: bounds by the pair's name. divergences: L_think by the model's, where it is known.
    """
    top = best(over) if over else set()
    pairs = [
        {
            "first": sets[0].name,
            "second": name,
            "verdict": sentence(name, rows),
            "differences": [_difference(one) for one in rows],
            "bounds_broken": [one.metric.name for one, _ in broken[name]],
            "examples": [
                {
                    "metric": one.metric.name,
                    "won": one.won,
                    "first": answer_row(one.first),
                    "second": answer_row(one.second),
                }
                for one in examples
            ],
        }
        for name, (rows, examples) in found.items()
    ]
    return {
        "models": [{**summary(one), "l_think": divergences.get(one.name)} for one in sets],
        "pairs": pairs,
        "strengths": [
            {
                "name": one.name,
                "lambda": one.strength,
                "l_think": one.l_think,
                "best": one.name in top,
            }
            for one in over
        ],
    }


def _difference(one: Difference) -> dict[str, Any]:
    return {
        "metric": one.metric.name,
        "prompts": one.prompts,
        "first": one.first,
        "second": one.second,
        "difference": one.mean,
        "low": one.low,
        "high": one.high,
        "verdict": one.verdict,
    }
