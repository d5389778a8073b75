"""`mergekit-rain diff`: which tensors of two models differ, and how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Loading, Talk, loading_options, output_options, typed

if TYPE_CHECKING:
    from rain_mergekit.evaluation.model_diff import ModelDiff, TensorChange

_SHOWN = 5  # names of tensors


@dataclass(frozen=True)
class DiffOptions:
    """What the command line says."""

    first: str
    second: str
    html: str | None
    as_json: bool
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain diff ./R1-Distill-Qwen-7B ./merged --html diff.html"
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--html", type=click.Path(), metavar="FILE", help="Write a page with pictures too.")
@json_option
@loading_options
@output_options
@typed(DiffOptions)
def diff(options: DiffOptions) -> None:
    """Show what changed from model A to model B, by layer and kind of tensor.

    Two tensors are in memory at a time; both models are read as a whole.
    """
    from tqdm import tqdm  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.dequantize.plain_view import open_plain  # noqa: PLC0415
    from rain_mergekit.evaluation.model_diff import diff_models  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    if options.html is not None:
        from rain_mergekit.report.page_file import check_page  # noqa: PLC0415

        check_page(options.html)
    load = options.loading.options()
    first, second = (open_plain(name, load) for name in (options.first, options.second))
    total, quiet = len(first.names & second.names), not console.progress
    with tqdm(total=total, desc="tensors", unit="", disable=quiet) as progress:
        found = diff_models(first, second, progress.update)
    if options.as_json:
        print_json("diff", _content(options, found))
        return
    from rain_mergekit.commands.console import shows_blocks  # noqa: PLC0415

    for line in lines(found, blocks=shows_blocks()):
        console.print(line)
    if options.html is not None:
        from rain_mergekit.report.diff_page import render  # noqa: PLC0415 - imports matplotlib
        from rain_mergekit.report.page_file import write_page  # noqa: PLC0415

        write_page(options.html, render(options.first, options.second, found))
        console.print(f"Wrote {options.html}")


def lines(found: ModelDiff, *, blocks: bool) -> Iterator[str]:
    """The changes as lines: a summary, and a row for each kind of tensor over its layers."""
    equal = sum(one.equal for one in found.changes)
    yield (
        f"{len(found.changes)} tensors compared: {equal} equal, {len(found.changes) - equal} "
        f"changed; all together by {100 * found.relative:.3g} % of their norm"
    )
    yield from _odd(found)
    yield from _table(found, blocks=blocks)


def _odd(found: ModelDiff) -> Iterator[str]:
    for title, names in (("only in A", found.only_first), ("only in B", found.only_second)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{title}: {', '.join(names[:_SHOWN])}{more}"
    for name, (before, after) in found.reshaped.items():
        yield f"other shape: {name} {list(before)} in A, {list(after)} in B"


def _table(found: ModelDiff, *, blocks: bool) -> Iterator[str]:
    from rain_mergekit.report.text_heatmap import BLOCKS, DIGITS  # noqa: PLC0415

    marks = BLOCKS if blocks else DIGITS
    most = max((one.relative for one in found.changes), default=0.0)
    wide = max([len("change, percent of the norm"), *map(len, found.kinds)])
    yield f"{'change, percent of the norm':<{wide}}  changed     mean   largest  cosine  layers"
    for kind, group in found.kinds.items():
        yield f"{kind:<{wide}}  {_numbers(group)}  {_picture(group, most, marks)}".rstrip()
    if most:
        yield f"layers from the first to the last: {marks[0]} = 0, {marks[-1]} = {100 * most:.3g} %"


def _numbers(group: Sequence[TensorChange]) -> str:
    changed = f"{sum(not one.equal for one in group)}/{len(group)}"
    relative = [100 * one.relative for one in group]
    mean, cosine = sum(relative) / len(group), min(one.cosine for one in group)
    return f"{changed:>7}  {mean:>7.3g}  {max(relative):>8.3g}  {cosine:>6.3f}"


def _picture(group: Sequence[TensorChange], most: float, marks: str) -> str:
    """One mark a layer, by the size of its change."""
    from rain_mergekit.evaluation.model_diff import by_layer  # noqa: PLC0415
    from rain_mergekit.report.text_heatmap import heat_rows  # noqa: PLC0415

    columns = [[change] for change in by_layer(group).values()]
    return heat_rows(columns, 0.0, most, marks)[0][0] if columns and most else ""


def _content(options: DiffOptions, found: ModelDiff) -> dict[str, Any]:
    return {
        "first": options.first,
        "second": options.second,
        "relative": found.relative,
        "equal": sum(one.equal for one in found.changes),
        "tensors": [_row(one) for one in found.changes],
        "only_first": found.only_first,
        "only_second": found.only_second,
        "reshaped": {name: {"first": a, "second": b} for name, (a, b) in found.reshaped.items()},
    }


def _row(one: TensorChange) -> dict[str, Any]:
    return {**asdict(one), "relative": one.relative}
