"""`mergekit-rain convert-alpha`: coefficients of the published scripts in a calibration of ours."""

from __future__ import annotations

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import output_options
from rain_mergekit.system.wording import counted


@click.command(
    epilog="\b\nExample:\n  mergekit-rain convert-alpha alpha_true_forward_two_pass.json "
    "trio.rain.safetensors -o converted.rain.safetensors"
)
@click.argument("alpha", metavar="ALPHA.json", type=click.Path())
@click.argument("calibration", metavar="CALIB", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The new file.")
@json_option
@output_options
def convert_alpha(
    alpha: str, calibration: str, output: str, *, as_json: bool, quiet: bool, verbosity: int
) -> None:
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
    from rain_mergekit.commands.console import Console  # noqa: PLC0415

    console = Console(quiet=quiet or as_json, verbosity=verbosity)
    found = read_alpha(alpha)
    from pathlib import Path  # noqa: PLC0415

    protect_foreign(Path(output))
    file = CalibrationFile.open(calibration)
    try:
        missing = with_coefficients(file, found, alpha, output)
    finally:
        file.close()
    console.heading(f"Wrote {output}")
    count = len(found.layers)
    console.print(
        f"  coefficients of {counted(count, 'layer')} with {counted(found.heads, 'head')}"
    )
    if missing:
        names = ", ".join(map(str, missing))
        console.warn(f"no coefficients for layer {names}: not merged there, as by the scripts")
    if as_json:
        facts = {"layers": count, "heads": found.heads, "without": list(missing)}
        print_json("convert-alpha", {"file": output, **facts})
    console.print("Next: name it in parameters.calibration, and merge with mergekit-yaml")
