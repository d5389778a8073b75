"""`mergekit-rain verify`: what a merge did to the reasoning model's thinking."""

from __future__ import annotations

from pathlib import Path
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
from rain_mergekit.errors import RainError

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
    from rain_mergekit.models import load_tokenizer  # noqa: PLC0415

    console = Console(quiet=options["quiet"], verbosity=options["verbosity"])
    console.setup()
    device, dtype = pick_device(options["device"]), pick_dtype(options["dtype"])
    reasoning, merged = _open(options["against"], options), _open(options["merged"], options)
    samples = _samples(load_tokenizer(reasoning), options, console)
    models = [load_model(checkpoint, device, dtype) for checkpoint in (reasoning, merged)]
    from tqdm import tqdm  # noqa: PLC0415

    total = sum(len(sample.input_ids) for sample in samples)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not console.progress) as progress:
        found = drift(models[0], models[1], samples, progress.update)
    _report(found, console)
    if found.verdict == "damaged":
        click.get_current_context().exit(_DAMAGED)


def _open(name: str, options: dict[str, Any]) -> Any:
    from mergekit.common import ModelReference  # noqa: PLC0415

    from rain_mergekit.checkpoint import Checkpoint  # noqa: PLC0415

    try:
        # A folder is taken by its name, whatever `+` and `@` mean in references.
        local = {"model": {"path": name}} if Path(name).is_dir() else None
        reference = ModelReference.model_validate(local) if local else ModelReference.parse(name)
    except (RuntimeError, ValueError) as error:
        raise RainError(f"{name}: is not a model reference: {error}") from None
    return Checkpoint(
        reference,
        cache_dir=options["transformers_cache"],
        lora_cache_dir=options["lora_merge_cache"],
        lora_merge_dtype=options["lora_merge_dtype"],
        trust_remote_code=options["trust_remote_code"],
    )


def _samples(tokenizer: Any, options: dict[str, Any], console: Any) -> list[Any]:
    from rain_mergekit.data import Markers, load_reasoning  # noqa: PLC0415
    from rain_mergekit.features import spread  # noqa: PLC0415

    data = load_reasoning(
        options["reasoning_data"],
        tokenizer,
        markers=Markers(*options["markers"]),
        window=options["window"],
        max_tokens=options["max_tokens"],
        keep_response=True,
    )
    if skipped := data.total - len(data.samples):
        source, reason = data.skipped[0]
        console.warn(f"{skipped} of {data.total} samples skipped, the first {source}: {reason}")
    count = options["samples"] or len(data.samples)
    return [data.samples[index] for index in spread(range(len(data.samples)), count)]


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
