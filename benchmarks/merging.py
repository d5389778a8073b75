"""Merging by rain and by mergekit's task arithmetic, in alternating processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import MIB, Bench, Row
from benchmarks.measure import REPOSITORY
from benchmarks.memory import SHORT
from benchmarks.shapes import write_config

METHODS = ("task_arithmetic", "rain")
TARGET = 1.1
Cost = dict[str, float]


def merging_cost(bench: Bench) -> list[Row]:
    """Against task arithmetic of the same models with the same options: whole commands."""
    home = _merged(bench)
    where, options = ("", []) if bench.device == "cpu" else (", GPU", ["--cuda"])
    costs = _alternating(2 * bench.repeats - 1, lambda name: _command(home, name, options))
    rain, other = (_medians(costs[name]) for name in ("rain", "task_arithmetic"))
    rates, size = bench.rates, bench.shape.deep(bench.merged_layers).model_bytes
    floor = 3 * size / rates["disk_read_bytes"] + size / rates["disk_write_bytes"]
    detail = (
        f"{rain['seconds']:.1f} and {other['seconds']:.1f} s, models of {size / MIB:.0f} MiB; "
        f"floor {floor:.2f} s of disk"
    )
    processor = f"{rain['processor_seconds']:.1f} and {other['processor_seconds']:.1f} s"
    peaks = f"{rain['peak_bytes'] / MIB:.0f} and {other['peak_bytes'] / MIB:.0f} MiB"
    weight = 2 * bench.shape.hidden * bench.shape.ffn  # of three models, and the merged one
    least = rain["peak_bytes"] / (_imports() + 4 * weight)
    value = {key: rain[key] / other[key] for key in rain}
    name, far = "task_arithmetic" + where, rain["seconds"] / floor
    numbers = {"rain": rain, "task_arithmetic": other}
    return [
        Row(f"merge time / {name}", value["seconds"], TARGET, detail, far, numbers),
        Row(f"merge processor time / {name}", value["processor_seconds"], TARGET, processor),
        Row(f"merge memory / {name}", value["peak_bytes"], TARGET, peaks, least),
    ]


def merging_alone(bench: Bench) -> list[Row]:
    """The same without the imports, which are alike and most of a small merge."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.merging",
        str(_merged(bench)),
        str(3 * bench.repeats),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rain, other = found["rain"], found["task_arithmetic"]
    name = "merge {} / task_arithmetic, imports left out"
    return [
        Row(
            name.format(what),
            rain[key] / other[key],
            TARGET,
            f"{rain[key]:.2f} and {other[key]:.2f} s",
            numbers=found,
        )
        for what, key in (("time", "seconds"), ("processor time", "processor_seconds"))
    ]


def _merged(bench: Bench) -> Path:
    """A trio of many layers and its calibration."""
    home = bench.trio(bench.shape.deep(bench.merged_layers), SHORT)
    if not (home / "c.rain.safetensors").exists():
        bench.calibrate(home)
    write_config(home), write_config(home, "task_arithmetic")
    return home


def _alternating(repeats: int, run: Callable[[str], Cost]) -> dict[str, list[Cost]]:
    """Which method comes first alternates too."""
    found: dict[str, list[Cost]] = {name: [] for name in METHODS}
    for turn in range(repeats):
        for name in METHODS if turn % 2 else METHODS[::-1]:
            found[name].append(run(name))
    return found


def _medians(runs: Sequence[Cost]) -> Cost:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def _command(home: Path, name: str, options: Sequence[str]) -> Cost:
    """One mergekit-yaml process."""
    out = home / "merged"
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(home / f"{name}.yml")]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, str(out), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        complaint = process.stderr.read()
        cost = _waited(process.pid, start, complaint.decode(errors="replace")[-2000:])
        process.returncode = 0
    shutil.rmtree(out, ignore_errors=True)
    return cost


def _imports() -> float:
    """Peak resident bytes of a process that imports what a merge needs, and does nothing."""
    command = [
        sys.executable,
        "-c",
        "import mergekit.scripts.run_yaml, rain_mergekit.calibration.engine",
    ]
    with subprocess.Popen(command) as process:
        cost = _waited(process.pid, time.perf_counter())
        process.returncode = 0
    return cost["peak_bytes"]


def _waited(process: int, start: float, complaint: str = "a merge failed") -> Cost:
    """Wall and processor seconds and peak resident bytes of a child."""
    _, code, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if code != 0:
        raise RuntimeError(complaint)
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _forked(home: Path, name: str, command: Any) -> Cost:
    """One merge in a copy of this process, which has imported everything."""
    out = home / "merged"
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            command([str(home / f"{name}.yml"), str(out), "--quiet"], standalone_mode=False)
            code = 0
        finally:
            os._exit(code)
    cost = _waited(child, start)
    shutil.rmtree(out, ignore_errors=True)
    return cost


def forked_merge(home: Path, name: str) -> Cost:
    """Merge `home`/`name`.yml in a copy of this process."""
    from mergekit.scripts.run_yaml import main as command  # noqa: PLC0415 - only this process

    return _forked(home, name, command)


def main(home: Path, repeats: int) -> None:
    """Print the medians of forked merges; `home` holds a trio and a calibration."""
    from mergekit.scripts.run_yaml import main as command  # noqa: PLC0415 - only this process

    costs = _alternating(repeats, lambda name: _forked(home, name, command))
    print(json.dumps({name: _medians(runs) for name, runs in costs.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
