"""`mergekit-rain calibrate --plan`: the estimate, printed."""

from __future__ import annotations

from rain_mergekit.calibration.estimate import Estimate
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.pipeline import plan
from rain_mergekit.commands.console import Console, size
from rain_mergekit.config.merge_config import RainConfig

_TERA = 1e12


def show_plan(config: RainConfig, options: RunOptions, console: Console) -> Estimate:
    """Memory by part, disk, operations, and the largest size of the file."""
    found = plan(config, options)
    console.heading("This calibration needs about")
    console.print(f"  memory above the imports: {size(found.peak)}")
    for name, part in found.memory.items():
        console.print(f"    {name}: {size(part)}")
    console.print(f"  disk for the work folder: at most {size(found.work_disk)}")
    console.print(f"  calibration file: at most {size(found.file_bytes)}")
    console.print(f"  to read: {size(found.read_bytes)} of weights")
    forward, statistics = found.forward_flops / _TERA, found.statistics_flops / _TERA
    console.print(f"  to compute: {forward:.3g} TFLOP forward, {statistics:.3g} TFLOP statistics")
    return found
