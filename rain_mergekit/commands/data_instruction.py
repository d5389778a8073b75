"""`mergekit-rain data instruction`: an instruction set from answers that follow the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.building import build, building_options

if TYPE_CHECKING:
    from rain_mergekit.building.balance import Candidate
    from rain_mergekit.building.constraints import ConstrainedPrompt
    from rain_mergekit.building.judge import Kept


@click.command(
    epilog="\b\nExample:\n"
    "  mergekit-rain data instruction --model ./R1-Distill-Qwen-7B --prompts constraints.jsonl "
    "--attempts 4 --temperature 0.6"
)
@building_options("instruction.jsonl")
def instruction(**options: Any) -> None:
    """Let a model answer prompts with constraints, and keep answers that a rule finds correct.

    Each prompt comes with its instructions: a kind, the arguments of its rule, and where the
    prompt says it. Kept are answers with one complete thinking block that follow all of them; what
    follows and what is unrelated is marked by rule. Formats and kinds are in docs/data.md.
    """
    from rain_mergekit.building.constraints import read_constrained  # noqa: PLC0415
    from rain_mergekit.commands.console import Console, counted  # noqa: PLC0415

    console = Console(quiet=options["quiet"], verbosity=options["verbosity"])
    console.setup()
    prompts = read_constrained(options["prompts"])
    console.say(f"Asking {options['model']}: {counted(len(prompts), 'prompt')}")
    build(prompts, lambda prompt: str(prompt.text), _candidate, options, console)
    where = "" if options["server"] else f" --model {options['model']}"
    console.say(f"Next: mergekit-rain data check {options['output']}{where}")


def _candidate(prompt: ConstrainedPrompt, kept: Kept) -> Candidate:
    from rain_mergekit.building.balance import Candidate  # noqa: PLC0415
    from rain_mergekit.building.constraints import make_sample  # noqa: PLC0415

    kinds = tuple(dict.fromkeys(item.kind for item in prompt.constraints))
    return Candidate(make_sample(prompt, kept), kinds, len(kept.thinking.split()))
