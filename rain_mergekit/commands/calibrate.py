"""`mergekit-rain calibrate`: the precompute."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Loading,
    Talk,
    budget_option,
    deterministic_option,
    device_option,
    dtype_option,
    experts_option,
    loading_options,
    output_options,
    pick_device,
    pick_dtype,
    threads_option,
    typed,
)
from rain_mergekit.system.loader_choice import LOADERS, MMAP


@dataclass(frozen=True)
class CalibrateOptions:
    """What the command line says."""

    config: str
    device: str
    dtype: str | None
    activation_budget: int
    keep_on_device: bool
    snapshot_every: float
    deterministic: bool
    batch_tokens: int | None
    read_ahead: bool
    loader: str
    experts_budget: int | None
    profile: str | None
    plan: bool
    as_json: bool
    threads: int | None
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain calibrate config.yml --device cuda --dtype bfloat16"
)
@click.argument("config", type=click.Path())
@device_option()
@dtype_option()
@budget_option
@click.option(
    "--keep-on-device",
    is_flag=True,
    help="Keep hidden states within the activation budget on the device.",
)
@click.option(
    "--snapshot-every",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=60,
    show_default=True,
    help="How often at most to save what an interrupted run goes on from; 0: every layer.",
)
@deterministic_option
@threads_option
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="Texts of similar length pass a layer together, up to N tokens with their padding; 0: "
    "one at a time. For fit: streams.  [default: 2048, on a GPU 8192]",
)
@click.option(
    "--read-ahead/--no-read-ahead",
    default=True,
    show_default=True,
    help="Read the next layer while one computes; takes the memory of a stored layer a model.",
)
@click.option(
    "--loader",
    type=click.Choice(LOADERS),
    default=MMAP,
    show_default=True,
    help="How layers are read ahead: from mapped files, or by the threads of fastsafetensors.",
)
@experts_option
@click.option(
    "--profile",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write where the time went, as a trace for ui.perfetto.dev, and print the shares.",
)
@click.option(
    "--plan", is_flag=True, help="Print what it will need (memory, disk, operations) and stop."
)
@json_option
@loading_options
@output_options
@typed(CalibrateOptions)
def calibrate(options: CalibrateOptions) -> None:
    """Write the calibration file that CONFIG names under `parameters.calibration`.

    CONFIG is the YAML of the merge with a `rain:` section. Relative paths in it are taken from the
    working folder, as mergekit does. An interrupted run goes on when started again. After it,
    `mergekit-yaml CONFIG OUT` merges; with fit: projection at any `lambda`, without another
    calibration.
    """
    from rain_mergekit.calibration.options import RunOptions  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.commands.plan import show_plan  # noqa: PLC0415
    from rain_mergekit.commands.profile import profiled  # noqa: PLC0415
    from rain_mergekit.commands.run_calibration import content, next_step, run_calibration  # noqa: PLC0415
    from rain_mergekit.config.merge_config import read_config  # noqa: PLC0415

    leader = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    console = options.talk.console(quiet=not leader or options.as_json)
    console.setup()
    run = RunOptions(
        load=options.loading.options(),
        device=pick_device(options.device),
        dtype=pick_dtype(options.dtype),
        activation_budget=options.activation_budget,
        snapshot_seconds=options.snapshot_every,
        keep_on_device=options.keep_on_device,
        deterministic=options.deterministic,
        batch_tokens=options.batch_tokens,
        read_ahead=options.read_ahead,
        loader=options.loader,
        experts_budget=options.experts_budget,
        quiet=not console.progress,
    )
    config = read_config(options.config)
    if options.plan:
        found = show_plan(config, run, console)
        if options.as_json and leader:
            print_json("calibrate", {"plan": {"peak": found.peak, **asdict(found)}})
        return
    with profiled(options.profile, run.device, console):
        summary = run_calibration(config, run, console, options.threads)
    if options.as_json and leader:
        print_json("calibrate", {"calibration": content(summary)})
    next_step(config, run.load, console)
