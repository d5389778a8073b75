"""`mergekit-rain data reasoning`: a reasoning set from a model's own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.data_options import build, building_options

if TYPE_CHECKING:
    from rain_mergekit.data_building.balance import Candidate
    from rain_mergekit.data_building.judge import Kept
    from rain_mergekit.data_building.prompts import Prompt


@click.command(
    epilog="\b\nExamples:\n"
    "  mergekit-rain data reasoning --model ./R1-Distill-Qwen-7B --prompts prompts.jsonl "
    "--count 150\n"
    "  mergekit-rain data reasoning --server http://localhost:8000/v1 --model NAME "
    "--prompts prompts.txt"
)
@building_options("reasoning.jsonl")
def reasoning(**options: Any) -> None:
    """Let a reasoning model answer prompts, and keep answers with one complete thinking block.

    Prompts are the lines of a .txt file, or JSON or JSON lines with `prompt` and perhaps `domain`.
    Chosen are --count samples, balanced over domains and lengths of the thinking. An interrupted
    run goes on where it was; the same seed gives the same set.
    """
    from rain_mergekit.commands.console import Console  # noqa: PLC0415
    from rain_mergekit.data_building.prompts import read_prompts  # noqa: PLC0415 - keeps --help fast

    console = Console(quiet=options["quiet"], verbosity=options["verbosity"])
    console.setup()
    build(read_prompts(options["prompts"]), _candidate, options, console)


def _candidate(prompt: Prompt, kept: Kept) -> Candidate:
    from rain_mergekit.data_building.balance import Candidate  # noqa: PLC0415

    domain = {"domain": prompt.domain} if prompt.domain else {}
    sample = {"prompt": prompt.text, **domain, **kept.fields}
    return Candidate(sample, (prompt.domain,), len(kept.thinking.split()))
