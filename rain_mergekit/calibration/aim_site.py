"""AIM at one input site: how busy each input channel is, on whole texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rain_mergekit.calibration.site_solver import SiteResult, unconstrained
from rain_mergekit.linalg.row_collector import ChannelSums, RowCollector


def measure_channels(
    _name: str,
    width: int,
    collectors: Mapping[str, RowCollector],
    _deltas: Iterable[Tensor],
    _max_rank: int,
) -> SiteResult:
    """The mean absolute value of each channel over all tokens of both sets (not over their means).

    No direction is protected: the result has rank 0.
    """
    total, count = torch.zeros(width, dtype=torch.float64), 0
    for collector in collectors.values():
        assert isinstance(collector, ChannelSums)  # noqa: S101 - the rule makes them
        total += collector.total(width)
        count += collector.count
    return replace(unconstrained(width), positions=count, channels=total / max(1, count))


def channel_scale(results: Iterable[SiteResult]) -> Tensor:
    """s (d_in): the channels' means, pooled over the experts' tokens, relative to the largest.

    All zero, so that nothing is taken back, where no token came.
    """
    results = list(results)
    count = sum(result.positions for result in results)
    total = torch.zeros(results[0].width, dtype=torch.float64)
    for result in results:
        assert result.channels is not None  # noqa: S101 - all are made above
        total += result.channels.cpu() * (result.positions / max(1, count))
    largest = float(total.max())
    return total / largest if largest > 0 else total


def taken_back(scale: Tensor, omega: float = 0.4) -> float:
    """1 - mean (1 - s (1 - omega))^2: how much of a change equal in all channels is taken back."""
    return 1.0 - float((1 - scale.double() * (1 - omega)).square().mean())
