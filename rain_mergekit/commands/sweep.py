"""`mergekit-rain sweep`: several strengths from one calibration, and what each did."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, add_merge_options

from rain_mergekit.commands.console import Console
from rain_mergekit.commands.host_merge import merge_into
from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.merge import (
    add_card,
    bring_up_to_date,
    device_of,
    refuse_input,
    run_options,
)
from rain_mergekit.commands.options import budget_option, dtype_option, pick_dtype, typed
from rain_mergekit.commands.run_finish import finish_beside_weights
from rain_mergekit.commands.thread_choice import threads_for_model
from rain_mergekit.config.merge_config import RainConfig, read_config
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.evaluation.divergence_meter import DivergenceMeter
from rain_mergekit.evaluation.layerwise_drift import VerifyOptions
from rain_mergekit.evaluation.sweep import (
    REPORT,
    Row,
    contents,
    folder_name,
    split_numbers,
    table,
    write_rows,
)
from rain_mergekit.evaluation.texts import read_texts, texts_from_settings
from rain_mergekit.merge_method.missing_tensors import Completion
from rain_mergekit.models.loading import LoadOptions, open_checkpoint, open_model
from rain_mergekit.system.staged_folder import staged_folder
from rain_mergekit.system.wording import counted

_LAMBDA = "--lambda"


class _Sweep(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let one --lambda take several numbers (click's options take one)."""
        return super().parse_args(ctx, split_numbers(args, _LAMBDA))


def _finite(_context: click.Context, _parameter: click.Parameter, values: Any) -> Any:
    if not all(math.isfinite(value) for value in values):
        raise click.BadParameter("strengths must be finite numbers")
    return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class SweepOptions:
    """What the command line says; mergekit's own options as mergekit has them."""

    config: str
    strengths: tuple[float, ...]
    output: str
    reasoning_data: str | None
    samples: int
    table_only: bool
    as_json: bool
    calibration_dtype: str | None
    activation_budget: int
    merge_options: MergeOptions


@click.command(
    cls=_Sweep,
    epilog="\b\nExample:\n  mergekit-rain sweep config.yml --lambda 0.5 0.75 1.0 -o ./sweep "
    "--reasoning-data held-out.jsonl",
)
@click.argument("config", type=click.Path())
@click.option(
    _LAMBDA,
    "strengths",
    type=float,
    multiple=True,
    required=True,
    callback=_finite,
    metavar="NUMBER...",
    help="The strengths, one or more: 0.5 1 1.5, or 0.5,1,1.5.",
)
@click.option("-o", "--output", type=click.Path(), required=True, metavar="DIR", help="Where to.")
@click.option(
    "--reasoning-data",
    type=click.Path(),
    help="Samples to measure on, best not those of the calibration (which are the default).",
)
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--table-only", is_flag=True, help="Remove each merged model after measuring it.")
@json_option
@dtype_option("--calibration-dtype")
@budget_option
@add_merge_options  # type: ignore[untyped-decorator] # mergekit publishes no types
@typed(SweepOptions)
def sweep(options: SweepOptions) -> None:
    """Merge CONFIG at several strengths and tabulate what each did to the thinking.

    Calibrates once, if needed. Each model is written to DIR/lambda-NUMBER, the table to
    DIR/sweep.json. The columns are those of `mergekit-rain verify`, and measured in the same way.
    """
    config, strengths, merge_options = options.config, options.strengths, options.merge_options
    quiet = merge_options.quiet or options.as_json
    console = Console(quiet=quiet, verbosity=merge_options.verbosity)
    console.setup()
    merge_options.apply_global_options()
    if not console.progress:
        merge_options = merge_options.model_copy(update={"quiet": True})
    parsed, folder = read_config(config), Path(options.output)
    for strength in strengths:
        refuse_input(parsed, str(folder / folder_name(strength)))
    load = LoadOptions.of(merge_options.model_dump())
    completion = Completion.of(parsed.with_strength(strengths[0]), load)
    run = run_options(
        merge_options,
        options.calibration_dtype,
        options.activation_budget,
        deterministic=False,
        quiet=not console.progress,
    )
    bring_up_to_date(parsed, run, console, merge_options.num_threads, again=False)
    rows: list[Row] = []
    with (
        threads_for_model(open_model(parsed.reasoning, load), merge_options.num_threads),
        _meter(parsed, load, merge_options, options, console) as meter,
    ):
        write_rows(folder, rows)
        for strength in strengths:
            place = folder / folder_name(strength)
            console.print(f"Merging at lambda {strength:g}: {place}")
            _merge(parsed.with_strength(strength), place, merge_options, completion, console)
            found = meter.drift(open_checkpoint(str(place), load))
            if options.table_only:
                shutil.rmtree(place)
            rows.append(Row(strength, None if options.table_only else place.name, found))
            write_rows(folder, rows)
    if options.as_json:
        print_json("sweep", {"folder": options.output, "rows": contents(rows)})
    _show(rows, folder, console)


def _merge(
    config: RainConfig,
    place: Path,
    options: MergeOptions,
    completion: Completion,
    console: Console,
) -> None:
    with staged_folder(place) as stage:
        merge_into(config, stage, options, completion)
        if options.write_model_card:
            add_card(place, stage, console)
        finish_beside_weights(config, stage, completion, console, tokenizer=options.copy_tokenizer)


def _meter(
    config: RainConfig,
    load: LoadOptions,
    merge_options: MergeOptions,
    options: SweepOptions,
    console: Console,
) -> DivergenceMeter:
    settings = config.settings.model_dump(mode="json")
    if options.reasoning_data is None:
        console.print("Measuring on samples of the calibration itself: held-out ones tell more")
    data = options.reasoning_data or config.settings.reasoning_data
    reasoning = plain_view(open_model(config.reasoning, load))
    samples, _ = read_texts(reasoning, texts_from_settings(settings, data, options.samples))
    how = VerifyOptions(
        load,
        device_of(merge_options),
        pick_dtype(options.calibration_dtype),
        options.activation_budget,
    )
    return DivergenceMeter.of(reasoning, samples, how)


def _show(rows: list[Row], folder: Path, console: Console) -> None:
    console.print()
    console.print(
        f"Mean KL divergence from the reasoning model, {counted(rows[0].drift.samples, 'sample')}:"
    )
    head, *lines = table(rows)
    console.heading(head)
    for line in lines:
        console.print(line)
    console.print(f"Wrote {folder / REPORT}")
