"""What fitting one site takes: the arrays that each step of the fit holds, and its work.

Bytes and operations; the same decision as in `fit_rule.directions_within`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rain_mergekit.calibration.estimate_site import FLOAT32, FLOAT64
from rain_mergekit.calibration.fit_rule import LANDMARKS, directions_within
from rain_mergekit.calibration.operations import Operations
from rain_mergekit.calibration.stream_head import BLOCK_ROWS
from rain_mergekit.calibration.stream_shape import FittedSite
from rain_mergekit.linalg.ridge_fit import BUFFERED_ROWS

# Of a symmetric matrix: itself, made symmetric, its eigenvectors, LAPACK's work space of two.
_EIGEN_COPIES = 5
# How often each feature of a token is copied on its way into the sums, and each target.
_COPIES = 14


@dataclass(frozen=True)
class FitNeeds:
    """One site, fitted on `tokens` tokens with changes of at most `rank`, sums within `budget`.

    itemsize: of the forward pass. chooses: whether ε is chosen by tokens held aside, which takes
    sums of their own and the eigenvectors of G.
    """

    site: FittedSite
    tokens: int
    rank: int
    budget: int
    itemsize: int
    chooses: bool = True

    @property
    def _row(self) -> int:
        """Bytes a number of a token that waits: float32 at least."""
        return max(FLOAT32, self.itemsize)

    @property
    def affordable(self) -> int:
        """How many directions of the input the budget allows."""
        return directions_within(self.site.width, self.budget)

    @property
    def directions(self) -> int:
        """Within how many it is fitted; an expert's are no more than its tokens."""
        return min(self.affordable, max(1, self.tokens)) if self.site.experts else self.affordable

    @property
    def whole(self) -> bool:
        """Whether these are all."""
        return self.directions == self.site.width

    @property
    def memory(self) -> int:
        """The largest of the steps, besides the layer, the states and the targets."""
        width, rows, most = self.directions, self.site.rows, max(self.outputs)
        sums = (1 + self.chooses) * FLOAT64 * width * (width + rows)
        waiting = min(2 * BUFFERED_ROWS, self.tokens) * (width + rows) * self._row
        adding = 2 * waiting + width * max(width, most) * self._row
        square = FLOAT64 * width**2
        held = 2 * square  # eigenvectors and the sums held aside in their terms; or the factor
        factoring = 2 * square if self.chooses else 0  # what is on the way to them
        solving = max(self._solving(size) for size in self.outputs)
        applying = FLOAT64 * 3 * self.site.width * most
        steps = max(adding, held + factoring, held + solving, applying)
        fitting = self._basis + sums + steps + self._results
        return max(fitting, LANDMARKS * self._basis // self._row)

    @property
    def _basis(self) -> int:
        """Bytes of the basis of the directions."""
        return 0 if self.whole else self._row * self.directions * self.site.width

    def _solving(self, size: int) -> int:
        """C in two forms and what is made of them for one weight."""
        width, small = self.directions, min(self.directions, size)
        squares = max(_EIGEN_COPIES * small**2, 2 * width**2 if self.chooses else 0)
        return FLOAT64 * (2 * width * size + squares)

    @property
    def _results(self) -> int:
        return FLOAT64 * sum(self._rank(size) * (size + self.site.width) for size in self.outputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """d_out of each map."""
        return self.site.outputs

    def _rank(self, size: int) -> int:
        return min(self.rank, size, self.directions)

    @property
    def work(self) -> Operations:
        """Sums over the tokens, the solution, and the change of the weights."""
        width, rows, whole = self.directions, self.site.rows, self.site.width
        copied = _COPIES * self._row * self.tokens * (whole + rows)
        flushes = max(1.0, self.tokens / BUFFERED_ROWS)
        ranks = sum(self._rank(size) for size in self.outputs)
        widened = 0.0 if self.whole else 2.0 * whole * width * (self.tokens + 2 * width + ranks)
        return Operations(
            products=2.0 * self.tokens * width * (width + rows) + widened,
            memory=24.0 * flushes * width * (width + rows) + 6.0 * FLOAT64 * whole * rows + copied,
            double=self._factor_work
            + sum(self._solve(size) for size in self.outputs)
            + sum(2.0 * size * whole * self._rank(size) for size in self.outputs),
            eigen=self.chooses * float(width) ** 3
            + sum(float(min(width, size)) ** 3 for size in self.outputs),
        )

    @property
    def _factor_work(self) -> float:
        """The sums held aside in terms of eigenvectors, or the Cholesky factor."""
        return (4.0 if self.chooses else 1 / 3) * self.directions**3

    def _solve(self, size: int) -> float:
        """C in other terms, the product that is decomposed, and both factors of the change."""
        width, rank = self.directions, self._rank(size)
        turned = 8.0 if self.chooses else 1.0
        products = 2.0 * width * size * (min(width, size) + rank)
        return turned * width**2 * size + 2.0 * width**2 * rank + products


@dataclass(frozen=True)
class HeadNeeds:
    """The output head, fitted in the coordinates of two heads' columns.

    fit: of an input of width d and 2 d coordinates. vocabulary: rows of the head; stored: bytes a
    number of a head in its file.
    """

    fit: FitNeeds
    vocabulary: int
    stored: int

    @property
    def _span(self) -> int:
        return self.fit.site.rows

    @property
    def memory(self) -> int:
        """Both heads as stored, what makes the coordinates, and the largest of the steps."""
        heads = 2 * self.vocabulary * self.fit.site.width * self.stored
        span = FLOAT64 * 2 * self._span**2
        rows = FLOAT64 * 3 * min(self.vocabulary, BLOCK_ROWS) * self._span
        factor = FLOAT32 * self.vocabulary * min(self.fit.rank, self.fit.site.width)
        return heads + span + max(self.fit.memory, _EIGEN_COPIES * span // 2, rows + factor)

    @property
    def work(self) -> Operations:
        """Products of all rows, their eigenvectors, and the fit."""
        rank = min(self.fit.rank, self.fit.site.width)
        products = 2.0 * self.vocabulary * self._span * (self._span + rank)
        turned = 2.0 * self.fit.tokens * self._span**2
        made = Operations(double=products + turned, eigen=float(self._span) ** 3)
        return made + self.fit.work
