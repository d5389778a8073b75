"""`mergekit-rain verify`: what a merge did to the reasoning model's thinking."""

from __future__ import annotations

from typing import Any

import click

from rain_mergekit.commands.options import (
    device_option,
    dtype_option,
    loading_options,
    output_options,
    pick_device,
    pick_dtype,
)

_DAMAGED = 3


@click.command(
    epilog="\b\nExample:\n  mergekit-rain verify ./merged --against ./R1-Distill-Qwen-7B "
    "--reasoning-data held-out.jsonl --samples 32"
)
@click.argument("merged")
@click.option("--against", required=True, metavar="REASONING", help="The reasoning model.")
@click.option(
    "--reasoning-data",
    required=True,
    type=click.Path(),
    help="Samples with thinking, best not those of the calibration.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Use this many, evenly spaced.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Skip samples that are longer.")
@click.option("--window", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--markers", nargs=2, default=("<think>", "</think>"), show_default=True)
@device_option()
@dtype_option()
@loading_options
@output_options
def verify(**options: Any) -> None:
    """Compare MERGED with the reasoning model, token by token, on texts with thinking.

    L_think is the mean KL divergence at the think positions: the markers and the tokens around
    them. Up to 0.01 the format is kept; above 0.05 it is damaged (exit code 3). Both models are
    loaded as a whole.
    """
    from rain_mergekit.commands.console import Console  # noqa: PLC0415 - keeps --help fast
    from rain_mergekit.evaluation import drift, load_model  # noqa: PLC0415
    from rain_mergekit.measure import open_checkpoint  # noqa: PLC0415
    from rain_mergekit.models import LoadOptions  # noqa: PLC0415

    console = Console(quiet=options["quiet"], verbosity=options["verbosity"])
    console.setup()
    device, dtype = pick_device(options["device"]), pick_dtype(options["dtype"])
    load = LoadOptions.of(options)
    checkpoints = [open_checkpoint(options[name], load) for name in ("against", "merged")]
    samples = _samples(checkpoints[0], options, console)
    models = [load_model(checkpoint, device, dtype) for checkpoint in checkpoints]
    from tqdm import tqdm  # noqa: PLC0415

    total = sum(len(sample.input_ids) for sample in samples)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not console.progress) as progress:
        found = drift(models[0], models[1], samples, progress.update)
    _report(found, console)
    if found.verdict == "damaged":
        click.get_current_context().exit(_DAMAGED)


def _samples(reasoning: Any, options: dict[str, Any], console: Any) -> list[Any]:
    from rain_mergekit.data import Markers  # noqa: PLC0415
    from rain_mergekit.measure import Texts, read_texts  # noqa: PLC0415

    path, count, markers = options["reasoning_data"], options["samples"], options["markers"]
    texts = Texts(path, count, Markers(*markers), options["window"], options["max_tokens"])
    samples, data = read_texts(reasoning, texts)
    if skipped := data.total - len(data.samples):
        source, reason = data.skipped[0]
        console.warn(f"{skipped} of {data.total} samples skipped, the first {source}: {reason}")
    return samples


def _report(found: Any, console: Any) -> None:
    places = (
        ("L_think", found.think, "the markers and the tokens around them"),
        ("L_mid", found.content, "inside the thinking block"),
        ("L_rest", found.rest, "prompt and response"),
    )
    console.say(f"Mean KL divergence from the reasoning model, {found.samples} samples (nats):")
    for name, place, text in places:
        console.say(f"  {name:<8} {place.mean:<10.3g} {place.positions:>7} positions, {text}")
    console.say(f"  worst sample at think positions: {found.worst_source} ({found.worst:.3g})")
    meaning = {
        "kept": "the thinking format is kept",
        "at risk": "the thinking format is at risk: generate some answers before using it",
        "damaged": "the thinking format is damaged: expect missing close markers; "
        "lower `lambda` or protect more (rank_share, max_rank)",
    }
    console.head(f"Verdict: {meaning[found.verdict]}")
