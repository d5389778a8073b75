"""One function a row of the table: measures, and says how far from target and floor it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import merging
from benchmarks.measure import in_child
from benchmarks.shapes import Shape, make_trio, write_config, write_samples

MIB = 1024**2
BUDGET = 256 * MIB


@dataclass(frozen=True)
class Row:
    """A measured quantity, the most it should be, and what it consists of."""

    name: str
    value: float
    target: float | None
    detail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where the models go, how large they are, and what the machine can do."""

    folder: Path
    shape: Shape
    depths: Sequence[int]
    lengths: Sequence[int]
    repeats: int
    rates: dict[str, float]

    def trio(self, shape: Shape, tokens: int, samples: int) -> Path:
        """Models of that shape, made once, with samples of that length."""
        home = self.folder / f"{shape.hidden}x{shape.ffn}x{shape.layers}"
        if not home.exists():
            make_trio(home, shape)
        write_samples(home, tokens, samples)
        return home

    def calibrate(self, home: Path, **settings: Any) -> dict[str, Any]:
        """One calibration in a child process."""
        return in_child("calibration", config=write_config(home, **settings), budget=BUDGET)


def memory_by_depth(bench: Bench) -> list[Row]:
    """Peak above the imports, against 4 layers + embedding + budget."""
    rows, first = [], 0
    for layers in bench.depths:
        shape = bench.shape.deep(layers)
        found = bench.calibrate(bench.trio(shape, 256, 4))
        allowed = 4 * shape.layer_bytes + shape.embedding_bytes + BUDGET
        peak = found["peak_bytes"]
        first = first or peak
        detail = (
            f"{peak / MIB:.0f} of {allowed / MIB:.0f} MiB; "
            f"planned {found['planned_peak'] / MIB:.0f} MiB; "
            f"{peak / first:.2f} of {bench.depths[0]} layers"
        )
        rows.append(Row(f"peak memory, {layers} layers", peak / allowed, 1.0, detail, found))
    return rows


def memory_by_length(bench: Bench) -> list[Row]:
    """Peak of one sample: twice the tokens may take at most twice the memory."""
    rows: list[Row] = []
    previous: tuple[int, int] | None = None
    for tokens in bench.lengths:
        home = bench.trio(bench.shape.deep(2), tokens, 1)
        found = bench.calibrate(home, projection="orthogonal", protect_thinking=0.0)
        peak = found["peak_bytes"]
        growth = 0.0
        if previous is not None:
            growth = (peak / previous[1]) / (tokens / previous[0])
        detail = f"{peak / MIB:.0f} MiB; growth over growth of the tokens"
        rows.append(Row(f"peak memory, {tokens} tokens", growth, 1.0, detail, found))
        previous = tokens, peak
    return rows


def calibration_time(bench: Bench) -> list[Row]:
    """Against plain forward passes of the same samples through the loaded model.

    Rows are scaled with the width, so that statistics weigh against the forward passes as they do
    for a 7B model (width 3584) with 30 + 30 samples of 1,000 tokens at default settings.
    """
    scale = bench.shape.hidden / 3584
    limits = {"content_rows": int(2048 * scale), "instruction_rows": int(4096 * scale)}
    home = bench.trio(bench.shape.deep(2), int(60_000 * scale / 8), 4)
    runs = []
    for _ in range(bench.repeats):
        plain = in_child("forward", config=write_config(home))
        full = bench.calibrate(home, **limits)
        runs.append((full["seconds"] / plain["seconds"], plain, full))
    ratio, plain, full = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    floor = full["forward_flops"] / bench.rates["float32_flops"]
    statistics = full["statistics_flops"] / bench.rates["float64_flops"]
    processor = full["processor_seconds"] / plain["processor_seconds"]
    detail = (
        f"{full['seconds']:.1f} and {plain['seconds']:.1f} s; {processor:.2f} in processor time; "
        f"floor {floor:.1f} s forward + {statistics:.1f} s statistics"
    )
    passes = max(count / (full["samples"] * full["layers"]) for count in full["passes"].values())
    return [
        Row("forwards per sample per layer", passes, 1.0, str(full["passes"])),
        Row("calibrate / plain forward", ratio, 1.15, detail, {"plain": plain, "full": full}),
    ]


def merging_cost(bench: Bench) -> list[Row]:
    """Against task arithmetic of the same models with the same options."""
    shape = bench.shape.deep(bench.depths[0])
    home = bench.trio(shape, 256, 4)
    bench.calibrate(home)
    found = merging.compare(home, bench.repeats)
    rain, other = found["rain"], found["task_arithmetic"]
    moved = 4 * shape.model_bytes
    floor = moved / bench.rates["memory_bytes"]
    detail = f"{rain['seconds']:.1f} s and {other['seconds']:.1f} s; floor {floor:.2f} s of copying"
    peaks = f"{rain['peak_bytes'] / MIB:.0f} and {other['peak_bytes'] / MIB:.0f} MiB"
    return [
        Row("merge time / task_arithmetic", rain["seconds"] / other["seconds"], 1.1, detail, found),
        Row("merge memory / task_arithmetic", rain["peak_bytes"] / other["peak_bytes"], 1.1, peaks),
    ]


def file_size(_bench: Bench) -> list[Row]:
    """The largest file at the shape of a 7B model: the rank cap bounds it."""
    from rain_mergekit.run import MIN_RANK_CAP  # noqa: PLC0415 - only this row needs it

    widths, layers, model = 2 * 3584 + 3584 + 18944, 28, 15_231_233_024
    per_rank = widths * 4 * 2 * layers
    cap = max(MIN_RANK_CAP, int(0.10 * model / per_rank))
    share = cap * per_rank / model
    return [Row("calibration file / model, 7B shape", share, 0.10, f"at the rank cap, {cap}")]


def import_cost(bench: Bench) -> list[Row]:
    """Milliseconds of `import rain_mergekit` in a fresh interpreter."""
    script = (
        "import sys, time; s = time.perf_counter(); import rain_mergekit; "
        "print((time.perf_counter() - s) * 1e3, 'torch' in sys.modules)"
    )
    times, torch_seen = [], "False"
    for _ in range(max(5, bench.repeats)):
        out = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        times.append(float(out[0]))
        torch_seen = out[1]
    return [Row("import rain_mergekit, ms", median(times), 5.0, f"imports torch: {torch_seen}")]


ROWS: Sequence[Callable[[Bench], list[Row]]] = (
    import_cost,
    file_size,
    memory_by_depth,
    memory_by_length,
    calibration_time,
    merging_cost,
)
