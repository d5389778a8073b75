"""`mergekit-rain compare`: what a merge won and lost, on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, typed
from rain_mergekit.system.wording import counted

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.evaluation.answer_files import AnswerSet
    from rain_mergekit.evaluation.comparison import Difference, Example
    from rain_mergekit.evaluation.strengths import Strength

_WORSE = 3
_EXAMPLES = ("whole", "looped", "correct", "followed", "heeded")


@dataclass(frozen=True)
class CompareOptions:
    """What the command line says."""

    answers: tuple[str, ...]
    least: float
    bounds: dict[str, float]
    examples: int
    html: str | None
    sweep: str | None
    verified: dict[str, str]
    as_json: bool
    talk: Talk


def _parse_bounds(_context: object, _option: object, values: tuple[str, ...]) -> dict[str, float]:
    from rain_mergekit.evaluation.comparison import METRICS  # noqa: PLC0415 - keeps --help fast

    found = {}
    known = [metric.name for metric in METRICS]
    for text in values:
        name, _, number = text.partition("=")
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
        try:
            found[name] = float(number) / 100
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER, such as correct=3") from None
    return found


def _parse_verified(_context: object, _option: object, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=")[::2] for text in values]
    for text, (name, path) in zip(values, pairs, strict=True):
        if not name or not path:
            raise click.BadParameter(f"{text!r} is not NAME=FILE, such as merged=verify.json")
    return dict(pairs)


@click.command(
    epilog="\b\nExample:\n  mergekit-rain compare reasoning.jsonl merged.jsonl --bound correct=3 "
    "--bound looped=1 --html compare.html"
)
@click.argument("answers", nargs=-1, required=True, type=click.Path(), metavar="A B [C]...")
@click.option(
    "--least",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="The smallest difference that counts: points of a share, percent of a length.",
)
@click.option(
    "--bound",
    "bounds",
    multiple=True,
    metavar="NAME=NUMBER",
    callback=_parse_bounds,
    help="Exit with 3 if a model is worse than A by more than this, and not by chance: points of a "
    "share (correct, followed, both, whole, looped, cut, switched), percent of a length (tokens).",
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Show this many prompts lost, and won, of each kind.",
)
@click.option("--html", type=click.Path(), metavar="FILE", help="Write a page with pictures too.")
@click.option(
    "--sweep",
    type=click.Path(),
    metavar="DIR",
    help="What `mergekit-rain sweep` wrote, for L_think beside the answers of files that are named "
    "lambda-NUMBER.jsonl, as its folders are.",
)
@click.option(
    "--verified",
    multiple=True,
    metavar="NAME=FILE",
    callback=_parse_verified,
    help="What `mergekit-rain verify --json` printed of the model whose answers are in NAME.jsonl, "
    "for its L_think.",
)
@json_option
@output_options
@typed(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Compare the answers of B, C, ... with those of A, prompt by prompt.

    A, B and C are files that `mergekit-rain ask` has written; A is usually the reasoning model.
    Intervals are those of a bootstrap over prompts. Files named lambda-NUMBER.jsonl are one merge
    at several strengths: they get curves.
    """
    from rain_mergekit.commands.comparison_json import content  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.evaluation.comparison import broken_bounds  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    if options.html is not None:
        from rain_mergekit.report.page_file import check_page  # noqa: PLC0415

        check_page(options.html)
    first, *others = _read(options.answers)
    over = _strengths(others, options.sweep)
    known = _divergences([first, *others], options.verified)
    found = {other.name: _pair(first, other, options) for other in others}
    broken = {name: broken_bounds(pair[0], options.bounds) for name, pair in found.items()}
    if options.as_json:
        print_json("compare", content([first, *others], found, broken, over, known))
    _print([first, *others], found, over, known, console)
    if options.html is not None:
        _write_page(options.html, [first, *others], found, over, known)
        console.print(f"Wrote {options.html}")
    for name, items in broken.items():
        for one, bound in items:
            console.heading(
                f"{name}: {one.metric.label} is worse than the bound allows "
                f"({100 * one.loss:.1f}, bound {100 * bound:g})"
            )
    if any(broken.values()):
        click.get_current_context().exit(_WORSE)


def _read(paths: tuple[str, ...]) -> list[AnswerSet]:
    from rain_mergekit.evaluation.answer_files import read_answers  # noqa: PLC0415

    if len(paths) < 2:
        raise click.UsageError("give two files of answers or more; the first is compared with")
    return [read_answers(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: tuple[str, ...]) -> list[str]:
    """File names without ending; whole paths where two are the same."""
    from pathlib import Path  # noqa: PLC0415

    short = [Path(path).stem for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _pair(
    first: AnswerSet, other: AnswerSet, options: CompareOptions
) -> tuple[list[Difference], list[Example]]:
    from rain_mergekit.evaluation.comparison import differences, examples  # noqa: PLC0415

    rows = differences(first, other, options.least / 100)
    return rows, examples(first, other, _EXAMPLES, options.examples)


def _print(
    sets: list[AnswerSet],
    found: dict[str, tuple[list[Difference], list[Example]]],
    over: list[Strength],
    known: dict[str, float],
    console: Console,
) -> None:
    from rain_mergekit.commands import answer_text  # noqa: PLC0415

    for line in answer_text.fault_lines(sets, known):
        console.print(line)
    if len(over) > 1:
        console.heading("\nThe strengths, percent:")
        for line in answer_text.strength_lines(over):
            console.print(line)
    for name, (rows, examples) in found.items():
        _show(sets[0].name, name, rows, examples, console)


def _show(
    first: str, name: str, rows: list[Difference], examples: list[Example], console: Console
) -> None:
    from rain_mergekit.commands import answer_text  # noqa: PLC0415
    from rain_mergekit.evaluation.comparison import FEW  # noqa: PLC0415

    prompts = max(one.prompts for one in rows)
    console.print()
    console.heading(f"{name} against {first}, {counted(prompts, 'prompt')}:")
    for line in answer_text.difference_lines(rows):
        console.print(line)
    for line in answer_text.example_lines(examples):
        console.print(line)
    if prompts < FEW:
        console.warn(f"few prompts ({prompts}) say little: the intervals are rough below {FEW}")
    console.heading(f"Verdict: {answer_text.sentence(name, rows)}")


def _strengths(sets: list[AnswerSet], swept: str | None) -> list[Strength]:
    from rain_mergekit.evaluation.strengths import read_divergences, strengths  # noqa: PLC0415

    found = strengths(sets, {} if swept is None else read_divergences(swept))
    if swept is not None and not found:
        raise click.UsageError("--sweep needs files of answers that are named lambda-NUMBER.jsonl")
    return found


def _divergences(sets: list[AnswerSet], verified: dict[str, str]) -> dict[str, float]:
    """L_think by the name of the answers, of those that were verified."""
    from rain_mergekit.evaluation.strengths import read_verified  # noqa: PLC0415

    names = [one.name for one in sets]
    for name in verified:
        if name not in names:
            raise click.UsageError(f"--verified {name}=...: expected one of {', '.join(names)}")
    return {name: read_verified(path) for name, path in verified.items()}


def _write_page(
    path: str,
    sets: list[AnswerSet],
    found: dict[str, tuple[list[Difference], list[Example]]],
    over: list[Strength],
    known: dict[str, float],
) -> None:
    from rain_mergekit.report.comparison_page import render  # noqa: PLC0415 - imports matplotlib
    from rain_mergekit.report.page_file import write_page  # noqa: PLC0415

    write_page(path, render(sets, found, over, known))
