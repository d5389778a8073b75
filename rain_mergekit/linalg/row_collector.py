"""Feature rows of one input site, collected sample by sample into one weighted matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rain_mergekit.linalg.feature_rows import STATISTICS_DTYPE, FeatureRows


class RowCollector:
    """Mutable: rows of one group of positions (think, content, instruction, ...) at one site."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add n x d feature rows; they are copied, so that the layer's input can be freed."""
        if rows.shape[0] == 0:
            return
        self._blocks.append(rows.detach().to(torch.float32, copy=True))
        self.count += rows.shape[0]
        self._fold()

    def put(self, rows: Tensor, count: int) -> None:
        """Add rows that stand for `count` positions, as `take` gave them."""
        self._blocks.append(rows)
        self.count += count
        self._fold()

    def take(self, width: int, device: torch.device) -> tuple[Tensor, int]:
        """All rows, float64, and the number of positions; the collector is empty then."""
        rows = [block.to(device, STATISTICS_DTYPE) for block in self._blocks]
        empty = torch.zeros(0, width, dtype=STATISTICS_DTYPE, device=device)
        taken = torch.cat([empty, *rows]), self.count
        self._blocks, self.count = [], 0
        return taken

    def rows(self) -> FeatureRows | None:
        """Rows whose Gram matrix is the sum over all rows added; None when there were none."""
        if not self._blocks:
            return None
        self._blocks = [torch.cat(self._blocks)]  # few large products instead of many small ones
        return FeatureRows(tuple(self._blocks), (1.0,))

    def _fold(self) -> None:
        """Beyond 4 d rows, keep a triangular factor instead: d rows with the same second moment."""
        width = self._blocks[0].shape[1]
        if sum(block.shape[0] for block in self._blocks) <= 4 * width:
            return
        stacked = torch.cat([block.to(STATISTICS_DTYPE) for block in self._blocks])
        self._blocks = [torch.linalg.qr(stacked, mode="r").R]


class ChannelSums(RowCollector):
    """Mutable: of each channel the sum of absolute values over all rows, as one row."""

    def add(self, rows: Tensor) -> None:
        """Add n x d feature rows."""
        sums = rows.detach().abs().sum(0, keepdim=True, dtype=STATISTICS_DTYPE)
        self.put(sums, rows.shape[0])

    def put(self, rows: Tensor, count: int) -> None:
        """Add sums that stand for `count` positions, as `take` gave them."""
        if count:
            self._blocks = [torch.cat([*self._blocks, rows]).sum(0, keepdim=True)]
            self.count += count

    def total(self, width: int) -> Tensor:
        """The sums (d) on the CPU; zero where nothing was added."""
        if not self._blocks:
            return torch.zeros(width, dtype=STATISTICS_DTYPE)
        return self._blocks[0][0].cpu()


@dataclass(frozen=True)
class Group:
    """One group of positions and the weight of its mean second moment in the whole."""

    name: str
    weight: float


def weighted_rows(
    collectors: Mapping[str, RowCollector], groups: Sequence[Group]
) -> FeatureRows | None:
    """Stack groups so that rows^T rows = sum_g weight_g * mean over the group's rows of h h^T."""
    blocks: list[Tensor] = []
    weights: list[float] = []
    for group in groups:
        collector = collectors.get(group.name)
        rows = None if collector is None else collector.rows()
        if rows is not None and collector is not None and group.weight > 0:
            blocks += rows.blocks
            weights += [(group.weight / collector.count) ** 0.5] * len(rows.blocks)
    return FeatureRows(tuple(blocks), tuple(weights)) if blocks else None
