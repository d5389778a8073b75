"""`mergekit-rain dequantize`: a plain copy of a model that is published quantised."""

from __future__ import annotations

from dataclasses import dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Loading, Talk, loading_options, output_options, typed
from rain_mergekit.errors import RainError


@dataclass(frozen=True)
class DequantizeOptions:
    """What the command line says."""

    model: str
    out: str
    as_json: bool
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain dequantize openai/gpt-oss-20b ./gpt-oss-20b-bf16"
)
@click.argument("model")
@click.argument("out", type=click.Path())
@json_option
@loading_options
@output_options
@typed(DequantizeOptions)
def dequantize(options: DequantizeOptions) -> None:
    """Write MODEL, whose weights are quantised, into the new folder OUT in bfloat16.

    Merges and calibrations read plain weights. FP8 with scales of blocks, rows or tensors, MXFP4,
    and the integers of compressed-tensors are read, tensor by tensor: the model is never in memory
    as a whole. What is not quantised is copied bit for bit. docs/large-models.md has the rest.
    """
    from rain_mergekit.commands.console import size  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.commands.moving_bar import moving_bar  # noqa: PLC0415
    from rain_mergekit.dequantize.plain_copy import PlainCopy  # noqa: PLC0415
    from rain_mergekit.models.loading import open_checkpoint, reference_of  # noqa: PLC0415
    from rain_mergekit.system.staged_folder import new_folder  # noqa: PLC0415
    from rain_mergekit.system.wording import counted  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    if reference_of(options.model).lora is not None:
        raise RainError(
            f"{options.model}: a model with an adapter: dequantise its base model, then write the "
            "adapter after the new folder"
        )
    with new_folder(options.out) as stage:
        copy = PlainCopy.of(open_checkpoint(options.model, options.loading.options()))
        with moving_bar(copy.bytes, "dequantising", console) as bar:
            files = copy.write(stage, bar.update)
    words, count = copy.format.words, copy.dequantised
    if options.as_json:
        facts = {"from": words, "dequantised": count, "copied": len(copy.recipes) - count}
        print_json(
            "dequantize", {"folder": options.out, **facts, "bytes": copy.bytes, "files": files}
        )
    console.heading(f"Wrote {options.out}")
    console.print(
        f"  {counted(count, 'tensor')} from {words} to bfloat16, the other "
        f"{len(copy.recipes) - count} as published; {size(copy.bytes)} in {counted(files, 'file')}"
    )
    console.print(f"Next: name {options.out} where you named {options.model}")
