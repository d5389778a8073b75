"""Ridge regression of a very wide site: within the directions that some of its tokens span."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rain_mergekit.linalg.ridge_fit import SUM_DTYPE, RidgeSums, exact
from rain_mergekit.linalg.ridge_solver import LowRankChange

_ROUNDS = 8


class LandmarkSums:
    """Mutable: as RidgeSums, where sums of d x d would be too large.

    Q (d, m) is an orthonormal basis of the span of m tokens, the landmarks. The change is
    D = D_q Qᵀ, with D_q the ridge regression on Qᵀ x over all tokens, so the sums are m x m. Rows
    of a ridge solution lie in the span of its tokens, so with every token as a landmark this is the
    solution itself; with fewer, the best one that these tokens span (the Nyström approximation of
    Williams and Seeger, 2001, as "subset of regressors").
    """

    def __init__(self, basis: Tensor, outputs: Mapping[str, int], *, choose: bool = False) -> None:
        """Nothing is added yet; basis: Q; the rest as for RidgeSums."""
        width, count = basis.shape
        self._basis = basis
        self._sums = RidgeSums(count, outputs, basis.device, choose=choose, features=width)

    def add(
        self,
        inputs: Tensor,
        errors: Mapping[str, Tensor],
        weights: Tensor,
        *,
        aside: bool = False,
    ) -> None:
        """Add tokens: inputs (n, d), errors by weight (n, d_out), weights (n) above zero."""
        self._sums.add(inputs.to(self._basis) @ self._basis, errors, weights, aside=aside)

    def sum_over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make them the sums over all processes; `total` adds one tensor up over these."""
        self._sums.sum_over(total)

    def changes(
        self,
        epsilon: float | None,
        max_rank: int,
        share: float,
        *,
        energy: float | None = None,
        cautious: bool = False,
    ) -> dict[str, LowRankChange]:
        """As RidgeSums.changes."""
        found = self._sums.changes(epsilon, max_rank, share, energy=energy, cautious=cautious)
        return {name: self._widened(change) for name, change in found.items()}

    def _widened(self, change: LowRankChange) -> LowRankChange:
        within = change.b.to(self._basis)
        return replace(change, b=(self._basis @ within).to(SUM_DTYPE))


def spanned(tokens: Tensor) -> Tensor:
    """An orthonormal basis Q (d, r) of the span of tokens (m, d), m at most d; float32 at least.

    r is m, or less where tokens are spanned by those before them: of these rounding alone would
    make directions.
    """
    columns = exact(tokens).mT
    found = torch.linalg.qr(columns)
    least = torch.finfo(columns.dtype).eps ** 0.75 * torch.linalg.vector_norm(columns, dim=0)
    new = found.R.diagonal().abs() > least
    basis: Tensor = found.Q if bool(new.all()) else torch.linalg.qr(columns[:, new]).Q
    return basis


def evenly_by_weight(weights: Tensor, count: int) -> Tensor:
    """Indices of at most `count` tokens of weights (n) above zero, in equal steps of weight.

    All n where there are no more. No token counts for more than its share of the count.
    """
    if len(weights) <= count:
        return torch.arange(len(weights))
    steps = weights.double()
    for _ in range(_ROUNDS):
        steps = steps.clamp(max=float(steps.sum()) / count)
    reached = (steps.cumsum(0) * (count / float(steps.sum())) * (1 - 1e-12)).floor()
    before = torch.cat([reached.new_full((1,), -1.0), reached[:-1]])
    return (reached > before).nonzero().flatten()[:count]
