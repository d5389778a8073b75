"""What fitting one site takes: the arrays that each step of the fit holds, and its work.

Bytes and operations; the same decisions as in `fit_rule.empty_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rain_mergekit.calibration.estimate_site import FLOAT32, FLOAT64
from rain_mergekit.calibration.fit_rule import needs_rows, rows_within
from rain_mergekit.calibration.operations import Operations
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
    def dual(self) -> bool:
        """Whether single tokens are kept, as the sums of d x d are beyond the budget."""
        return needs_rows(self.site.width, self.budget)

    @property
    def step(self) -> int:
        """Every how many tokens one is used."""
        return rows_within(self.site.width, self.site.rows, self.tokens, self.budget)

    @property
    def memory(self) -> int:
        """The largest of the steps, besides the layer, the states and the targets."""
        return self._rows_memory if self.dual else self._sums_memory

    @property
    def _sums_memory(self) -> int:
        width, rows, most = self.site.width, self.site.rows, max(self.outputs)
        sums = (1 + self.chooses) * FLOAT64 * width * (width + rows)
        waiting = min(2 * BUFFERED_ROWS, self.tokens) * (width + rows) * self._row
        adding = 2 * waiting + width * max(width, most) * self._row
        square = FLOAT64 * width**2
        held = 2 * square  # eigenvectors and the sums held aside in their terms; or the factor
        factoring = 2 * square if self.chooses else 0  # what is on the way to them
        solving = max(self._solving(size) for size in self.outputs)
        applying = FLOAT64 * 3 * width * most
        return sums + max(adding, held + factoring, held + solving, applying) + self._results

    def _solving(self, size: int) -> int:
        """C in two forms and what is made of them for one weight."""
        width, small = self.site.width, min(self.site.width, size)
        squares = max(_EIGEN_COPIES * small**2, 2 * width**2 if self.chooses else 0)
        return FLOAT64 * (2 * width * size + squares)

    @property
    def _rows_memory(self) -> int:
        width, count, most = self.site.width, -(-self.tokens // self.step), max(self.outputs)
        kept = count * (width + self.site.rows) * self._row
        inputs, square = count * width * self._row, FLOAT64 * count**2
        solving = 2 * square + FLOAT64 * (4 * count * most + _EIGEN_COPIES * most**2)
        applying = FLOAT64 * 3 * width * most
        working = inputs + max(_EIGEN_COPIES * square, solving)
        return kept + max(working, applying) + self._results

    @property
    def _results(self) -> int:
        return FLOAT64 * sum(self._rank(size) * (size + self.site.width) for size in self.outputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """d_out of each map."""
        return self.site.outputs

    def _rank(self, size: int) -> int:
        return min(self.rank, size, self.site.width)

    @property
    def work(self) -> Operations:
        """Sums over the tokens, the solution, and the change of the weights."""
        width, rows = self.site.width, self.site.rows
        used = self.tokens / self.step
        copied = _COPIES * self._row * self.tokens * (width + rows)
        applied = Operations(
            double=sum(2.0 * size * width * self._rank(size) for size in self.outputs),
            memory=6.0 * FLOAT64 * width * rows + copied,
        )
        if self.dual:
            return applied + self._rows_work(used)
        flushes = max(1.0, used / BUFFERED_ROWS)
        return applied + Operations(
            products=2.0 * used * width * (width + rows),
            memory=24.0 * flushes * width * (width + rows),
            double=self._factor_work + sum(self._solve(size) for size in self.outputs),
            eigen=self.chooses * float(width) ** 3
            + sum(float(min(width, size)) ** 3 for size in self.outputs),
        )

    @property
    def _factor_work(self) -> float:
        """The sums held aside in terms of eigenvectors, or the Cholesky factor."""
        return (4.0 if self.chooses else 1 / 3) * self.site.width**3

    def _solve(self, size: int) -> float:
        """C in other terms, the product that is decomposed, and both factors of the change."""
        width, rank = self.site.width, self._rank(size)
        turned = 8.0 if self.chooses else 1.0
        products = 2.0 * width * size * (min(width, size) + rank)
        return turned * width**2 * size + 2.0 * width**2 * rank + products

    def _rows_work(self, used: float) -> Operations:
        width, aside = self.site.width, 0.125 * self.chooses
        turned = 6.0 + 18.0 * aside if self.chooses else 4.0
        answers = sum(turned * used**2 * size + 2.0 * used * size**2 for size in self.outputs)
        thin = sum(2.0 * used * width * self._rank(size) for size in self.outputs)
        return Operations(
            products=2.0 * used**2 * width * (1 + aside) + thin,
            double=answers + (0.0 if self.chooses else used**3 / 3),
            eigen=self.chooses * used**3 + sum(float(size) ** 3 for size in self.outputs),
        )
