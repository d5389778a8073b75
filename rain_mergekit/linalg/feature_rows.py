"""Feature rows kept in their own type and used in float64, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS_DTYPE = torch.float64
BLOCK_BYTES = 8 * 1024**2
RESPONSE_BYTES = 32 * 1024**2  # larger: each part is a product of its own
TASK_ROWS = 1024
STRIP = 192


@dataclass(frozen=True)
class FeatureRows:
    """X (n x d): the blocks stacked, each times its weight.

    Products with X are float64 without a float64 copy of X, which for wide sites would be larger
    than the layer itself. Symmetric products fill only the lower triangle, which is the one that
    `eigh` and `cholesky` read.
    """

    blocks: tuple[Tensor, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, rows: Tensor | FeatureRows) -> FeatureRows:
        """A plain matrix as one block of weight 1."""
        return rows if isinstance(rows, FeatureRows) else cls((rows,), (1.0,))

    @property
    def shape(self) -> tuple[int, int]:
        """n, d."""
        return sum(block.shape[0] for block in self.blocks), int(self.blocks[0].shape[1])

    @property
    def count(self) -> int:
        """n, the number of rows."""
        return self.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.blocks[0].device

    def scaled(self, factor: float) -> FeatureRows:
        """Factor times X; shares the blocks."""
        return FeatureRows(self.blocks, tuple(weight * factor for weight in self.weights))

    def near_unit(self) -> FeatureRows:
        """X times the power of two that brings its energy into [1/4, 1]; exact. Zero stays zero.

        Products in float32 then neither overflow nor underflow.
        """
        energy = self.energy()
        if energy == 0.0 or not math.isfinite(energy):
            return self
        return self.scaled(math.ldexp(1.0, -math.frexp(math.sqrt(energy))[1]))

    def dense(self) -> Tensor:
        """X as one float64 matrix; for small X only."""
        return self._columns(slice(None))

    def energy(self) -> float:
        """Sum of squares, the trace of X^T X; not finite if an element is not."""
        parts = zip(self.blocks, self.weights, strict=True)
        norms = [float(torch.linalg.vector_norm(b, dtype=STATISTICS_DTYPE)) * w for b, w in parts]
        return sum(norm**2 for norm in norms)

    def outer(self) -> Tensor:
        """X X^T, n x n; lower triangle."""
        count, _ = self.shape
        result = self._zeros(count, count)
        for columns in self._column_slices():
            _add_lower(result, self._columns(columns))
        return result

    def gram(self) -> Tensor:
        """X^T X, d x d; lower triangle."""
        _, width = self.shape
        result = self._zeros(width, width)
        for part in self._row_blocks():
            _add_lower(result, part.mT)
        return result

    def times(self, right: Tensor) -> Tensor:
        """X right (n x k) for right d x k float64."""
        return torch.cat([part @ right for part in self._row_blocks()])

    def transposed_times(self, left: Tensor) -> Tensor:
        """X^T left (d x k) float64, for left n x k."""
        result = self._zeros(self.shape[1], left.shape[1])
        start = 0
        for part in self._row_blocks():
            result.addmm_(part.mT, left[start : start + part.shape[0]].to(STATISTICS_DTYPE))
            start += part.shape[0]
        return result

    def responses(self, matrix: Tensor) -> Tensor:
        """Matrix X^T (m x n) for matrix m x d, in float32."""
        matrix = matrix.to(torch.float32)
        result = matrix.new_empty(matrix.shape[0], self.shape[0])
        start = 0
        for part, weight in self._parts(RESPONSE_BYTES):
            scaled = (part * weight).to(torch.float32)
            torch.mm(matrix, scaled.mT, out=result[:, start : start + part.shape[0]])
            start += part.shape[0]
        return result

    def _zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=STATISTICS_DTYPE, device=self.device)

    def _parts(self, size: int) -> Iterator[tuple[Tensor, float]]:
        """The rows in order, as they are stored, each part of about `size` bytes in float64."""
        step = max(1, size // (self.shape[1] * STATISTICS_DTYPE.itemsize))
        for block, weight in zip(self.blocks, self.weights, strict=True):
            for part in torch.split(block, step):
                yield part, weight

    def _row_blocks(self) -> Iterator[Tensor]:
        for part, weight in self._parts(BLOCK_BYTES):
            yield part.to(STATISTICS_DTYPE, copy=True).mul_(weight)

    def _column_slices(self) -> Iterator[slice]:
        count, width = self.shape
        step = max(1, BLOCK_BYTES // (count * STATISTICS_DTYPE.itemsize))
        return (slice(start, start + step) for start in range(0, width, step))

    def _columns(self, columns: slice) -> Tensor:
        count, width = self.shape
        result = self._zeros(count, len(range(width)[columns]))
        start = 0
        for block, weight in zip(self.blocks, self.weights, strict=True):
            part = result[start : start + block.shape[0]]
            part.copy_(block[:, columns]).mul_(weight)
            start += block.shape[0]
        return result


def _add_lower(result: Tensor, factor: Tensor) -> None:
    """Add factor factor^T to `result`, in strips that leave out most of the upper triangle."""
    for start in range(0, result.shape[0], STRIP):
        strip = factor[start : start + STRIP]
        result[start:, start : start + STRIP].addmm_(factor[start:], strip.mT)
