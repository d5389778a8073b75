"""`mergekit-rain demo`: the main job on models that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, threads_option, typed


@dataclass(frozen=True)
class DemoOptions:
    """What the command line says."""

    folder: Path
    threads: int | None
    as_json: bool
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain demo ./rain-demo")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@threads_option
@json_option
@output_options
@typed(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Calibrate and merge a small trained trio in DIR and compare with task arithmetic.

    One to three minutes, no network. DIR keeps the YAML files, the calibration, the
    merged models and demo.json with the numbers. Files of your own in DIR are left alone.
    """
    from rain_mergekit.demo.files import read_report  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.demo.run import run_demo  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    run_demo(options.folder, console, options.threads)
    if options.as_json:
        print_json("demo", {"folder": str(options.folder), **read_report(options.folder)})
