"""`mergekit-rain data check`: whether a calibration can use a set, and what it sees of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Loading,
    MarkerPairs,
    Talk,
    given_markers,
    loading_options,
    markers_option,
    output_options,
    template_option,
    typed,
)
from rain_mergekit.system.terminal_safe import clean

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.data_building.checking import Checked


_NAMES = ("", "marker", "protected", "instruction", "follows", "unrelated")
_COLOURS: tuple[dict[str, Any], ...] = (
    {},
    {"fg": "magenta", "bold": True},
    {"fg": "magenta"},
    {"fg": "cyan", "bold": True},
    {"fg": "green", "bold": True},
    {"fg": "yellow"},
)
_LONGEST = 600


@dataclass(frozen=True)
class CheckOptions:
    """What the command line says."""

    file: str
    model: str | None
    show: int
    as_json: bool
    window: int
    markers: MarkerPairs
    chat_template_kwargs: dict[str, Any]
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain data check reasoning.jsonl --model ./reasoning"
)
@click.argument("file", type=click.Path())
@click.option("--model", help="Read it with this model's tokenizer and chat template.")
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="The sample to print; 0: none.",
)
@click.option("--window", type=click.IntRange(min=0), default=5, show_default=True)
@json_option
@markers_option
@template_option
@loading_options
@output_options
@typed(CheckOptions)
def check(options: CheckOptions) -> None:
    """Read the calibration set FILE as a calibration does; count, and show one sample.

    Without --model characters take the place of tokens. Samples that a calibration would skip are
    listed with the reason. The spans have colours on a terminal, and are listed below the text.
    """
    from rain_mergekit.data_building.checking import check_set  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.models.loading import open_checkpoint  # noqa: PLC0415
    from rain_mergekit.models.tokenizer import load_tokenizer  # noqa: PLC0415
    from rain_mergekit.text.marker_detection import find_markers, written_markers  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    tokenizer = None
    if options.model:
        tokenizer = load_tokenizer(open_checkpoint(options.model, options.loading.options()))
    file, template = options.file, options.chat_template_kwargs
    markers = given_markers(options.markers)
    if markers is None and tokenizer is not None:
        markers = find_markers(file, tokenizer, template)
    checked = check_set(file, tokenizer, markers or written_markers(file), options.window, template)
    unit = "tokens" if options.model else "characters"
    if options.as_json:
        print_json("data check", _content(checked, unit))
    _count(file, checked, console, unit)
    if options.show:
        _show(checked, options.show, console)
    _next(checked, file, console)


def _count(file: str, checked: Checked, console: Console, unit: str) -> None:
    data = checked.data
    console.heading(
        f"{file}: {checked.kind} set, {len(data.samples)} of {data.total} samples usable"
    )
    lengths = [len(sample.input_ids) for sample in data.samples]
    console.print(
        f"  {min(lengths)} to {max(lengths)} {unit}, half of them below {median(lengths):.0f}"
    )
    if kinds := _kinds(checked):
        listed = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items()))
        text = f"{sum(kinds.values())} instructions: {listed}"
        console.print(fill(clean(text), 80, initial_indent="  ", subsequent_indent="    "))
    for source, reason in data.skipped:
        console.warn(f"{source}: skipped: {reason}")


def _kinds(checked: Checked) -> Counter[str]:
    """How often each instruction comes; empty for a reasoning set."""
    if checked.kind != "instruction":
        return Counter()
    return Counter(span.instruction_id for s in checked.data.samples for span in s.spans)


def _content(checked: Checked, unit: str) -> dict[str, Any]:
    """What was found in the set as plain values, for `--json`."""
    from rain_mergekit.commands.run_calibration import used  # noqa: PLC0415

    lengths = [len(sample.input_ids) for sample in checked.data.samples]
    return {
        "kind": checked.kind,
        **used(checked.data),
        "markers": [list(pair) for pair in checked.markers.pairs],
        "length": {
            "unit": unit,
            "min": min(lengths),
            "median": median(lengths),
            "max": max(lengths),
        },
        "instructions": dict(_kinds(checked)),
    }


def _show(checked: Checked, number: int, console: Console) -> None:
    """The text in colours, which the console leaves out where nobody sees them, and a list."""
    from rain_mergekit.data_building.checking import PLAIN, segments  # noqa: PLC0415

    runs = segments(checked, number)
    console.print(f"\nSample {number}, as the model sees it:\n")
    parts = (("\n".join(clean(line) for line in _short(run).split("\n")), s) for run, s in runs)
    console.print_styled(
        "".join(click.style(text, **_COLOURS[style]) for text, style in parts) + "\n"
    )
    for style in sorted({style for _, style in runs if style != PLAIN}):
        found = dict.fromkeys(clean(" ".join(run.split())) for run, s in runs if s == style)
        name = click.style(_NAMES[style], **_COLOURS[style])
        console.print_styled(f"{name}: " + " | ".join(run for run in found if run))
    console.print()


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} […] {text[-half:]}"


def _next(checked: Checked, file: str, console: Console) -> None:
    console.print(f"Next: name it in the configuration as rain.{checked.kind}_data: {file}")
