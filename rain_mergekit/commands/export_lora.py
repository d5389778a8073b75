"""`mergekit-rain export-lora`: what stream matching found, as an adapter."""

from __future__ import annotations

from dataclasses import dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, typed


@dataclass(frozen=True)
class ExportLoraOptions:
    """What the command line says."""

    calibration: str
    out: str
    strength: float
    dtype: str
    as_json: bool
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain export-lora config.rain.safetensors ./adapter")
@click.argument("calibration", metavar="CALIB", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--lambda",
    "strength",
    type=float,
    default=1.0,
    show_default=True,
    help="The merging strength; the changes were fitted for 1.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The type of the stored factors.",
)
@json_option
@output_options
@typed(ExportLoraOptions)
def export_lora(options: ExportLoraOptions) -> None:
    """Write the changes in CALIB to the folder OUT as a LoRA adapter for PEFT.

    CALIB must come from a calibration with `fit: streams`. The adapter belongs on the reasoning
    model, and gives there what `mergekit-yaml` would merge.
    """
    import torch  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.calibration_file.lora_adapter import write_adapter  # noqa: PLC0415
    from rain_mergekit.calibration_file.reader import CalibrationFile  # noqa: PLC0415
    from rain_mergekit.system.staged_folder import staged_folder  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    file = CalibrationFile.open(options.calibration)
    try:
        with staged_folder(options.out) as stage:
            dtype = getattr(torch, options.dtype)
            ranks = write_adapter(file, stage, options.strength, dtype)
    finally:
        file.close()
    console.heading(f"Wrote {options.out}")
    modules = counted(len(ranks), "module")
    console.print(f"  {modules}, rank {min(ranks.values())} to {max(ranks.values())}")
    if options.as_json:
        print_json("export-lora", {"folder": options.out, "ranks": ranks})
    console.print(f"Next: load it with PEFT on {file.models['reasoning'].reference}")
