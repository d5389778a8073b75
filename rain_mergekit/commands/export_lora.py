"""`mergekit-rain export-lora`: what stream matching found, as an adapter."""

from __future__ import annotations

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import output_options


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
def export_lora(
    calibration: str,
    out: str,
    *,
    strength: float,
    dtype: str,
    as_json: bool,
    quiet: bool,
    verbosity: int,
) -> None:
    """Write the changes in CALIB to the folder OUT as a LoRA adapter for PEFT.

    CALIB must come from a calibration with `fit: streams`. The adapter belongs on the reasoning
    model, and gives there what `mergekit-yaml` would merge.
    """
    import torch  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.calibration_file.lora_adapter import write_adapter  # noqa: PLC0415
    from rain_mergekit.calibration_file.reader import CalibrationFile  # noqa: PLC0415
    from rain_mergekit.commands.console import Console  # noqa: PLC0415
    from rain_mergekit.system.staged_folder import staged_folder  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    console = Console(quiet=quiet or as_json, verbosity=verbosity)
    file = CalibrationFile.open(calibration)
    try:
        with staged_folder(out) as stage:
            ranks = write_adapter(file, stage, strength, getattr(torch, dtype))
    finally:
        file.close()
    console.heading(f"Wrote {out}")
    modules = counted(len(ranks), "module")
    console.print(f"  {modules}, rank {min(ranks.values())} to {max(ranks.values())}")
    if as_json:
        print_json("export-lora", {"folder": out, "ranks": ranks})
    console.print(f"Next: load it with PEFT on {file.models['reasoning'].reference}")
