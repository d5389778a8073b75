"""The lines that `ask` and `compare` print; without heavy imports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rain_mergekit.system.untrusted_input import shortened
from rain_mergekit.system.wording import counted

if TYPE_CHECKING:
    from rain_mergekit.evaluation.answer_files import Answer, AnswerSet
    from rain_mergekit.evaluation.comparison import Difference, Example
    from rain_mergekit.evaluation.strengths import Strength

_OVER_LAMBDA = ("whole", "correct", "followed", "both", "heeded")
_SHOWN = 240  # characters of an answer


def fault_lines(
    sets: Sequence[AnswerSet], divergences: Mapping[str, float] | None = None
) -> Iterator[str]:
    """What users would complain of, a row a fault and a column a model.

    divergences: L_think by the model's name, of those where it is known.
    """
    from rain_mergekit.evaluation.answer_measures import FAULTS  # noqa: PLC0415
    from rain_mergekit.evaluation.answer_summary import fault_counts, means  # noqa: PLC0415

    counts, averages = [fault_counts(one) for one in sets], [means(one) for one in sets]
    wide = max(12, *(len(one.name) + 2 for one in sets))
    answers = "".join(f"{len(one.answers):>{wide}}" for one in sets)
    yield f"{'':<26}" + "".join(f"{one.name:>{wide}}" for one in sets)
    yield f"{'answers':<26}{answers}"
    for fault in (fault.name for fault in FAULTS):
        cells = [one.get(fault) for one in counts]
        if any(cells):
            shown = ("-" if cell is None else f"{cell.found}/{cell.of}" for cell in cells)
            yield f"{fault:<26}" + "".join(f"{text:>{wide}}" for text in shown)
    for name, label in (("thinking", "tokens of thinking"), ("answering", "tokens of response")):
        yield f"{label:<26}" + "".join(f"{one[name]:>{wide}.0f}" for one in averages)
    if divergences:
        values = (divergences.get(one.name) for one in sets)
        shown = ("-" if value is None else f"{value:.3g}" for value in values)
        yield f"{'L_think':<26}" + "".join(f"{text:>{wide}}" for text in shown)


def difference_lines(found: Sequence[Difference]) -> Iterator[str]:
    """One line a metric that differs or could: before, after, difference, interval, meaning."""
    yield f"  {'':<26}{'first':>9}{'second':>9}{'change':>10}   {'95 % interval':<22}meaning"
    for one in found:
        if one.metric.share and not (one.first or one.second):
            continue
        yield f"  {_row(one)}"


def _row(one: Difference) -> str:
    if one.metric.share:
        values = [f"{100 * value:.1f} %" for value in (one.first, one.second)]
        change, ends = f"{100 * one.mean:+.1f}", (100 * one.low, 100 * one.high)
        bounds = f"{ends[0]:+.1f} to {ends[1]:+.1f}"
    else:
        values = [f"{value:.3g}" for value in (one.first, one.second)]
        change, bounds = f"{one.mean:+.3g}", f"{one.low:+.3g} to {one.high:+.3g}"
    return (
        f"{one.metric.label:<26}{values[0]:>9}{values[1]:>9}{change:>10}   {bounds:<22}"
        f"{one.verdict}"
    )


def sentence(name: str, found: Sequence[Difference]) -> str:
    """The verdict in one line: what got worse, what got better, and what cannot be told."""
    parts = []
    for verdict in ("worse", "better", "not known"):
        members = [one for one in found if one.verdict == verdict and one.metric.good]
        if verdict == "not known":
            members = [one for one in members if one.first or one.second]
        if members:
            parts.append(f"{verdict}: " + ", ".join(map(_phrase, members)))
    loops = next((one for one in found if one.metric.name == "looped"), None)
    if loops is not None and not loops.second:
        parts.append(f"no loop in {counted(loops.prompts, 'prompt')}")
    parts += [
        f"tokens {100 * one.mean / one.first:+.0f} %"
        for one in found
        if one.metric.name == "tokens" and one.first
    ]
    return f"{name}: " + "; ".join(parts or ["no difference that counts"])


def _phrase(one: Difference) -> str:
    return f"{one.metric.label} {100 * one.mean:+.0f} points"


def strength_lines(found: Sequence[Strength]) -> Iterator[str]:
    """One line a lambda, in percent; those that no other beats are marked."""
    from rain_mergekit.evaluation.strengths import best  # noqa: PLC0415

    columns = [name for name in _OVER_LAMBDA if all(name in one.means for one in found)]
    marked = best(found)
    yield f"{'lambda':>8}{'L_think':>11}" + "".join(f"{n:>10}" for n in (*columns, "tokens"))
    for one in found:
        known = "-" if one.l_think is None else f"{one.l_think:.3g}"
        cells = "".join(f"{100 * one.means[name]:>10.1f}" for name in columns)
        mark = "  *" if one.name in marked else ""
        yield f"{one.strength:>8g}{known:>11}{cells}{one.means['tokens']:>10.0f}{mark}"
    yield "  * no other strength is better in one and as good in the other"


def example_lines(found: Sequence[Example]) -> Iterator[str]:
    """Both answers to prompts that were lost or won, shortened."""
    for one in found:
        change = "won" if one.won else "lost"
        yield f"  {change}, {one.metric.label}: {shortened(one.first.asked.text, _SHOWN)}"
        yield f"    first:  {_shown(one.first)}"
        yield f"    second: {_shown(one.second)}"


def _shown(answer: Answer) -> str:
    written = answer.written
    whole = written.text if written.reasoning is None else f"{written.reasoning} | {written.text}"
    return shortened(whole, _SHOWN) or "(nothing)"
