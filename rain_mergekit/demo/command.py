"""`mergekit-rain demo`: the main job on models that need no download."""

from __future__ import annotations

from pathlib import Path

import click

from rain_mergekit.commands.options import output_options, threads_option


@click.command(epilog="\b\nExample:\n  mergekit-rain demo ./rain-demo")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@threads_option
@output_options
def demo(folder: Path, *, threads: int | None, quiet: bool, verbosity: int) -> None:
    """Calibrate and merge a small trained trio in DIR and compare with task arithmetic.

    One to three minutes, no network. DIR keeps the YAML files, the calibration, the
    merged models and demo.json with the numbers. Files of your own in DIR are left alone.
    """
    from rain_mergekit.commands.console import Console  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.demo.run import run_demo  # noqa: PLC0415

    console = Console(quiet=quiet, verbosity=verbosity)
    console.setup()
    run_demo(folder, console, threads)
