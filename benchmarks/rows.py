"""All rows of the table, and the small ones among them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench import BUDGET, MIB, Bench, Row
from benchmarks.memory import SHORT, memory_by_depth, memory_by_length
from benchmarks.merging import merging_alone, merging_cost
from benchmarks.planning import as_planned
from benchmarks.speed import deterministic_cost, few_samples, paper_sized


def on_gpu(bench: Bench) -> list[Row]:
    """Calibration and merge on the GPU; what the card holds against one layer and the budget."""
    gpu = bench.on("cuda")
    shape = gpu.shape.deep(gpu.depths[-1])
    found = gpu.calibrate(gpu.trio(shape, SHORT))
    allowed = 4 * shape.layer_bytes + shape.embedding_bytes + BUDGET
    peak = found["gpu_peak_bytes"]
    detail = f"{peak / MIB:.0f} of {allowed / MIB:.0f} MiB"
    name = f"peak GPU memory, {shape.layers} layers"
    held = Row(name, peak / allowed, 1.0, detail, peak / shape.layer_bytes, found)
    return [held, *paper_sized(gpu), *merging_cost(gpu)]


def file_size(_bench: Bench) -> list[Row]:
    """The largest file at the shape of a 7B model: the rank cap bounds it."""
    from rain_mergekit.calibration.options import MIN_RANK_CAP  # noqa: PLC0415 - only this row needs it

    widths, layers, model = 2 * 3584 + 3584 + 18944, 28, 15_231_233_024
    per_rank = widths * 4 * 2 * layers
    cap = max(MIN_RANK_CAP, int(0.10 * model / per_rank))
    share = cap * per_rank / model
    return [Row("calibration file / model, 7B shape", share, 0.10, f"at the rank cap, {cap}")]


def import_cost(bench: Bench) -> list[Row]:
    """Milliseconds of `import rain_mergekit` in a fresh interpreter, the least disturbed one.

    The floor is the import of a package without content.
    """
    empty = bench.folder / "empty_package"
    empty.mkdir(exist_ok=True)
    (empty / "__init__.py").touch()
    repeats = max(7, bench.repeats)
    floor, _ = _import(empty.name, empty.parent, repeats)
    value, torch_seen = _import("rain_mergekit", None, repeats)
    detail = f"imports torch: {torch_seen}"
    idle = "import sys; print(sum(name.startswith('rain_mergekit') for name in sys.modules))"
    out = subprocess.run([sys.executable, "-c", idle], capture_output=True, text=True, check=True)
    return [
        Row("import rain_mergekit, ms", value, 5.0, detail, value / floor),
        Row("modules of ours in an interpreter without torch", float(out.stdout), 0.0),
    ]


def _import(name: str, folder: Path | None, repeats: int) -> tuple[float, str]:
    """Milliseconds of the fastest import, and whether torch came with it."""
    script = (
        f"import sys, time; s = time.perf_counter(); import {name}; "
        "print((time.perf_counter() - s) * 1e3, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
        for _ in range(repeats)
    ]
    return min(float(run.split()[0]) for run in runs), runs[0].split()[1]


GPU_ROWS = (
    "peak GPU memory",
    "calibrate / plain forward, GPU",
    "merge time and memory / task_arithmetic --cuda",
)
ROWS: Sequence[Callable[[Bench], list[Row]]] = (
    import_cost,
    file_size,
    memory_by_depth,
    as_planned,
    memory_by_length,
    paper_sized,
    few_samples,
    deterministic_cost,
    merging_cost,
    merging_alone,
)
# Left out of a quick run.
FULL = (as_planned, few_samples, deterministic_cost)
