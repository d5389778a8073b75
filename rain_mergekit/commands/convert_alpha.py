"""`mergekit-rain convert-alpha`: coefficients of the published scripts in a calibration of ours."""

from __future__ import annotations

from dataclasses import dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, typed
from rain_mergekit.system.wording import counted


@dataclass(frozen=True)
class ConvertAlphaOptions:
    """What the command line says."""

    alpha: str
    calibration: str
    output: str
    as_json: bool
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain convert-alpha alpha_true_forward_two_pass.json "
    "trio.rain.safetensors -o converted.rain.safetensors"
)
@click.argument("alpha", metavar="ALPHA.json", type=click.Path())
@click.argument("calibration", metavar="CALIB", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The new file.")
@json_option
@output_options
@typed(ConvertAlphaOptions)
def convert_alpha(options: ConvertAlphaOptions) -> None:
    """Write CALIB with the coefficients of ALPHA.json, from the published scripts' second stage.

    What CALIB protects stays protected. Each key/value head gets the mean of the query heads that
    share it. Layers without coefficients are not merged, as there. docs/migration.md has the rest.
    """
    from rain_mergekit.calibration.up_to_date import protect_foreign  # noqa: PLC0415
    from rain_mergekit.calibration_file.published_coefficients import (  # noqa: PLC0415
        read_alpha,
        with_coefficients,
    )
    from rain_mergekit.calibration_file.reader import CalibrationFile  # noqa: PLC0415 - keeps --help fast

    console = options.talk.console(quiet=options.as_json)
    found = read_alpha(options.alpha)
    from pathlib import Path  # noqa: PLC0415

    protect_foreign(Path(options.output))
    file = CalibrationFile.open(options.calibration)
    try:
        missing = with_coefficients(file, found, options.alpha, options.output)
    finally:
        file.close()
    console.heading(f"Wrote {options.output}")
    count = len(found.layers)
    console.print(
        f"  coefficients of {counted(count, 'layer')} with {counted(found.heads, 'head')}"
    )
    if missing:
        names = ", ".join(map(str, missing))
        console.warn(f"no coefficients for layer {names}: not merged there, as by the scripts")
    if options.as_json:
        facts = {"layers": count, "heads": found.heads, "without": list(missing)}
        print_json("convert-alpha", {"file": options.output, **facts})
    console.print("Next: name it in parameters.calibration, and merge with mergekit-yaml")
