"""`mergekit-rain estimate`: what a calibration of a published model would need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Talk,
    budget_option,
    device_option,
    dtype_option,
    experts_option,
    output_options,
    pick_device,
    pick_dtype,
    typed,
)


@dataclass(frozen=True)
class EstimateOptions:
    """What the command line says."""

    shape: str
    fit: str
    reasoning_data: str | None
    instruction_data: str | None
    max_rank: int | None
    size_budget: float
    device: str
    dtype: str | None
    activation_budget: int
    experts_budget: int | None
    as_json: bool
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain estimate --shape ./Llama-3.3-70B-Instruct/config.json"
)
@click.option(
    "--shape",
    type=click.Path(),
    metavar="CONFIG.JSON",
    required=True,
    help="A model's config.json; nothing else of the model is needed.",
)
@click.option(
    "--fit",
    type=click.Choice(["streams", "projection"]),
    default="streams",
    show_default=True,
    help="As in the YAML's rain: section.",
)
@click.option(
    "--reasoning-data", type=click.Path(), help="The reasoning set  [default: the package's own]"
)
@click.option(
    "--instruction-data",
    type=click.Path(),
    help="The instruction set  [default: the package's own]",
)
@click.option("--max-rank", type=click.IntRange(min=1), help="As in the YAML.")
@click.option(
    "--size-budget",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.1,
    show_default=True,
    help="As in the YAML: the file as a share of the model, where there is no max_rank.",
)
@device_option()
@dtype_option()
@budget_option
@experts_option
@json_option
@output_options
@typed(EstimateOptions)
def estimate(options: EstimateOptions) -> None:
    """Say what a calibration would need: memory, disk, file, and minutes on this machine.

    From a model's config.json alone, so before any download. The tokens of the sets are counted by
    their characters; the rates of this machine are measured in a few seconds, the disk where the
    command is run. For models that are there, `mergekit-rain calibrate CONFIG --plan` says the
    same and counts exactly.
    """
    from pathlib import Path  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.calibration.options import RunOptions  # noqa: PLC0415
    from rain_mergekit.calibration.shape_plan import forward_type, plan_outline  # noqa: PLC0415
    from rain_mergekit.commands.plan import (  # noqa: PLC0415
        estimate_record,
        rates_here,
        show_estimate,
    )
    from rain_mergekit.models.outline import outline_of  # noqa: PLC0415

    console = options.talk.console()
    console.setup()
    run = RunOptions(
        device=pick_device(options.device),
        dtype=pick_dtype(options.dtype),
        activation_budget=options.activation_budget,
        experts_budget=options.experts_budget,
    )
    chosen = {
        "reasoning_data": options.reasoning_data,
        "instruction_data": options.instruction_data,
        "max_rank": options.max_rank,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    settings: dict[str, Any] = {**given, "fit": options.fit, "size_budget": options.size_budget}
    outline = outline_of(options.shape)
    found = plan_outline(outline, settings, run)
    rates = rates_here(run.device, forward_type(outline, run), Path.cwd())
    if options.as_json:
        print_json("estimate", estimate_record(found, rates))
    else:
        show_estimate(found, rates, console)
