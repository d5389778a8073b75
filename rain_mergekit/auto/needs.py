"""What a merge will need, printed before it begins: download, disk, memory, minutes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rain_mergekit.auto.candidates import Candidate
from rain_mergekit.calibration.operations import Operations
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import plan
from rain_mergekit.commands.console import duration, size
from rain_mergekit.commands.plan import rates_here
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import default_dtype, read_model_config

# Each layer of each model is built, filled and emptied, and a result is written and read.
_START, _LAYER = 20.0, 0.5


@dataclass(frozen=True)
class Needs:
    """Bytes, and seconds of computing without the download."""

    download: int
    result: int
    calibration: int
    work: int
    memory: int
    seconds: float

    @property
    def disk(self) -> int:
        """Bytes at the result's folder, at the highest point."""
        return self.result + self.calibration + self.work


def needs_of(config: RainConfig, roles: Mapping[str, Candidate], run: RunOptions) -> Needs:
    """From headers and token counts alone; `config` names the folders in which models are seen.

    RainError if the models or the sets do not fit together.
    """
    found = plan(config, run)
    reasoning = roles["reasoning"].checkpoint
    model_config = read_model_config(reasoning)
    dtype = run.dtype or default_dtype(model_config, run.device)
    rates = rates_here(run.device, dtype, _there(config.calibration.parent))
    layers = model_config.get_text_config().num_hidden_layers
    merge = Operations(read=2.0 * reasoning.bytes * len(roles), write=float(reasoning.bytes))
    return Needs(
        download=sum(one.seen.missing for one in roles.values()),
        result=reasoning.bytes,
        calibration=found.file_bytes,
        work=found.work_disk,
        memory=found.peak,
        seconds=_START + _LAYER * layers + (found.operations + merge).total(rates),
    )


def need_lines(needs: Needs) -> Iterator[str]:
    """One line of text for each need."""
    if needs.download:
        yield f"to download: {size(needs.download)}"
    yield (
        f"disk: {size(needs.disk)} at most (result {size(needs.result)}, calibration "
        f"{size(needs.calibration)}, the rest while it works)"
    )
    yield f"memory: about {size(needs.memory)} above the imports"
    yield f"time on this machine: about {duration(needs.seconds)} of computing"


def require_room(needs: Needs, out: Path, cache: Path) -> None:
    """RainError if the disks of the result and of the hub's cache have not enough left."""
    places = [(_there(out), needs.disk), (_there(cache), needs.download)]
    for place, _ in places:
        device = place.stat().st_dev
        wanted = sum(count for other, count in places if other.stat().st_dev == device)
        free = shutil.disk_usage(place).free
        if wanted > free:
            raise RainError(
                f"{place}: {size(wanted)} are needed there and {size(free)} are free; name a "
                "folder on another disk (--transformers-cache for downloads)"
            )


def _there(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())
