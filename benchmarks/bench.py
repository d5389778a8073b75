"""What a row of the table is, and what every measurement needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import in_child
from benchmarks.shapes import Shape, TextSet, make_trio, write_config, write_samples

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

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty where there is none."""
        if self.target is None:
            return ""
        return "passed" if self.value <= self.target else "MISSED"


@dataclass(frozen=True)
class Bench:
    """Where the models go, how large they are, and what the machine can do.

    paper: the shape for the comparison with plain forward passes, see `speed`.
    """

    folder: Path
    shape: Shape
    paper: Shape
    depths: Sequence[int]
    lengths: Sequence[int]
    merged_layers: int
    repeats: int
    rates: dict[str, float]
    device: str = "cpu"

    def trio(self, shape: Shape, *sets: TextSet) -> Path:
        """Models of that shape, made once, with those samples (of both sets, or for each its)."""
        home = self.folder / f"{shape.hidden}x{shape.ffn}x{shape.layers}"
        if not home.exists():
            make_trio(home, shape)
        write_samples(home, *sets)
        return home

    def calibrate(
        self,
        home: Path,
        budget: int = BUDGET,
        *,
        deterministic: bool = False,
        rates: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """One calibration in a child process; rates: whether it also plans its time."""
        options = {"device": self.device, "budget": budget, "deterministic": deterministic}
        options |= {"rates": rates}
        return in_child("calibration", config=write_config(home, **settings), **options)

    @property
    def flops(self) -> float:
        """Operations per second of a forward pass."""
        return self.rates["float32_flops" if self.device == "cpu" else "gpu_bfloat16_flops"]

    def on(self, device: str) -> Bench:
        """The same, computing there."""
        return replace(self, device=device)
