"""Merging by rain and by mergekit's task arithmetic, in alternating processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shapes import write_config

METHODS = ("task_arithmetic", "rain")


def compare(folder: Path, repeats: int, *options: str) -> dict[str, Any]:
    """Medians of each method's costs; `folder` holds a trio and a calibration."""
    configs = {name: write_config(folder, name) for name in METHODS}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for turn in range(repeats):
        for name in METHODS if turn % 2 else METHODS[::-1]:
            found[name].append(merge(configs[name], folder / "merged", *options))
    return {
        name: {key: median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def merge(config: Path, out: Path, *options: str) -> dict[str, float]:
    """Wall and processor seconds and peak resident bytes of one mergekit-yaml process."""
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, code, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(code)
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode != 0:
        raise RuntimeError(complaint.decode(errors="replace")[-2000:])
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
