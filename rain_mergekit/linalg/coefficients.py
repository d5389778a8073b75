"""From attention statistics to head coefficients (Eqs. 9-15), then to row and column scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.errors import RainError


@dataclass(frozen=True)
class HeadStatistics:
    """Per-head means over samples, each a float64 vector of n_heads."""

    alignment: Tensor
    leakage: Tensor


class HeadAccumulator:
    """Mutable running mean of per-sample statistics; `result` freezes it."""

    def __init__(self, heads: int) -> None:
        self._alignment = torch.zeros(heads, dtype=torch.float64)
        self._leakage = torch.zeros(heads, dtype=torch.float64)
        self.samples = 0

    def add(self, alignment: Tensor, leakage: Tensor) -> None:
        """Add one sample: its instructions' mean alignment and leakage, both n_heads."""
        self._alignment += alignment.to(self._alignment)
        self._leakage += leakage.to(self._leakage)
        self.samples += 1

    def summed(self, total: Callable[[Tensor], Tensor]) -> HeadAccumulator:
        """A copy with its sums passed through `total`, which may add up several processes."""
        count = torch.tensor([float(self.samples)], dtype=torch.float64)
        sums = total(torch.cat([self._alignment, self._leakage, count]))
        heads = self._alignment.numel()
        self._alignment, self._leakage = sums[:heads], sums[heads:-1]
        self.samples = int(sums[-1])
        return self

    def result(self) -> HeadStatistics:
        """E[a] and E[u] over the samples; raises RainError when there was none."""
        if self.samples == 0:
            raise RainError("no instruction sample gave an attention statistic")
        return HeadStatistics(self._alignment / self.samples, self._leakage / self.samples)


def span_masses(rows: Tensor, instruction: Tensor) -> Tensor:
    """sum_{i in I} A[t, i] for attention rows (heads x t x T) and a 0/1 mask I (T): heads x t."""
    return rows @ instruction.to(rows)


def gain(statistics: HeadStatistics, rho: float) -> Tensor:
    """g = E[a - rho * u] for alignment a and leakage u, Eq. 14; n_heads float64."""
    return statistics.alignment - rho * statistics.leakage


def curvature(statistics: HeadStatistics) -> Tensor:
    """H = 1 + E[u] for leakage u, Eq. 14; n_heads float64."""
    return 1.0 + statistics.leakage


def closed_form(statistics: HeadStatistics, rho: float) -> Tensor:
    """alpha = g / H before clipping, Eq. 15; n_heads float64."""
    return gain(statistics, rho) / curvature(statistics)


def clip(alpha: Tensor, low: float, high: float) -> Tensor:
    """alpha clipped to [alpha_lo, alpha_hi], Eq. 15."""
    return alpha.clamp(low, high)


def normalised(alphas: Sequence[Tensor], low: float, high: float) -> list[Tensor]:
    """Divide all heads of all layers by the mean of their positive parts, then clip.

    Lambda then keeps the meaning that it has in task arithmetic: the closed form alone gives
    attention masses, far below 1. A negative head (it leaks more than it follows) ends at `low`.
    Raises RainError if no head is positive, since a relative scale has no meaning then.
    """
    mean = float(torch.cat(list(alphas)).clamp_min(0.0).mean())
    if not mean > 0.0:
        raise RainError(
            "no head follows the instructions more than it leaks to unrelated text; check the "
            "spans of the instruction data, lower `rho`, or set `coefficients: off`"
        )
    return [clip(alpha / mean, low, high) for alpha in alphas]


def expand_query(alpha: Tensor, head_dim: int) -> Tensor:
    """One value per row of q_proj (or column of o_proj): n_heads * head_dim."""
    return alpha.repeat_interleave(head_dim)


def expand_key_value(alpha: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """One value per row of k_proj/v_proj: the mean over the query heads that share the KV head.

    Query head h uses KV head h // (n_heads // kv_heads); each row block occurs once.
    """
    return alpha.view(kv_heads, -1).mean(1).repeat_interleave(head_dim)
