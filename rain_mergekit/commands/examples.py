"""`mergekit-rain examples`: the files that the documentation works with."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import Talk, output_options, typed
from rain_mergekit.errors import RainError
from rain_mergekit.system.shipped_files import TRIO, shipped

_FOLDERS = {
    "configs": shipped("configs"),
    "calibration": shipped("calibration"),
    "trio": TRIO,
}
_SHOWN = 3


@dataclass(frozen=True)
class ExamplesOptions:
    """What the command line says."""

    folder: str
    as_json: bool
    talk: Talk


@click.command(epilog="\b\nExample:\n  mergekit-rain examples .")
@click.argument("folder", metavar="DIR", type=click.Path(), default=".")
@json_option
@output_options
@typed(ExamplesOptions)
def examples(options: ExamplesOptions) -> None:
    """Copy the example configurations, calibration sets and small models into DIR.

    DIR is the folder in which the command is started if it is left out. It gets `configs` (one
    configuration for each published pair of models, and one with every setting), `calibration`
    (two sets in plain English) and `trio` (three small models with their own sets). A file that is
    there already and differs is never overwritten.
    """
    console = options.talk.console(quiet=options.as_json)
    copy_examples(Path(options.folder))
    console.heading(f"Wrote {', '.join(_FOLDERS)} into {options.folder}")
    if options.as_json:
        print_json("examples", {"folder": options.folder, "folders": list(_FOLDERS)})
    console.print("Next: copy one of the files in configs, and name your models in it")


def copy_examples(folder: Path) -> None:
    """Copy all examples into the folder, which is created if it is missing.

    Raises RainError, before anything is written, if a file there would be overwritten, or if the
    folder cannot be written.
    """
    pairs = list(_pairs(folder))
    try:
        taken = [goal for source, goal in pairs if os.path.lexists(goal) and _differ(source, goal)]
        if taken:
            names = ", ".join(str(goal.relative_to(folder)) for goal in taken[:_SHOWN])
            raise RainError(f"{folder}: {names} there would be overwritten; name another folder")
        for source, goal in pairs:
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, goal)
    except OSError as error:
        raise RainError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from None


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Each shipped file, and where it goes."""
    for name, source in _FOLDERS.items():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path, folder / name / path.relative_to(source)


def _differ(source: Path, goal: Path) -> bool:
    return not goal.is_file() or not filecmp.cmp(source, goal, shallow=False)
