"""Peak memory of a calibration, against the number of layers and the length of a text."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import BUDGET, MIB, Bench, Row
from benchmarks.shapes import TextSet

SHORT = TextSet(tokens=256, samples=4)
LONG_BUDGET = 1024 * MIB


def memory_by_depth(bench: Bench) -> list[Row]:
    """Peak above the imports, against 4 layers + embedding + budget."""
    rows, first = [], 0
    for layers in bench.depths:
        shape = bench.shape.deep(layers)
        found = bench.calibrate(bench.trio(shape, SHORT))
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
        home = bench.trio(bench.shape.deep(2), TextSet(tokens, samples=1))
        found = bench.calibrate(home, LONG_BUDGET, projection="orthogonal", protect_thinking=0.0)
        peak = found["peak_bytes"]
        detail = f"{peak / MIB:.0f} MiB; planned {found['planned_peak'] / MIB:.0f} MiB"
        held = 2 * bench.shape.layer_bytes + 2 * tokens * bench.shape.hidden * 4  # in and out
        name, floor = f"peak memory, {tokens} tokens", peak / held
        if previous is None:
            rows.append(Row(f"{name}, MiB", peak / MIB, None, detail, floor, found))
        else:
            growth = (peak / previous[1]) / (tokens / previous[0])
            before = f"{previous[1] / MIB:.0f} MiB at {previous[0]} tokens"
            name += ", growth / that of the text"
            rows.append(Row(name, growth, 1.0, f"{detail}; {before}", floor, found))
        previous = tokens, peak
    return [*rows, _within_budget(found, bench.lengths[-1])]


def _within_budget(found: dict[str, Any], tokens: int) -> Row:
    """The longest text, uncut: all besides the layer's weights against the activation budget."""
    used = found["peak_bytes"] - found["planned_layer"]
    detail = f"{used / MIB:.0f} of {LONG_BUDGET / MIB:.0f} MiB besides the layer's weights"
    return Row(f"activations of {tokens} tokens / budget", used / LONG_BUDGET, 1.0, detail)
