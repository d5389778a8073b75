"""`mergekit-rain reproduce`: a published merge again, compared tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Loading,
    Talk,
    device_option,
    loading_options,
    output_options,
    pick_device,
    typed,
)

if TYPE_CHECKING:
    from rain_mergekit.commands.console import Console
    from rain_mergekit.publish.record import MergeRecord


_OTHER = 4
_SHOWN = 3


@dataclass(frozen=True)
class ReproduceOptions:
    """What the command line says."""

    name: str
    out: str
    reasoning: str | None
    instruct: str | None
    pretrained: str | None
    device: str
    as_json: bool
    loading: Loading
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain reproduce me/R1-Qwen-7B-RAIN -o ./again")
@click.argument("name", metavar="OWNER/NAME")
@click.option(
    "-o", "--out", type=click.Path(), default="./reproduced", show_default=True, help="Where to."
)
@click.option("--reasoning", metavar="MODEL", help="Where the reasoning model is now.")
@click.option("--instruct", metavar="MODEL", help="Where the instruct model is now.")
@click.option("--pretrained", metavar="MODEL", help="Where the pretrained model is now.")
@device_option()
@json_option
@loading_options
@output_options
@typed(ReproduceOptions)
def reproduce(options: ReproduceOptions) -> None:
    """Make the merge OWNER/NAME again from its models and calibration file, and compare.

    OWNER/NAME may be a folder. The calibration file's digest, the models' fingerprints and each
    tensor of the result are compared with rain/reproduce.json. Exit code 4: tensors differ.
    """
    from pathlib import Path  # noqa: PLC0415 - keeps --help fast

    from mergekit.options import MergeOptions  # noqa: PLC0415

    from rain_mergekit.calibration.options import RunOptions  # noqa: PLC0415
    from rain_mergekit.calibration_file.schema import ROLES  # noqa: PLC0415
    from rain_mergekit.checks.vocabulary_sizes import require_mergeable  # noqa: PLC0415
    from rain_mergekit.commands.merge import Making, fill, refuse_input  # noqa: PLC0415
    from rain_mergekit.commands.read_weights import digests_with_bar  # noqa: PLC0415
    from rain_mergekit.merge_method.missing_tensors import Completion  # noqa: PLC0415
    from rain_mergekit.publish.download import calibration_in, config_again, fetch  # noqa: PLC0415
    from rain_mergekit.publish.record import read_record  # noqa: PLC0415
    from rain_mergekit.system.staged_folder import staged_folder  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    device, load = pick_device(options.device), options.loading.options()
    folder = fetch(options.name, load.transformers_cache)
    record = read_record(folder)
    given = {role: place for role in ROLES if (place := getattr(options, role)) is not None}
    config = config_again(folder, calibration_in(folder, record), given)
    refuse_input(config, options.out)
    require_mergeable(config, load)
    deterministic = bool(record.run.get("deterministic"))
    run = RunOptions(load=load, device=device, deterministic=deterministic, quiet=True)
    merge_options = MergeOptions(**vars(options.loading), device=device, quiet=True)
    console.print(f"Merging again into {options.out}")
    completion = Completion.of(config, load)
    with staged_folder(options.out) as stage:
        fill(config, Path(options.out), stage, completion, Making(merge_options, run), console)
    found = digests_with_bar(Path(options.out), console)
    if options.as_json:
        other = _differing(record, found)
        print_json("reproduce", {"folder": options.out, "tensors": len(found), "different": other})
    if not _compare(record, found, console):
        click.get_current_context().exit(_OTHER)


def _differing(record: MergeRecord, found: dict[str, Any]) -> list[str]:
    """Tensors that are not as they were published, missing and new ones too."""
    wanted = record.tensors
    return sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))


def _compare(record: MergeRecord, found: dict[str, Any], console: Console) -> bool:
    """Say what is alike and what is not; whether all is."""
    from rain_mergekit.publish.record import versions  # noqa: PLC0415

    other = _differing(record, found)
    if not other:
        console.heading(f"The same bits: all {len(found)} tensors are those that were published")
        return True
    shown = ", ".join(other[:_SHOWN]) + (", ..." if len(other) > _SHOWN else "")
    console.heading(f"{len(other)} of {len(record.tensors)} tensors are not the same bits: {shown}")
    now = versions()
    for name, version in record.versions.items():
        if now.get(name) != version:
            console.print(f"  {name} was {version}, is {now.get(name, 'not there')}")
    return False
