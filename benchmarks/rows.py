"""One function a row of the table: measures, and says how far from target and floor it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import merging
from benchmarks.measure import in_child
from benchmarks.shapes import Shape, make_trio, write_config, write_samples

MIB = 1024**2
BUDGET = 256 * MIB


@dataclass(frozen=True)
class Row:
    """A measured quantity, the most it should be, and what it consists of.

    floor: how many times the physical floor it is (bytes over the disk's rate, operations over the
    processor's, or the bytes that must be in memory); None where there is none.
    """

    name: str
    value: float
    target: float | None
    detail: str = ""
    floor: float | None = None
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
    device: str = "cpu"

    def trio(self, shape: Shape, tokens: int, samples: int) -> Path:
        """Models of that shape, made once, with samples of that length."""
        home = self.folder / f"{shape.hidden}x{shape.ffn}x{shape.layers}"
        if not home.exists():
            make_trio(home, shape)
        write_samples(home, tokens, samples)
        return home

    def calibrate(self, home: Path, **settings: Any) -> dict[str, Any]:
        """One calibration in a child process."""
        config = write_config(home, **settings)
        return in_child("calibration", config=config, budget=BUDGET, device=self.device)

    @property
    def flops(self) -> float:
        """Operations per second of a forward pass."""
        return self.rates["float32_flops" if self.device == "cpu" else "gpu_bfloat16_flops"]

    def on(self, device: str) -> Bench:
        """The same, computing there."""
        return replace(self, device=device)


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
        held = 2 * shape.layer_bytes  # one layer in float32
        name = f"peak memory, {layers} layers"
        rows.append(Row(name, peak / allowed, 1.0, detail, peak / held, found))
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
        held = 2 * bench.shape.layer_bytes + 2 * tokens * bench.shape.hidden * 4  # in and out
        rows.append(Row(f"peak memory, {tokens} tokens", growth, 1.0, detail, peak / held, found))
        previous = tokens, peak
    return rows


def calibration_time(bench: Bench) -> list[Row]:
    """Against plain forward passes of the same samples through the loaded model.

    Rows are scaled with the width, so that statistics weigh against the forward passes as they do
    for a 7B model (width 3584) with 30 + 30 samples of 1,000 and of 4,000 tokens at default
    settings. The shorter is where they still weigh; the longer is where the passes dominate.
    """
    scale = bench.shape.hidden / 3584
    home = bench.trio(bench.shape.deep(2), int(60_000 * scale / 8), 4)
    where = "" if bench.device == "cpu" else ", GPU"
    rows: list[Row] = []
    for tokens, share, target in ((1000, 1, None), (4000, 4, 1.15)):
        limits = {"content_rows": 2048, "instruction_rows": 4096}
        settings = {name: int(count * scale / share) for name, count in limits.items()}
        runs = [_side_by_side(bench, home, settings) for _ in range(bench.repeats)]
        ratio, plain, full = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
        floor = full["forward_flops"] / bench.flops
        statistics = full["statistics_flops"] / bench.rates["float64_flops"]
        processor = full["processor_seconds"] / plain["processor_seconds"]
        reading = full["read_bytes"] / bench.rates["disk_read_bytes"]
        detail = (
            f"{full['seconds']:.1f} and {plain['seconds']:.1f} s, of which loading "
            f"{plain['seconds'] - plain['forward_seconds']:.1f}; floor {floor:.1f} s forward + "
            f"{statistics:.1f} s statistics, {reading:.1f} s to read meanwhile"
        )
        distance = full["seconds"] / max(floor + statistics, reading)
        name = f"calibrate / plain forward, {tokens} tokens{where}"
        numbers = {"plain": plain, "full": full}
        rows.append(Row(name, ratio, target, detail, distance, numbers))
        rows.append(Row(f"{name}, processor time", processor, target))
    passes = max(count / (full["samples"] * full["layers"]) for count in full["passes"].values())
    return [*rows, Row(f"forwards per sample per layer{where}", passes, 1.0, str(full["passes"]))]


def _side_by_side(
    bench: Bench, home: Path, settings: dict[str, int]
) -> tuple[float, dict[str, Any], dict[str, Any]]:
    plain = in_child("forward", config=write_config(home), device=bench.device)
    full = bench.calibrate(home, **settings)
    return full["seconds"] / plain["seconds"], plain, full


def merging_cost(bench: Bench) -> list[Row]:
    """Against task arithmetic of the same models with the same options."""
    shape = bench.shape.deep(bench.depths[0])
    home = bench.trio(shape, 256, 4)
    bench.calibrate(home)
    gpu = bench.device != "cpu"
    found = merging.compare(home, bench.repeats, *(["--cuda"] if gpu else []))
    where = ", GPU" if gpu else ""
    rain, other = found["rain"], found["task_arithmetic"]
    rates = bench.rates
    reading = 3 * shape.model_bytes / rates["disk_read_bytes"]
    floor = reading + shape.model_bytes / rates["disk_write_bytes"]
    detail = f"{rain['seconds']:.1f} and {other['seconds']:.1f} s; floor {floor:.2f} s of disk"
    peaks = f"{rain['peak_bytes'] / MIB:.0f} and {other['peak_bytes'] / MIB:.0f} MiB"
    ratios = {key: rain[key] / other[key] for key in rain}
    return [
        Row(
            f"merge time / task_arithmetic{where}",
            ratios["seconds"],
            1.1,
            detail,
            rain["seconds"] / floor,
            found,
        ),
        Row(
            f"merge processor time / task_arithmetic{where}",
            ratios["processor_seconds"],
            1.1,
            f"{rain['processor_seconds']:.1f} and {other['processor_seconds']:.1f} s",
        ),
        Row(f"merge memory / task_arithmetic{where}", ratios["peak_bytes"], 1.1, peaks),
    ]


def on_gpu(bench: Bench) -> list[Row]:
    """Calibration and merge on the GPU; what the card holds against one layer and the budget."""
    gpu = bench.on("cuda")
    shape = gpu.shape.deep(gpu.depths[-1])
    found = gpu.calibrate(gpu.trio(shape, 256, 4))
    allowed = 4 * shape.layer_bytes + shape.embedding_bytes + BUDGET
    peak = found["gpu_peak_bytes"]
    detail = f"{peak / MIB:.0f} of {allowed / MIB:.0f} MiB"
    name = f"peak GPU memory, {shape.layers} layers"
    held = Row(name, peak / allowed, 1.0, detail, peak / shape.layer_bytes, found)
    return [held, *calibration_time(gpu), *merging_cost(gpu)]


def file_size(_bench: Bench) -> list[Row]:
    """The largest file at the shape of a 7B model: the rank cap bounds it."""
    from rain_mergekit.run import MIN_RANK_CAP  # noqa: PLC0415 - only this row needs it

    widths, layers, model = 2 * 3584 + 3584 + 18944, 28, 15_231_233_024
    per_rank = widths * 4 * 2 * layers
    cap = max(MIN_RANK_CAP, int(0.10 * model / per_rank))
    share = cap * per_rank / model
    return [Row("calibration file / model, 7B shape", share, 0.10, f"at the rank cap, {cap}")]


def import_cost(bench: Bench) -> list[Row]:
    """Milliseconds of `import rain_mergekit` in a fresh interpreter, the least disturbed one."""
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
    return [Row("import rain_mergekit, ms", min(times), 5.0, f"imports torch: {torch_seen}")]


GPU_ROWS = (
    "peak GPU memory",
    "calibrate / plain forward, GPU",
    "merge time and memory / task_arithmetic --cuda",
)
ROWS: Sequence[Callable[[Bench], list[Row]]] = (
    import_cost,
    file_size,
    memory_by_depth,
    memory_by_length,
    calibration_time,
    merging_cost,
)
