"""`mergekit-rain data instruction`: an instruction set from answers that follow the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rain_mergekit.commands.data_build import build
from rain_mergekit.commands.data_options import BuildOptions, building_options
from rain_mergekit.commands.options import typed
from rain_mergekit.system.wording import counted

if TYPE_CHECKING:
    from rain_mergekit.data_building.balance import Candidate
    from rain_mergekit.data_building.judge import Kept
    from rain_mergekit.instructions.prompts import Asked


_SHOWN = 3


@click.command(
    epilog="\b\nExample:\n"
    "  mergekit-rain data instruction --model ./R1-Distill-Qwen-7B --prompts constraints.jsonl "
    "--attempts 4 --temperature 0.6"
)
@building_options(
    "instruction.jsonl",
    click.option(
        "--prompts",
        required=True,
        multiple=True,
        type=click.Path(),
        help="What to ask; may be repeated.",
    ),
)
@typed(BuildOptions)
def instruction(options: BuildOptions) -> None:
    """Let a model answer prompts with constraints, and keep answers that a rule finds correct.

    Prompts are as in IFEval's file (`prompt`, `instruction_id_list`, `kwargs`), or as in an
    instruction set. Kept are answers with one complete thinking block that follow all their
    instructions; what follows and what is unrelated is marked by rule. The kinds are in
    docs/building-data.md.
    """
    from rain_mergekit.data_building.constraints import read_constrained  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    found = read_constrained(*options.prompts)
    for source, reason in found.left_out[:_SHOWN]:
        console.warn(f"{source}: left out: {reason}")
    if len(found.left_out) > _SHOWN:
        console.warn(f"{counted(len(found.left_out), 'prompt')} left out in all")
    build(found.prompts, _candidate, options, console)


def _candidate(prompt: Asked, kept: Kept) -> Candidate:
    from rain_mergekit.data_building.balance import Candidate  # noqa: PLC0415
    from rain_mergekit.data_building.constraints import make_sample  # noqa: PLC0415

    kinds = tuple(dict.fromkeys(item.kind for item in prompt.instructions))
    return Candidate(make_sample(prompt, kept), kinds, len(kept.thinking.split()))
