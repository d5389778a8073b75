"""Run a calibration and report it; behind `calibrate`, `merge` and `demo`."""

from __future__ import annotations

import shlex
from dataclasses import fields
from statistics import fmean
from typing import Any

from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import CalibrationSummary, calibrate
from rain_mergekit.calibration.up_to_date import protect_foreign
from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.stream_summary import Matching, matching
from rain_mergekit.checks.host_plan import adapter_warning
from rain_mergekit.checks.role_names import swapped_hint
from rain_mergekit.commands.console import Console, duration, size
from rain_mergekit.commands.thread_choice import threads_for_model
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.config.method_names import AIM
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.models.loading import LoadOptions, open_model, open_models, read_model_config
from rain_mergekit.system.wording import counted
from rain_mergekit.text.calibration_sets import DataSet

_SHOWN_REASONS = 3


def run_calibration(
    config: RainConfig, options: RunOptions, console: Console, threads: int | None = None
) -> CalibrationSummary:
    """Calibrate and say what was done. Raises RainError; an interruption says how to go on.

    threads: torch's; None: as many as suit the model.
    """
    protect_foreign(config.calibration)
    console.print(f"Calibrating on {options.device}: {config.reasoning}")
    tell_roles(config, console)
    try:
        with threads_for_model(open_model(config.reasoning, options.load), threads):
            summary = calibrate(config, options)
    except KeyboardInterrupt:
        work = config.calibration.with_name(config.calibration.name + ".work")
        hint = f"the finished layers are kept in {work}; the same command goes on from there"
        kept = (work / "snapshot.json").exists()
        raise KeyboardInterrupt(hint if kept else "nothing was written") from None
    report(summary, console)
    return summary


def tell_roles(config: RainConfig, console: Console) -> None:
    """Print the roles of the models; `fit: streams` needs no pretrained model."""
    if config.settings.fit == "streams" or config.method == AIM:
        return
    console.print(f"Δ = {_delta(config)}")
    hint = swapped_hint(config.instruct, config.pretrained)
    if hint is not None and config.pretrained != config.reasoning:
        console.warn(hint)


def _delta(config: RainConfig) -> str:
    gamma, (reasoning, tuned, origin) = config.settings.gamma, config.models.values()
    if gamma in (0, 1):
        return f"{tuned} − {reasoning if gamma else origin}"  # noqa: RUF001 - a minus sign
    return f"({tuned} − {origin}) − {gamma:g} ({reasoning} − {origin})"  # noqa: RUF001


def report(summary: CalibrationSummary, console: Console) -> None:
    """Layers, ranks, energy, samples, size, time, warnings."""
    file = CalibrationFile.open(summary.path)
    found = matching(file)
    console.heading(f"Wrote {summary.path}")
    layers = counted(summary.layers, "layer")
    if summary.first_layer:
        layers += f" (continued after {summary.first_layer})"
    console.print(f"  {layers}, {size(summary.bytes)}, {duration(summary.seconds)}")
    if file.kind == AIM:
        console.print(f"  {_channels(file.header['tensors'])}")
    elif found is None:
        console.print(f"  {_protection(file.header['sites'], summary.mean_rank)}")
    else:
        console.print(f"  {_matching(found)}")
    console.print(f"  thinking: {summary.samples.markers}")
    sets: list[tuple[str, DataSet[Any] | None]] = [
        ("reasoning samples", summary.samples.reasoning),
        ("instruction samples", summary.samples.instruction),
    ]
    for name, data in sets:
        if data is not None:
            later = f", {data.later} of them later in a chat" if data.later else ""
            console.print(f"  {name}: {len(data.samples)} of {data.total} used{later}")
            for line in _skipped(data):
                console.print(f"    skipped {line}")
    for text in summary.warnings:
        console.warn(text)


def content(summary: CalibrationSummary) -> dict[str, Any]:
    """A finished calibration as plain values, for `--json`."""
    found = summary.samples
    sets = {"reasoning": found.reasoning, "instruction": found.instruction}
    return {
        "file": str(summary.path),
        "bytes": summary.bytes,
        "seconds": summary.seconds,
        "layers": summary.layers,
        "first_layer": summary.first_layer,
        "mean_rank": summary.mean_rank,
        "markers": [list(pair) for pair in found.markers.pairs],
        "samples": {
            name: None if data is None else {**used(data), "later": data.later}
            for name, data in sets.items()
        },
        "warnings": list(summary.warnings),
    }


def used(data: DataSet[Any]) -> dict[str, Any]:
    """How much of a set was used as plain values, for `--json`."""
    skipped = [{"source": source, "reason": reason} for source, reason in data.skipped]
    return {
        "file": data.path,
        "total": data.total,
        "used": len(data.samples),
        "skipped": skipped,
    }


def next_step(config: RainConfig, load: LoadOptions, console: Console) -> None:
    """What to run after a calibration, with the options without which it would not find a model."""
    words = [config.path, "./merged"]
    for field in fields(load):
        value, option = getattr(load, field.name), f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value:
            words += [option, str(value)]
    console.print(f"Next: {_merging(config, load)} {shlex.join(words)}")


def _merging(config: RainConfig, load: LoadOptions) -> str:
    """mergekit's own command, or ours where that takes no model with an adapter."""
    if all(model.lora is None for model in config.models.values()):
        return "mergekit-yaml"
    models = open_models(config, load, plain_view)
    warned = adapter_warning(models, read_model_config(models["reasoning"]))
    return "mergekit-yaml" if warned is None else "mergekit-rain merge"


def _matching(found: Matching) -> str:
    """Ranks, and how far the merged hidden states are from their teachers after the last layer."""
    weights = counted(sum(module.weights for module in found.modules), "weight")
    text = f"changes of mean rank {found.mean_rank:.1f} for {weights}"
    text += f", {found.origin}" if found.origin else ""
    if not found.layers:
        return text
    last = found.layers[-1]
    errors = ", ".join(
        f"{group} {last.held_out.get(group, error):.1%}" for group, error in last.fitted.items()
    )
    kind = "held-out texts" if last.held_out else "the texts"
    return f"{text}; distance from the teachers on {kind}: {errors}"


def _channels(tensors: dict[str, dict[str, Any]]) -> str:
    """How much AIM will take back; next to nothing where a few channels are far above the rest."""
    shares = [entry.get("taken_back", 0.0) for entry in tensors.values()]
    text = f"channels of {counted(len(tensors), 'weight')}"
    if not shares:
        return text
    low, high = min(shares), max(shares)
    return f"{text}: at omega 0.4 {low:.1%} to {high:.1%} of an even change is taken back"


def _protection(sites: dict[str, dict[str, Any]], mean_rank: float) -> str:
    text = f"mean rank {mean_rank:.1f} over {counted(len(sites), 'input site')}"
    kept = [site["kept_energy"] for site in sites.values() if site.get("kept_energy") is not None]
    response = [v for site in sites.values() if (v := site.get("kept_response_energy")) is not None]
    if kept:
        text += f", kept energy {fmean(kept):.3f} (lowest {min(kept):.3f})"
    if response:
        text += f", of the response {fmean(response):.3f}"
    return text


def _skipped(data: DataSet[Any]) -> list[str]:
    lines = [f"{source}: {reason}" for source, reason in data.skipped[:_SHOWN_REASONS]]
    more = len(data.skipped) - _SHOWN_REASONS
    return lines + ([f"and {more} more"] if more > 0 else [])
