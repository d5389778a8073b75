"""`python -m benchmarks [--quick | --full]`: every target, measured side by side in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.history import HISTORY, change, comparable, read
from benchmarks.measure import REPOSITORY, in_child
from benchmarks.rows import GPU_ROWS, ROWS, Bench, Row, on_gpu
from benchmarks.shapes import Shape


def main() -> None:
    """Measure, print the table, append to the history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes (the default)")
    size.add_argument("--full", action="store_true", help="32 layers, 16k tokens; 4 GiB of disk")
    parser.add_argument("--only", default="", help="rows whose function's name contains this")
    options = parser.parse_args()
    start, rows = time.monotonic(), list[Row]()
    past = comparable(read(), "full" if options.full else "quick", machine())
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="rain-benchmarks-") as folder:
        rates = in_child("rates", folder=folder)
        print("this machine: " + ", ".join(f"{k} {v:.3g}/s" for k, v in rates.items()))
        bench = make_bench(Path(folder), rates, full=options.full)
        for measure in (*ROWS, *([on_gpu] if gpu else [])):
            if options.only in measure.__name__:
                for row in measure(bench):
                    rows.append(row)
                    print(line(row, past), flush=True)
    for name in () if gpu else GPU_ROWS:
        print(f"{name:58} no GPU here")
    if not options.only:
        record(rows, rates, full=options.full, seconds=time.monotonic() - start)


def make_bench(folder: Path, rates: dict[str, float], *, full: bool) -> Bench:
    """The sizes of a quick or a full run."""
    if full:
        shape = Shape(hidden=1024, ffn=4096)
        return Bench(folder, shape, (4, 16, 32), (1024, 4096, 16384), 3, rates)
    shape = Shape(hidden=512, ffn=2048, heads=8, kv_heads=2)
    return Bench(folder, shape, (2, 8), (1024, 4096), 1, rates)


def line(row: Row, past: Sequence[dict[str, Any]]) -> str:
    """A row of the printed table."""
    target = "" if row.target is None else f"<= {row.target:g}"
    verdict = "" if row.target is None else "ok" if row.value <= row.target else "MISSED"
    floor = "" if row.floor is None else f"{row.floor:.1f} x floor"
    notes = [note for note in (change(row.name, row.value, past), floor, row.detail) if note]
    return f"{row.name:58} {row.value:8.3f} {target:8} {verdict:7} {'; '.join(notes)}"


def record(rows: Sequence[Row], rates: dict[str, float], *, full: bool, seconds: float) -> None:
    """Append one line: machine (no names), commit, numbers."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "size": "full" if full else "quick",
        "seconds": round(seconds, 1),
        "machine": machine(),
        "rates": rates,
        "rows": {row.name: row.value for row in rows},
        "floors": {row.name: row.floor for row in rows if row.floor is not None},
        "numbers": {row.name: row.numbers for row in rows if row.numbers},
    }
    with HISTORY.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


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
