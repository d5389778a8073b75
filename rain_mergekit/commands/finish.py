"""`mergekit-rain finish`: complete a folder that stock mergekit wrote."""

from __future__ import annotations

from dataclasses import dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Loading, Talk, loading_options, output_options, typed


@dataclass(frozen=True)
class FinishOptions:
    """What the command line says."""

    merged: str
    as_json: bool
    loading: Loading
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain finish ./merged")
@click.argument("merged", type=click.Path())
@json_option
@loading_options
@output_options
@typed(FinishOptions)
def finish(options: FinishOptions) -> None:
    """Put right what `mergekit-yaml` wrote into the folder MERGED beside the merged weights.

    `config.json` becomes the reasoning model's, key for key; the files that mergekit does not copy
    come from its folder, the tokenizer's as they are there; tensors that mergekit left out are
    added, and all have the names that they have there. `mergekit-rain merge` does this by itself.
    """
    from rain_mergekit.commands.run_finish import finish_folder  # noqa: PLC0415 - keeps --help fast

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    changed = finish_folder(options.merged, options.loading.options(), console)
    if options.as_json:
        print_json("finish", {"folder": options.merged, "changed": changed})
