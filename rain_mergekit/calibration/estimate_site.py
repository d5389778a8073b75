"""The memory that one input site takes: its feature rows, then its solution.

Each step of `site_solver.solve_site` is the sum of the arrays that it holds, in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from rain_mergekit.linalg.feature_rows import BLOCK_BYTES, RESPONSE_BYTES, TASK_ROWS

FLOAT32, FLOAT64 = 4, 8
EIGEN_COPIES = 4  # the matrix, its eigenvectors, LAPACK's work space of two
THIN_COPIES = 4  # of d x rank: the basis, V, and two on the way to them


@dataclass(frozen=True)
class SiteShape:
    """What is known of an input site before anything runs.

    outputs: rows of all task vectors there. share: of the tokens that reach it, below 1 for one of
    many experts. reads: attention makes queries, keys or values of it.
    """

    width: int
    outputs: int
    share: float = 1.0
    reads: bool = False


@dataclass(frozen=True)
class SiteNeeds:
    """One site with its rows: protected, instruction, and those of both groups that are read."""

    site: SiteShape
    protected: int
    instruction: int
    reading: int
    rank: int
    oblique: bool

    @property
    def rows(self) -> int:
        """Feature rows, float32, from the passes to the solution."""
        count = self.protected + self.instruction + self.reading
        return count * self.site.width * FLOAT32

    @property
    def result(self) -> int:
        """U and V, float64, until the layer is written."""
        return (2 if self.oblique else 1) * self.site.width * self._rank * FLOAT64

    @property
    def solution(self) -> int:
        """The largest of the steps besides the rows."""
        held = self._side(self.protected) ** 2 * FLOAT64  # the eigenvectors, to the end
        width, thin = self.site.width, self.site.width * self._rank * FLOAT64 * THIN_COPIES
        steps = [self._eigen(self.protected), held + self._answers, held + thin]
        if self.reading:
            group = self.reading // 2
            outside = group * width * FLOAT64
            steps.append(held + thin + outside + max(self._eigen(group), self._answers))
        if self.oblique:
            side = self._side(self.instruction)
            steps.append(held + thin + 2 * side**2 * FLOAT64 + BLOCK_BYTES)
        return max(steps)

    @property
    def decomposed(self) -> float:
        """n³ of each eigenvalue decomposition, n x n, which are far slower than as many products.

        One is of what is protected, one each of the prompts and of the responses that are read.
        """
        return float(self._side(self.protected) ** 3 + 2 * self._side(self.reading // 2) ** 3)

    @property
    def _rank(self) -> int:
        return min(self.rank, self.protected + self.reading, self.site.width)

    def _side(self, rows: int) -> int:
        return min(rows, self.site.width)

    def _eigen(self, rows: int) -> int:
        return EIGEN_COPIES * self._side(rows) ** 2 * FLOAT64 + BLOCK_BYTES

    @property
    def _answers(self) -> int:
        """Three blocks of task vectors, a part of the rows, and what they give together."""
        block = min(TASK_ROWS, self.site.outputs)
        rows = max(self.protected, self.reading // 2)
        part = min(rows * self.site.width * FLOAT32, RESPONSE_BYTES // 2)
        answer = block * rows * (FLOAT32 + FLOAT64)
        left = self._side(self.protected) ** 2 * FLOAT32
        return 3 * block * self.site.width * FLOAT32 + part + answer + left
