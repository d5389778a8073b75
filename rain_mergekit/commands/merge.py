"""`mergekit-rain merge`: calibrate if needed, then mergekit's own merge with all its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from mergekit.options import MergeOptions, add_merge_options

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.up_to_date import compare
from rain_mergekit.checks.vocabulary_sizes import require_mergeable
from rain_mergekit.commands.console import Console
from rain_mergekit.commands.host_merge import merge_into
from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    budget_option,
    deterministic_option,
    dtype_option,
    pick_device,
    pick_dtype,
    typed,
)
from rain_mergekit.commands.run_calibration import run_calibration
from rain_mergekit.commands.run_finish import finish_beside_weights, told_of_added
from rain_mergekit.config.merge_config import RainConfig, read_config
from rain_mergekit.errors import RainError
from rain_mergekit.merge_method.missing_tensors import Completion
from rain_mergekit.models.loading import LoadOptions
from rain_mergekit.report.model_card import carry_over, publish_names, write_card
from rain_mergekit.system.determinism import deterministic
from rain_mergekit.system.memory import MERGE, naming_shortage
from rain_mergekit.system.staged_folder import output_folder, staged_folder


@dataclass(frozen=True)
class MergeCommandOptions:
    """What the command line says; mergekit's own options as mergekit has them."""

    config: str
    out: str
    recalibrate: bool
    calibration_dtype: str | None
    activation_budget: int
    deterministic: bool
    as_json: bool
    merge_options: MergeOptions


@click.command(
    epilog="\b\nExample:\n  mergekit-rain merge config.yml ./merged --cuda --out-shard-size 2B"
)
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--recalibrate", is_flag=True, help="Calibrate even if the file is up to date.")
@dtype_option("--calibration-dtype")
@budget_option
@deterministic_option
@json_option
@add_merge_options  # type: ignore[untyped-decorator] # mergekit publishes no types
@typed(MergeCommandOptions)
def merge(options: MergeCommandOptions) -> None:
    """Calibrate if the file is missing or was made from something else, then merge into OUT.

    The merge is mergekit's own and takes all options of `mergekit-yaml`; the calibration uses the
    same device, caches and verbosity. OUT is filled only when everything has succeeded.
    """
    config, out, merge_options = options.config, options.out, options.merge_options
    quiet = merge_options.quiet or options.as_json
    console = Console(quiet=quiet, verbosity=merge_options.verbosity)
    console.setup(logs=False)
    merge_options.apply_global_options()
    if not console.progress:
        merge_options = merge_options.model_copy(update={"quiet": True})
    parsed = read_config(config)
    refuse_input(parsed, out)
    device_of(merge_options)
    run = run_options(
        merge_options,
        options.calibration_dtype,
        options.activation_budget,
        deterministic=options.deterministic,
        quiet=not console.progress,
    )
    make(parsed, out, Making(merge_options, run, again=options.recalibrate), console)
    if options.as_json:
        print_json("merge", {"folder": out, "calibration": str(parsed.calibration)})


@dataclass(frozen=True)
class Making:
    """How a merge is made: mergekit's options, the calibration's, and whether to calibrate anew."""

    merge_options: MergeOptions
    run: RunOptions
    again: bool = False


def make(config: RainConfig, out: str, how: Making, console: Console) -> None:
    """Calibrate if needed, merge, and finish the folder `out`; it is filled as a whole or not.

    Raises RainError for an input that cannot be used.
    """
    require_mergeable(config, how.run.load)
    completion = Completion.of(config, how.run.load)
    threads = how.merge_options.num_threads
    with staged_folder(out) as stage:
        bring_up_to_date(config, how.run, console, threads, again=how.again)
        fill(config, Path(out), stage, completion, how, console)
    console.heading(f"Wrote {out}")


def fill(
    config: RainConfig,
    out: Path,
    stage: Path,
    completion: Completion,
    how: Making,
    console: Console,
) -> None:
    """Merge into the folder `stage`, which will take the place of `out`; card and files too."""
    options = how.merge_options
    try:
        with (
            naming_shortage("in the merge", MERGE),
            deterministic(torch.device(how.run.device), wanted=how.run.deterministic),
        ):
            added = merge_into(config, stage, options, completion)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{config.path} is calibrated, but {out} was not written; run the same command again"
        ) from None
    if options.write_model_card:
        add_card(out, stage, console)
    finish_beside_weights(config, stage, completion, console, tokenizer=options.copy_tokenizer)
    told_of_added(added, console)


def add_card(out: str | Path, stage: Path, console: Console) -> None:
    """Our part of the model card, into the one that is there; a merge is not lost for it."""
    try:
        publish_names(stage)
        carry_over(out, stage)
        write_card(stage)
    except (OSError, RainError) as error:
        console.warn(f"could not add the calibration to the model card: {error}")


def refuse_input(config: RainConfig, out: str) -> None:
    """RainError if the output folder is one of the three models."""
    goal = output_folder(out)
    for role, model in config.models.items():
        folder = Path(model.model.path)
        if folder.exists() and folder.resolve() == goal:
            raise RainError(f"{out}: is the {role} model itself; name another output folder")


def device_of(merge_options: MergeOptions) -> str:
    """The device that mergekit's options name; RainError if it is not there."""
    if merge_options.multi_gpu and not torch.accelerator.is_available():
        raise RainError("--multi-gpu: this torch sees no GPU; leave the option out")
    return pick_device(str(merge_options.device or "cpu"))


def run_options(
    merge_options: MergeOptions,
    dtype: str | None,
    activation_budget: int,
    *,
    deterministic: bool,
    quiet: bool,
) -> RunOptions:
    """How a calibration runs that comes before a merge with these options."""
    return RunOptions(
        load=LoadOptions.of(merge_options.model_dump()),
        device=device_of(merge_options),
        dtype=pick_dtype(dtype),
        activation_budget=activation_budget,
        deterministic=deterministic,
        quiet=quiet,
    )


def bring_up_to_date(
    config: RainConfig, run: RunOptions, console: Console, threads: int | None, *, again: bool
) -> None:
    """Calibrate if the file is missing or was made from something else, and say why.

    again: calibrate even if the file is up to date.
    """
    found = compare(config, run.load)
    for text in found.unchecked:
        console.warn(f"{text}; the existing calibration is used")
    if found.current and not again:
        console.print(f"{config.calibration} is up to date: not calibrated again")
        return
    for text in found.differences:
        console.print(f"Calibration needed: {text}")
    run_calibration(config, run, console, threads)
