"""`mergekit-rain push`: a merged model to the hub, with what it takes to make it again."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, typed

if TYPE_CHECKING:
    from rain_mergekit.publish.upload import Upload


@dataclass(frozen=True)
class PushOptions:
    """What the command line says."""

    merged: str
    name: str
    public: bool
    with_data: bool
    dry_run: bool
    as_json: bool
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain push ./merged me/R1-Qwen-7B-RAIN")
@click.argument("merged", type=click.Path())
@click.argument("name", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="For everybody to see  [default: private]")
@click.option("--with-data", is_flag=True, help="The calibration sets too.")
@click.option("--dry-run", is_flag=True, help="List the files and stop.")
@json_option
@output_options
@typed(PushOptions)
def push(options: PushOptions) -> None:
    """Put the merged model in the folder MERGED on the hub as OWNER/NAME.

    Weights, card, page of pictures, calibration file, and rain/reproduce.json with versions,
    digests, commands and seeds: `mergekit-rain reproduce OWNER/NAME` makes it again. No path of
    this machine is among it. Log in first: `hf auth login`.
    """
    import tempfile  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.commands.console import size  # noqa: PLC0415
    from rain_mergekit.commands.moving_bar import moving_bar  # noqa: PLC0415
    from rain_mergekit.publish.upload import prepare, send  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    command = shlex.join(["mergekit-rain", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="rain-push-") as place:
        folder = Path(options.merged)
        with moving_bar(max(1, _bytes(folder)), "preparing", console) as bar:
            upload = prepare(
                folder, Path(place), command, with_data=options.with_data, tick=bar.update
            )
        for name, path in upload.files.items():
            console.print(f"  {size(path.stat().st_size):>12}  {name}")
        if options.dry_run:
            console.print(f"{size(upload.bytes)} in all; nothing was sent")
            _tell(upload, None, options)
            return
        console.print(f"Sending {size(upload.bytes)}")
        url = send(upload, options.name, public=options.public)
        _tell(upload, url, options)
    console.heading(f"It is at {url}, {'for everybody' if options.public else 'private'}")
    console.print(f"Make it again anywhere: mergekit-rain reproduce {options.name}")


def _tell(upload: Upload, url: str | None, options: PushOptions) -> None:
    """Print the result if `--json` was given; url None: nothing was sent."""
    if options.as_json:
        files = {name: path.stat().st_size for name, path in upload.files.items()}
        print_json("push", {"url": url, "public": options.public, "files": files})


def _bytes(folder: Path) -> int:
    """Bytes of the weights in the folder."""
    from rain_mergekit.models.weight_files import weight_files  # noqa: PLC0415

    return sum(path.stat().st_size for path in weight_files(folder)) if folder.is_dir() else 0
