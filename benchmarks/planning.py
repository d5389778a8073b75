"""What a calibration took against what its plan said: peak memory, and time of the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.bench import MIB, Bench, Row
from benchmarks.shapes import Shape, TextSet

WITHIN = 1.2  # of the plan, above or below it


@dataclass(frozen=True)
class Case:
    """A shape that is calibrated, and the texts of its two sets."""

    shape: Shape
    reasoning: TextSet
    instruction: TextSet

    @property
    def name(self) -> str:
        """Its width and depth, as a row shows them."""
        return f"width {self.shape.hidden}, {self.shape.layers} layers"


def _case(hidden: int, layers: int, samples: int) -> Case:
    shape = Shape(hidden=hidden, ffn=4 * hidden, heads=8, kv_heads=2, layers=layers)
    return Case(shape, TextSet(600, samples), TextSet(300, samples))


# Long enough that the second in which Python opens the models, which no plan counts, is small.
CASES = (_case(512, 2, 24), _case(768, 2, 18), _case(1024, 1, 18))


def as_planned(bench: Bench) -> list[Row]:
    """Runs of three shapes at the defaults, and of the paper's fit, over their plans.

    Of time the rates of the machine are measured before and after each run, all in processor time,
    so other programs do not count.
    """
    rows: list[Row] = []
    for case in CASES:
        for fit in ("streams", "projection"):
            home = bench.trio(case.shape, case.reasoning, case.instruction)
            rows += compared(f"{case.name}, {fit}", bench.calibrate(home, rates=True, fit=fit))
    return rows


def compared(name: str, found: dict[str, Any]) -> list[Row]:
    """The rows of one run; a ratio below one is turned over, as both ways are off.

    found: of `benchmarks.measure.calibration` with `rates`.
    """
    peak, planned = found["peak_bytes"], found["planned_peak"]
    took, before_after = found["processor_seconds"], found["planned_processor_seconds"]
    seconds = sum(before_after) / len(before_after)
    told = " and ".join(f"{one:.1f}" for one in before_after)
    memory = f"{peak / MIB:.0f} of {planned / MIB:.0f} MiB, {peak / planned:.2f}"
    time = f"{took:.1f} of {told} s, {took / seconds:.2f}"
    return [
        Row(f"memory off its plan, {name}", _off(peak / planned), WITHIN, memory, numbers=found),
        Row(f"time off its plan, {name}", _off(took / seconds), WITHIN, time),
    ]


def _off(ratio: float) -> float:
    return max(ratio, 1 / ratio)
