"""What a calibration takes, against plain forward passes of the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import Bench, Row
from benchmarks.measure import in_child
from benchmarks.shapes import TextSet, write_config

WIDTH = 3584  # of the 7B model whose proportions are kept
TARGET = 1.15
ROWS = {"content_rows": 2048, "instruction_rows": 4096}  # the defaults
# The published calibration sets: 150 and 365 texts, of 217,000 and about 267,000 tokens.
REASONING, INSTRUCTION = TextSet(1446, 150), TextSet(730, 365)


def paper_sized(bench: Bench) -> list[Row]:
    """The paper's sets on a 7B model, tokens, rows and width scaled down by the same factor.

    So operations of the forward passes and of the statistics keep their proportion. The texts keep
    their length. What is done once a text (tokens, embedding) weighs more than in a real model, by
    as much as the layers are fewer.
    """
    scale = bench.paper.hidden / WIDTH
    sets = [
        TextSet(whole.tokens, max(1, round(whole.samples * scale)))
        for whole in (REASONING, INSTRUCTION)
    ]
    home = bench.trio(bench.paper, *sets)
    runs = [_side_by_side(bench, home, _scaled(scale), turn) for turn in range(bench.repeats)]
    where = "" if bench.device == "cpu" else ", GPU"
    name = f"calibrate / plain forward, the paper's sets{where}"
    ratios = sorted(full["seconds"] / plain["seconds"] for plain, full in runs)
    best = min(runs, key=lambda run: run[1]["seconds"])
    detail = _detail(bench, best) + f"; runs {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    rows = [Row(name, median(ratios), TARGET, detail, _floor(bench, best), _numbers(best))]
    for what, above, below in (
        ("processor time", "processor_seconds", "processor_seconds"),
        ("without the plain model's loading", "seconds", "forward_seconds"),
    ):
        value = median(full[above] / plain[below] for plain, full in runs)
        rows.append(Row(f"{name}, {what}", value, TARGET))
    return [*rows, _passes(best[1], where)]


def few_samples(bench: Bench) -> list[Row]:
    """30 + 30 texts of 1,000 tokens: where the statistics still weigh, so without a target."""
    scale = bench.shape.hidden / WIDTH
    home = bench.trio(bench.shape.deep(2), TextSet(int(60_000 * scale / 8), 4))
    run = _side_by_side(bench, home, _scaled(scale), 0)
    value, name = run[1]["seconds"] / run[0]["seconds"], "calibrate / plain forward, 30 + 30 texts"
    return [Row(name, value, None, _detail(bench, run), _floor(bench, run), _numbers(run))]


def deterministic_cost(bench: Bench) -> list[Row]:
    """The same bits with any number of threads, against as fast as they can."""
    sets = [TextSet(whole.tokens, whole.samples // 18) for whole in (REASONING, INSTRUCTION)]
    home, settings = bench.trio(bench.paper.deep(2), *sets), _scaled(bench.paper.hidden / WIDTH)
    runs = []
    for turn in range(bench.repeats):
        found = {
            wanted: bench.calibrate(home, deterministic=wanted, **settings)
            for wanted in ((False, True) if turn % 2 else (True, False))
        }
        runs.append((found[False], found[True]))
    rows = []
    for what, key in (("", "seconds"), (", processor time", "processor_seconds")):
        ratios = sorted(slow[key] / fast[key] for fast, slow in runs)
        detail = "runs " + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        name = f"calibrate --deterministic / calibrate{what}"
        rows.append(Row(name, median(ratios), None, detail))
    return rows


Pair = tuple[dict[str, Any], dict[str, Any]]


def _side_by_side(bench: Bench, home: Path, settings: Mapping[str, int], turn: int) -> Pair:
    """Plain forward passes and the calibration; which comes first alternates."""

    config = write_config(home, **settings)
    if turn % 2:
        full = bench.calibrate(home, **settings)
        return in_child("forward", config=config, device=bench.device), full
    plain = in_child("forward", config=config, device=bench.device)
    return plain, bench.calibrate(home, **settings)


def _scaled(scale: float) -> dict[str, int]:
    return {name: int(count * scale) for name, count in ROWS.items()}


def _floor(bench: Bench, run: Pair) -> float:
    """How many times the operations over the processor's rates, or the reading, it took."""
    forward, statistics, reading = _floors(bench, run[1])
    return float(run[1]["seconds"]) / max(forward + statistics, reading)


def _floors(bench: Bench, full: Mapping[str, Any]) -> tuple[float, float, float]:
    rates = bench.rates
    statistics = full["statistics_flops"] / rates["float64_flops"]
    reading = full["read_bytes"] / rates["disk_read_bytes"]
    return full["forward_flops"] / bench.flops, statistics, reading


def _detail(bench: Bench, run: Pair) -> str:
    plain, full = run
    forward, statistics, reading = _floors(bench, full)
    return (
        f"{full['seconds']:.1f} and {plain['seconds']:.1f} s, of which loading "
        f"{plain['seconds'] - plain['forward_seconds']:.1f}; floor {forward:.1f} s forward + "
        f"{statistics:.1f} s statistics, {reading:.1f} s to read meanwhile"
    )


def _numbers(run: Pair) -> dict[str, Any]:
    return {"plain": run[0], "full": run[1]}


def _passes(full: Mapping[str, Any], where: str) -> Row:
    each = full["passes_each"]
    detail = ", ".join(f"{name} set {count:g}" for name, count in each.items())
    most = max(each.values())
    return Row(f"forwards per sample per layer{where}", most, 1.0, detail, most)
