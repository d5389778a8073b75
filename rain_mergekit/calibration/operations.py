"""What a calibration has to do, by what limits its speed, and the seconds that this takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rain_mergekit.system.speed import Rates

# A layer called from Python, with every torch function watched; small beside real layers.
PASS_SECONDS = 0.004


@dataclass(frozen=True)
class Operations:
    """Amounts of work; `rain_mergekit.system.speed.Rates` says how much a second does of each.

    Attributes:
        products: floating-point operations of matrix products in the type of the forward pass.
        double: those in float64: products, triangular solves, Cholesky factors.
        eigen: n³, summed over symmetric eigenvalue decompositions of n x n in float64.
        memory: bytes that pass through memory outside of products.
        read: bytes read from the disk.
        write: bytes written to it.
        passes: texts through a layer, each of which is a call from Python.
    """

    products: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    memory: float = 0.0
    read: float = 0.0
    write: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Operations(**sums)

    def __mul__(self, factor: float) -> Operations:
        return Operations(**{f.name: getattr(self, f.name) * factor for f in fields(self)})

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Seconds of each kind of work, by its name; their sum where nothing overlaps."""
        kinds = ("products", "double", "eigen", "memory", "read", "write")
        found: dict[str, float] = {n: getattr(self, n) / getattr(rates, n) for n in kinds}
        return {**found, "passes": self.passes * PASS_SECONDS}

    def computing(self, rates: Rates) -> float:
        """Seconds without reading and writing."""
        found = self.seconds(rates)
        return sum(found.values()) - found["read"] - found["write"]

    def total(self, rates: Rates) -> float:
        """Seconds in all: computing, reading and writing one after the other."""
        return sum(self.seconds(rates).values())
