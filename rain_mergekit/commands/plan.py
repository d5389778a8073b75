"""What a calibration will need, printed: `calibrate --plan` and `estimate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rain_mergekit.calibration.estimate import Estimate
from rain_mergekit.calibration.file_choices import FileChoices
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import plan
from rain_mergekit.commands.console import Console, duration, size
from rain_mergekit.commands.moving_bar import moving_bar
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import default_dtype, open_model, read_model_config
from rain_mergekit.system.speed import Rates, measure_rates

_TERA = 1e12


def show_plan(config: RainConfig, options: RunOptions, console: Console) -> Estimate:
    """Memory by part, disk, operations, minutes on this machine, and the sizes of the file."""
    with moving_bar(2, "planning", console) as bar:
        found = plan(config, options)
        if console.quiet:
            return found
        bar.update()
        model_config = read_model_config(open_model(config.reasoning, options.load))
        dtype = options.dtype or default_dtype(model_config, options.device)
        folder = next(p for p in config.calibration.absolute().parents if p.is_dir())
        rates = rates_here(options.device, dtype, folder)
    show_estimate(found, rates, console)
    return found


def rates_here(device: str, dtype: torch.dtype, folder: Path) -> Rates:
    """This machine's rates; RainError where the disk of that folder cannot be written."""
    try:
        return measure_rates(device, dtype, folder)
    except OSError as error:
        raise RainError(
            f"{folder}: cannot measure the disk there ({error.strerror}); free space, or name "
            "another place for the calibration file"
        ) from None


def show_estimate(found: Estimate, rates: Rates, console: Console) -> None:
    """Print the estimate, and warn of what its notes say."""
    console.heading("This calibration needs about")
    for line in estimate_lines(found, rates):
        console.print(f"  {line}")
    for note in found.notes:
        console.warn(note)


def estimate_lines(found: Estimate, rates: Rates) -> Iterator[str]:
    """Memory by part, disk, the file's size as a choice, operations, minutes."""
    yield f"memory above the imports: {size(found.peak)}"
    yield from (f"  {name}: {size(part)}" for name, part in found.memory.items() if part)
    yield f"disk for the work folder: at most {size(found.work_disk)}"
    yield f"calibration file: at most {size(found.file_bytes)}"
    if found.file is not None:
        yield from _choices(found.file, found.rank)
    yield f"to read: {size(found.read_bytes)} of weights"
    forward, statistics = found.forward_flops / _TERA, found.statistics_flops / _TERA
    yield f"to compute: {forward:.3g} TFLOP forward, {statistics:.3g} TFLOP statistics"
    yield from _times(found, rates)


def _choices(file: FileChoices, rank: int) -> Iterator[str]:
    """What another `max_rank` would give."""
    yield "  at max_rank    file         share of the model"
    for most, count in file.sizes.items():
        mark = "  <- this plan" if most == rank else ""
        whole = "  (nothing is cut)" if most >= file.widest else ""
        share = count / max(1, file.model_bytes)
        yield f"  {most:>11}    {size(count):<11}  {share:>6.1%}{mark}{whole}"
    cut = min(1.0, rank / file.widest)
    yield (
        f"  modules have {file.narrowest:,} to {file.widest:,} directions: rank {rank} is "
        f"{cut:.1%} of the most; each takes as many as its share of energy needs, within that"
    )


def _times(found: Estimate, rates: Rates) -> Iterator[str]:
    work = found.operations
    parts = work.seconds(rates)
    seconds = max(work.computing(rates), parts["read"]) + parts["write"]
    yield f"time on this machine: about {duration(seconds)}, as reading hides behind computing"
    products = f"products {duration(parts['products'] + parts['double'])}"
    others = duration(parts["eigen"] + parts["memory"] + parts["passes"])
    reading = f"reading {duration(parts['read'])}, writing {duration(parts['write'])}"
    yield f"  {products}, decompositions and copies {others}, {reading}"
    tera, giga = rates.products / _TERA, rates.read / 1e9
    yield f"  (measured just now: {tera:.3g} TFLOP/s, disk {giga:.3g} GB/s)"


def estimate_record(found: Estimate, rates: Rates) -> dict[str, Any]:
    """The estimate as plain values, for `--json`: bytes, operations, seconds."""
    work = found.operations
    file = found.file
    return {
        "memory": dict(found.memory),
        "peak": found.peak,
        "work_disk": found.work_disk,
        "file_bytes": found.file_bytes,
        "read_bytes": found.read_bytes,
        "rank": found.rank,
        "file_by_max_rank": {} if file is None else dict(file.sizes),
        "operations": asdict(work),
        "rates": asdict(rates),
        "seconds": {**work.seconds(rates), "total": work.total(rates)},
        "notes": list(found.notes),
    }
