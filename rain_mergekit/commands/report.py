"""`mergekit-rain report`: one page of pictures about a calibration, and about a merge if given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Loading,
    Talk,
    budget_option,
    device_option,
    dtype_option,
    loading_options,
    output_options,
    pick_device,
    pick_dtype,
    threads_option,
    typed,
)
from rain_mergekit.errors import RainError

if TYPE_CHECKING:
    from rain_mergekit.calibration_file.reader import CalibrationFile
    from rain_mergekit.commands.console import Console
    from rain_mergekit.evaluation.task_vectors import TaskVectors
    from rain_mergekit.evaluation.texts import Texts
    from rain_mergekit.report.merge_pictures import Merged


_FEW = 8  # samples, if the user has chosen none


@dataclass(frozen=True)
class ReportOptions:
    """What the command line says."""

    calibration: str
    output: str
    merged: str | None
    against: str | None
    reasoning_data: str | None
    samples: int | None
    drift: bool
    task_vectors: bool | None
    subspace: int
    as_json: bool
    threads: int | None
    activation_budget: int
    device: str
    dtype: str | None
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain report trio.rain.safetensors --merged ./merged "
    "-o report.html"
)
@click.argument("calibration", metavar="CALIB", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), default="report.html", show_default=True, help="The page."
)
@click.option("--merged", metavar="DIR", help="Also show what this merge did to the weights.")
@click.option(
    "--against", metavar="REASONING", help="The reasoning model  [default: the recorded one]"
)
@click.option(
    "--reasoning-data",
    type=click.Path(),
    help="With --merged: measure the drift on these samples, as verify does  "
    "[default: a few of the calibration's own]",
)
@click.option("--samples", type=click.IntRange(min=1), help="Use this many of them.")
@click.option("--drift/--no-drift", default=True, help="With --merged: run both models, or do not.")
@click.option(
    "--task-vectors/--no-task-vectors",
    default=None,
    help="Read the three models, for the norms and the overlap of their task vectors  "
    "[default: if they are folders on this machine]",
)
@click.option(
    "--subspace",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="How many of the strongest directions to compare.",
)
@json_option
@budget_option
@device_option()
@dtype_option()
@threads_option
@loading_options
@output_options
@typed(ReportOptions)
def report(options: ReportOptions) -> None:
    """Draw what the calibration file CALIB holds, as one HTML page that needs nothing else.

    Needs matplotlib: pip install 'rain-mergekit[report]'.
    """
    if options.merged is None and (options.reasoning_data or options.against):
        raise click.UsageError("--against and --reasoning-data need --merged")
    from rain_mergekit.calibration_file.reader import CalibrationFile  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.report.extra import require_matplotlib  # noqa: PLC0415
    from rain_mergekit.report.page_file import protect_foreign, write_page  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    require_matplotlib()
    from rain_mergekit.report.page import render  # noqa: PLC0415 - imports it

    protect_foreign(options.output)
    file = CalibrationFile.open(options.calibration)
    merged = _merged(file, options.merged, options, console) if options.merged else None
    page = render(file, merged, _vectors(file, options, console))
    write_page(options.output, page)
    console.heading(f"Wrote {options.output}")
    if options.as_json:
        print_json("report", {"file": options.output})


def _vectors(file: CalibrationFile, options: ReportOptions, console: Console) -> TaskVectors | str:
    """The task vectors, or why the page does not show them."""
    from rain_mergekit.evaluation.task_vectors import differing, measure_task_vectors, unreachable  # noqa: PLC0415

    asked = options.task_vectors
    reason = unreachable(file) if asked is None else None
    if asked is False or reason is not None:
        return reason or "switched off by --no-task-vectors"
    from tqdm import tqdm  # noqa: PLC0415

    from rain_mergekit.dequantize.plain_view import open_plain  # noqa: PLC0415

    console.setup()
    load = options.loading.options()
    try:
        models = {role: open_plain(m.reference, load) for role, m in file.models.items()}
        if others := differing(file, models):
            raise RainError(
                f"the models are not those of {file.path}: another {' and '.join(others)} model is "
                "there now"
            )
        total, quiet = len(file.tensors), not console.progress
        with tqdm(total=total, desc="task vectors", unit="", disable=quiet) as progress:
            device = pick_device(options.device)
            return measure_task_vectors(file, models, options.subspace, device, progress.update)
    except RainError as error:
        if asked:
            raise
        return str(error)


def _merged(file: CalibrationFile, folder: str, options: ReportOptions, console: Console) -> Merged:
    from rain_mergekit.dequantize.plain_view import open_plain  # noqa: PLC0415
    from rain_mergekit.evaluation.comparable import check_reasoning  # noqa: PLC0415 - loads transformers
    from rain_mergekit.evaluation.weight_change import relative_weight_change  # noqa: PLC0415 - loads transformers
    from rain_mergekit.report.merge_pictures import Merged  # noqa: PLC0415

    console.setup()
    load = options.loading.options()
    recorded = file.models["reasoning"].reference
    reasoning = open_plain(options.against or recorded, load)
    check_reasoning(file, reasoning)
    merged = open_plain(folder, load)
    weights = relative_weight_change(file, reasoning, merged)
    texts = _texts(file, options)
    if isinstance(texts, str):
        return Merged(folder, weights, None, texts)
    from rain_mergekit.commands.run_verification import measure_on  # noqa: PLC0415
    from rain_mergekit.evaluation.layerwise_drift import VerifyOptions  # noqa: PLC0415

    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    how = VerifyOptions(load, device, dtype, options.activation_budget)
    measured, _ = measure_on(reasoning, merged, texts, how, console, options.threads)
    own = "" if options.reasoning_data else "the calibration's own texts: held-out ones tell more"
    return Merged(folder, weights, measured, own, texts.window)


def _texts(file: CalibrationFile, options: ReportOptions) -> Texts | str:
    """What to measure the drift on, or why it is not measured."""
    from rain_mergekit.evaluation.texts import recorded_texts, texts_from_settings  # noqa: PLC0415

    if options.drift is False:
        return "switched off by --no-drift"
    settings = file.header.get("settings") or {}
    if options.reasoning_data:
        return texts_from_settings(settings, options.reasoning_data, options.samples)
    path = recorded_texts(file)
    if path is None:
        return "the texts of the calibration are not here: name some with --reasoning-data"
    return texts_from_settings(settings, path, options.samples or _FEW)
