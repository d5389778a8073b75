"""`python -m benchmarks [--quick | --full]`: every target, measured side by side in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.bench import Bench, Row
from benchmarks.history import HISTORY, comparable, read
from benchmarks.measure import REPOSITORY, in_child
from benchmarks.rows import FULL, GPU_ROWS, ROWS, on_gpu
from benchmarks.shapes import Shape
from benchmarks.table import line


def main() -> None:
    """Measure, print the table, append to the history; exit with 1 if something failed."""
    options = arguments()
    start, rows, failed = time.monotonic(), list[Row](), list[str]()
    where = machine()
    past = comparable(read(), "full" if options.full else "quick", where)
    with tempfile.TemporaryDirectory(prefix="rain-benchmarks-") as folder:
        rates = in_child("rates", folder=folder)
        print("this machine: " + ", ".join(f"{k} {v:.3g}/s" for k, v in rates.items()))
        bench = make_bench(Path(folder), rates, full=options.full)
        for measure in (*ROWS, *([on_gpu] if where["gpu"] else [])):
            if options.only not in measure.__name__ or (measure in FULL and not options.full):
                continue
            try:
                found = measure(bench)
            except Exception:  # noqa: BLE001 - the other rows are still worth their time
                failed.append(measure.__name__)
                print(f"{measure.__name__}: FAILED\n{traceback.format_exc()}", flush=True)
                continue
            rows += found
            for row in found:
                print(line(row, past), flush=True)
    absent = () if where["gpu"] else GPU_ROWS
    for name in absent:
        print(f"{name:64} no GPU here")
    if not options.only and not failed:
        size, seconds = "full" if options.full else "quick", time.monotonic() - start
        entry = record(rows, rates, where, size, seconds)
        if options.write is not None:
            table.write(options.write, table.page(entry, rows, absent))
    sys.exit(1 if failed else 0)


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes (the default)")
    size.add_argument("--full", action="store_true", help="32 layers, 16k tokens; 6 GiB of disk")
    parser.add_argument("--only", default="", help="rows whose function's name contains this")
    parser.add_argument("--write", type=Path, help="the page whose table this run replaces")
    return parser.parse_args()


def make_bench(folder: Path, rates: dict[str, float], *, full: bool) -> Bench:
    """The sizes of a quick or a full run."""
    small = Shape(hidden=512, ffn=2048, heads=8, kv_heads=2)
    # As deep as the time allows: what is done once a text then weighs less, as in a real model.
    paper = Shape(hidden=512, ffn=2688, heads=8, kv_heads=2, layers=8 if full else 2)
    if full:
        shape = Shape(hidden=1024, ffn=4096)
        return Bench(folder, shape, paper, (4, 16, 32), (1024, 4096, 16384), 16, 3, rates)
    return Bench(folder, small, paper, (2, 8), (1024, 4096), 8, 1, rates)


def record(
    rows: Sequence[Row], rates: dict[str, float], where: dict[str, Any], size: str, seconds: float
) -> dict[str, Any]:
    """Append one line: machine (no names), commit, numbers."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "size": size,
        "seconds": round(seconds, 1),
        "machine": where,
        "rates": rates,
        "rows": {row.name: row.value for row in rows},
        "floors": {row.name: row.floor for row in rows if row.floor is not None},
        "numbers": {row.name: row.numbers for row in rows if row.numbers},
    }
    with HISTORY.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return entry


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """The version that was measured; `+` if the working tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


if __name__ == "__main__":
    main()
