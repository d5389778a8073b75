"""`mergekit-rain card`: the section of the model card about the merge."""

from __future__ import annotations

from dataclasses import dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, typed


@dataclass(frozen=True)
class CardOptions:
    """What the command line says."""

    merged: str
    calibration: str | None
    as_json: bool
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain card ./merged")
@click.argument("merged", type=click.Path())
@click.option(
    "--calibration",
    metavar="CALIB",
    type=click.Path(),
    help="The calibration file  [default: the one that the merge names]",
)
@json_option
@output_options
@typed(CardOptions)
def card(options: CardOptions) -> None:
    """Add how the model in the folder MERGED was made to its README.md, or renew that part.

    It goes between two comments, and tags go to the head of the page. All other text stays as it
    is. `mergekit-rain merge` does this by itself.
    """
    from rain_mergekit.report.model_card import write_card  # noqa: PLC0415 - keeps --help fast

    console = options.talk.console(quiet=options.as_json)
    changed = write_card(options.merged, options.calibration)
    file = f"{options.merged}/README.md"
    console.heading(f"{'Wrote' if changed else 'Nothing to change in'} {file}")
    if options.as_json:
        print_json("card", {"file": file, "changed": changed})
