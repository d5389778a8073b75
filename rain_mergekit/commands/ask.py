"""`mergekit-rain ask`: let a model answer prompts, and keep everything it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.asking import Asking, asking_options, writer_of
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
from rain_mergekit.errors import RainError

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.instructions.prompts import Asked


@dataclass(frozen=True)
class AskOptions:
    """What the command line says."""

    model: str
    output: str
    prompts: str | None
    count: int | None
    samples: int
    greedy: bool
    markers: MarkerPairs
    chat_template_kwargs: dict[str, Any]
    asking: Asking
    as_json: bool
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExamples:\n"
    "  mergekit-rain ask ./merged -o merged.jsonl --count 64\n"
    "  mergekit-rain ask NAME --server http://localhost:8000/v1 --parallel 32 -o merged.jsonl"
)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    default="answers.jsonl",
    show_default=True,
    help="Where answers are kept; answers that are there are not asked for again.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="JSON or JSON lines with `prompt`, and perhaps `answer`, `instruction_id_list`, `kwargs`; "
    "or hub:OWNER/NAME[:SPLIT[:COLUMN]], a data set of the hub  [default: 332 prompts that come "
    "with the package]",
)
@click.option("--count", type=click.IntRange(min=1), help="Use this many of them, evenly spaced.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Answers to each prompt.",
)
@click.option(
    "--greedy",
    is_flag=True,
    help="One answer of the likeliest tokens to each prompt too, in OUTPUT.greedy.jsonl.",
)
@asking_options("Longest answer; too short a limit cuts thinking off.")
@markers_option
@template_option
@json_option
@loading_options
@output_options
@typed(AskOptions)
def ask(options: AskOptions) -> None:
    """Let MODEL answer prompts, and say what is wrong with its answers.

    MODEL is a folder or hub name, or with --server the name under which the server runs it. Tokens
    are drawn as the model's makers recommend (generation_config.json) unless --temperature says
    otherwise. An interrupted run goes on where it was. `mergekit-rain compare` reads the file.
    """
    from rain_mergekit.commands.answer_text import fault_lines  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.evaluation.answer_files import chosen_prompts, read_answers  # noqa: PLC0415
    from rain_mergekit.evaluation.answer_summary import summary  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    asked = chosen_prompts(options.prompts, options.count, options.loading.transformers_cache)
    runs = [options, *([_greedily(options)] if options.greedy else [])]
    for run in runs:
        _ask(run, asked, console)
    found = [read_answers(run.output) for run in runs]
    if options.as_json:
        beside = {"greedy": summary(found[1])} if options.greedy else {}
        print_json("ask", {**summary(found[0]), **beside})
        return
    for line in fault_lines(found):
        console.print(line)
    console.print(f"Next: mergekit-rain compare OTHER.jsonl {options.output}")


def _greedily(options: AskOptions) -> AskOptions:
    """The same prompts, one answer each, always of the likeliest token, in a file beside."""
    if options.asking.temperature == 0:
        raise click.UsageError("--greedy is beside sampled answers: leave out --temperature 0")
    asking = replace(options.asking, temperature=0.0, top_p=None)
    output = f"{options.output.removesuffix('.jsonl')}.greedy.jsonl"
    return replace(options, output=output, samples=1, asking=asking)


def _ask(options: AskOptions, asked: list[Asked], console: Console) -> None:
    from rain_mergekit.evaluation.answer_files import ask as ask_into  # noqa: PLC0415
    from rain_mergekit.evaluation.answer_files import header  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    template = options.chat_template_kwargs
    writer, sampling = writer_of(options.model, options.asking, template, options.loading)
    head = header(writer, sampling, given_markers(options.markers), template)
    console.print(f"Asking {options.model}: {counted(len(asked), 'prompt')}")
    quiet = not console.progress
    try:
        new = ask_into(writer, asked, options.output, head, samples=options.samples, quiet=quiet)
    except KeyboardInterrupt:
        hint = f"the answers so far are kept in {options.output}; the same command goes on"
        raise KeyboardInterrupt(hint) from None
    refused: list[str] = getattr(writer, "refused", [])
    if len(refused) == len({prompt.text for prompt in asked}) * options.samples:
        raise RainError(f"the server answers none of the prompts: {refused[0]}")
    if refused:
        console.warn(f"{counted(len(refused), 'prompt')} not answered, the first: {refused[0]}")
    console.print(f"{counted(new, 'new answer')} in {options.output}")
