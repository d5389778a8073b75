"""`mergekit-rain data reasoning`: a reasoning set from a model's own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rain_mergekit.commands.data_build import build
from rain_mergekit.commands.data_options import BuildOptions, building_options
from rain_mergekit.commands.options import typed

if TYPE_CHECKING:
    from rain_mergekit.data_building.balance import Candidate
    from rain_mergekit.data_building.judge import Kept
    from rain_mergekit.data_building.prompts import Prompt


@click.command(
    epilog="\b\nExamples:\n"
    "  mergekit-rain data reasoning --model ./R1-Distill-Qwen-7B --prompts prompts.jsonl "
    "--count 150\n"
    "  mergekit-rain data reasoning --model ./R1-Distill-Qwen-7B --prompts mine.jsonl "
    "--prompts calibration/instruction.jsonl\n"
    "  mergekit-rain data reasoning --server http://localhost:8000/v1 --model NAME "
    "--prompts prompts.txt"
)
@building_options(
    "reasoning.jsonl",
    click.option(
        "--prompts",
        multiple=True,
        type=click.Path(),
        help="What to ask; may be repeated  [default: the prompts of the package's two sets]",
    ),
)
@typed(BuildOptions)
def reasoning(options: BuildOptions) -> None:
    """Let a reasoning model answer prompts, and keep answers with one complete thinking block.

    Prompts are the lines of a .txt file, or JSON or JSON lines with `prompt` and perhaps `domain`.
    An instruction set will do as well: its prompts are the domain `constrained`. Chosen are --count
    samples, balanced over domains and lengths of the thinking. An interrupted run goes on where it
    was; the same seed gives the same set.
    """
    from rain_mergekit.data_building.prompts import gather_prompts  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    build(gather_prompts(options.prompts), candidate, options, console)


def candidate(prompt: Prompt, kept: Kept) -> Candidate:
    """A sample of the set, by the prompt's domain and the length of its thinking in words."""
    from rain_mergekit.data_building.balance import Candidate  # noqa: PLC0415

    domain = {"domain": prompt.domain} if prompt.domain else {}
    sample = {"prompt": prompt.text, **domain, **kept.fields}
    return Candidate(sample, (prompt.domain,), len(kept.thinking.split()))
