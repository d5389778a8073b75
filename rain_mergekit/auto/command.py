"""`mergekit-rain auto`: from the names of the models to a merge that is measured."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Any

import click

from rain_mergekit.commands.json_output import json_option, print_json
from rain_mergekit.commands.options import (
    Loading,
    MarkerPairs,
    Talk,
    budget_option,
    deterministic_option,
    device_option,
    dtype_option,
    loading_options,
    markers_option,
    output_options,
    pick_device,
    pick_dtype,
    template_option,
    typed,
)

_DAMAGED = 3


@dataclass(frozen=True)
class AutoOptions:
    """What the command line says."""

    models: tuple[str, ...]
    out: str
    fit: str
    strength: float
    yes: bool
    as_json: bool
    reasoning_data: str | None
    instruction_data: str | None
    prompts: tuple[str, ...]
    max_new_tokens: int
    seed: int
    markers: MarkerPairs
    blocks: str
    chat_template_kwargs: dict[str, Any]
    activation_budget: int
    deterministic: bool
    device: str
    dtype: str | None
    loading: Loading
    talk: Talk


@click.command(
    epilog="\b\nExample:\n  mergekit-rain auto deepseek-ai/DeepSeek-R1-Distill-Qwen-7B "
    "Qwen/Qwen2.5-7B-Instruct -o ./merged"
)
@click.argument("models", nargs=-1, required=True, metavar="REASONING INSTRUCT [PRETRAINED]")
@click.option("-o", "--out", required=True, type=click.Path(), help="The folder of the result.")
@click.option("-y", "--yes", is_flag=True, help="Start without asking.")
@json_option
@click.option(
    "--fit",
    type=click.Choice(["streams", "projection"]),
    default="streams",
    show_default=True,
    help="streams needs two models, projection (the paper's) a pretrained one too.",
)
@click.option("--lambda", "strength", type=float, default=1.0, show_default=True)
@click.option("--reasoning-data", type=click.Path(), help="Your reasoning set.")
@click.option("--instruction-data", type=click.Path(), help="Your instruction set.")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(),
    help="Let the reasoning model write its own set to these; may be repeated.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Of an answer in a set that it writes.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@markers_option
@click.option(
    "--blocks",
    type=click.Choice(["required", "optional"]),
    default="required",
    show_default=True,
    help="optional: the first model need not think; what it writes in its set stays.",
)
@template_option
@budget_option
@deterministic_option
@device_option()
@dtype_option()
@loading_options
@output_options
@typed(AutoOptions)
def auto(options: AutoOptions) -> None:
    """Merge the models that are named, from the first look to a measured result in one folder.

    It finds out who is who, the thinking markers, the template and the type, says what it will take
    before it downloads any weights, asks once, calibrates, merges, and measures the thinking. OUT
    gets the model with its card, and in OUT/rain the YAML, the calibration, the sets, a page of
    pictures and what it takes to make it again. Interrupted: the same command goes on.
    """
    _check_usage(options)
    from pathlib import Path  # noqa: PLC0415 - keeps --help fast

    from rain_mergekit.auto.job import Job  # noqa: PLC0415
    from rain_mergekit.auto.run import run_auto  # noqa: PLC0415

    console = options.talk.console(quiet=options.as_json)
    console.setup()
    device = pick_device(options.device)
    job = Job(
        request=_request(options),
        out=Path(options.out),
        run=_run(options, device, quiet=not console.progress),
        loading=options.loading,
        talk=options.talk,
        merge_options=_merge_options(options, device, quiet=not console.progress),
        command=shlex.join(["mergekit-rain", *sys.argv[1:]]),
    )
    verdict = run_auto(job, console, lambda: options.yes or _ask())
    if options.as_json:
        print_json("auto", {"folder": options.out, "verdict": verdict})
    if verdict is None:
        console.print("Nothing was written.")
    elif verdict == "damaged":
        click.get_current_context().exit(_DAMAGED)


def _check_usage(options: AutoOptions) -> None:
    count = len(options.models)
    if count not in (2, 3):
        raise click.UsageError(f"two or three models are expected, found {count}")
    if options.fit == "projection" and count == 2:
        raise click.UsageError(
            "--fit projection adds what tuning changed in the instruct model, and needs the model "
            "that this was tuned from: name it third, or leave out --fit (streams needs no third)"
        )
    if options.as_json and not options.yes:
        raise click.UsageError("--json needs -y: there is nobody to be asked")
    if options.prompts and options.reasoning_data:
        raise click.UsageError("--prompts and --reasoning-data exclude each other")
    own = options.markers and options.reasoning_data and options.instruction_data
    if options.blocks == "optional" and not own:
        raise click.UsageError(
            "--blocks optional needs --markers, --reasoning-data and --instruction-data: what "
            "stays and what comes is in no set of the package"
        )


def _ask() -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("no terminal to ask for your agreement: -y starts without asking")
    return click.confirm("Go on?", default=True)


def _request(options: AutoOptions) -> Any:
    from rain_mergekit.auto.request import Request  # noqa: PLC0415

    return Request(
        models=options.models,
        fit=options.fit,
        strength=options.strength,
        markers=options.markers,
        chat_template_kwargs=options.chat_template_kwargs,
        reasoning_data=options.reasoning_data,
        instruction_data=options.instruction_data,
        prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        blocks=options.blocks,
    )


def _run(options: AutoOptions, device: str, *, quiet: bool) -> Any:
    from rain_mergekit.calibration.options import RunOptions  # noqa: PLC0415

    return RunOptions(
        load=options.loading.options(),
        device=device,
        dtype=pick_dtype(options.dtype),
        activation_budget=options.activation_budget,
        deterministic=options.deterministic,
        quiet=quiet,
    )


def _merge_options(options: AutoOptions, device: str, *, quiet: bool) -> Any:
    from dataclasses import asdict  # noqa: PLC0415

    from mergekit.options import MergeOptions  # noqa: PLC0415

    return MergeOptions(**asdict(options.loading), device=device, quiet=quiet)
