"""The page of `mergekit-rain compare`: tables, pictures, and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rain_mergekit.evaluation.answer_files import Answer, AnswerSet
from rain_mergekit.evaluation.answer_measures import FAULTS, faults
from rain_mergekit.evaluation.answer_summary import fault_counts, means
from rain_mergekit.evaluation.comparison import METRICS, Difference, Example
from rain_mergekit.evaluation.strengths import Strength, quality
from rain_mergekit.report import comparison_figures
from rain_mergekit.report.picture import Picture
from rain_mergekit.report.templates import fill

Pairs = Mapping[str, tuple[Sequence[Difference], Sequence[Example]]]
_OVER_LAMBDA = ("whole", "correct", "followed", "both", "heeded")
_LONGEST = 6000  # characters of an answer on the page


@dataclass(frozen=True)
class _Side:
    text: str
    faults: str


def render(
    sets: Sequence[AnswerSet],
    pairs: Pairs,
    found: Sequence[Strength] = (),
    divergences: Mapping[str, float] | None = None,
) -> str:
    """The page as HTML text; the first set is the one that the others are compared with.

    found: those that are one merge at several strengths, which get curves. divergences: L_think by
    the model's name, of those where it is known.
    """
    counts = {one.name: fault_counts(one) for one in sets}
    rows = [
        (fault.name, [counts[one.name].get(fault.name) for one in sets])
        for fault in FAULTS
        if any(fault.name in found for found in counts.values())
    ]
    return fill(
        "comparison.html",
        title=f"Answers of {', '.join(one.name for one in sets)}",
        sets=sets,
        rows=rows,
        overview=list(_overview(sets, divergences or {})),
        curves=list(_curves(found)),
        pairs=[
            (name, rows, list(_intervals(index, rows)), [_sides(one) for one in examples])
            for index, (name, (rows, examples)) in enumerate(pairs.items())
        ],
    )


def _overview(sets: Sequence[AnswerSet], divergences: Mapping[str, float]) -> Iterator[Picture]:
    """Right answers, and instructions followed, by tokens and by L_think."""
    found = {one.name: means(one) for one in sets}
    for name, up in (("correct", "right answers, percent"), ("followed", "followed, percent")):
        points = {
            model: (values["tokens"], 100 * values[name])
            for model, values in found.items()
            if name in values
        }
        if points:
            svg = comparison_figures.quality(f"q-{name}", "tokens", up, points, less=True)
            yield Picture(svg, f"{up[0].upper()}{up[1:]}, by tokens", name)
        points = {
            model: (divergences[model], 100 * values[name])
            for model, values in found.items()
            if name in values and model in divergences
        }
        if points:
            svg = comparison_figures.quality(f"l-{name}", "L_think, nats", up, points, less=True)
            yield Picture(svg, f"{up[0].upper()}{up[1:]}, by L_think", name)


def _curves(found: Sequence[Strength]) -> Iterator[Picture]:
    """What each strength does, and quality by L_think where that was measured."""
    if len(found) < 2:
        return
    lines = {
        metric.label: [(s.strength, 100 * s.means[metric.name]) for s in found]
        for metric in METRICS
        if metric.name in _OVER_LAMBDA and all(metric.name in s.means for s in found)
    }
    yield Picture(comparison_figures.curves("c", lines), "Qualities over lambda", "lambda")
    name = quality(found)
    points = {
        f"{s.strength:g}": (s.l_think, 100 * s.means[name]) for s in found if s.l_think is not None
    }
    if points:
        up = next(metric.label for metric in METRICS if metric.name == name)
        svg = comparison_figures.quality("d", "L_think, nats", f"{up}, percent", points, less=True)
        yield Picture(svg, f"{up[0].upper()}{up[1:]}, by L_think", "l_think")


def _intervals(index: int, rows: Sequence[Difference]) -> Iterator[Picture]:
    shares = [one for one in rows if one.metric.share and (one.first or one.second)]
    if shares:
        svg = comparison_figures.intervals(f"i{index}", shares)
        yield Picture(svg, "Differences and their intervals", "intervals")


def _sides(one: Example) -> tuple[Example, _Side, _Side]:
    return one, _side(one.first), _side(one.second)


def _side(answer: Answer) -> _Side:
    written = answer.written
    text = written.text if written.reasoning is None else f"{written.reasoning}\n\n{written.text}"
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}\n…\n{text[-_LONGEST // 2 :]}"
    return _Side(text, ", ".join(faults(answer.measured)) or "nothing wrong")
