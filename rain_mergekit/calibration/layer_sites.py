"""The input sites of one layer: feature rows picked for them, then each of them solved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, starmap

import torch
from torch import Tensor

from rain_mergekit.calibration.exchange import collect_rows, share_result
from rain_mergekit.calibration.protected_positions import READ
from rain_mergekit.calibration.site_rule import SiteRule
from rain_mergekit.calibration.site_solver import SiteResult
from rain_mergekit.capture.input_sites import LinearWeight, RowPicker, SiteMap, dotted
from rain_mergekit.capture.streams import Stream
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.row_collector import RowCollector
from rain_mergekit.models.head_layout import feeds_attention
from rain_mergekit.system.distributed import World
from rain_mergekit.system.memory import trim_heap
from rain_mergekit.system.profile import SOLVE, phase

TaskVector = Callable[[LinearWeight, "int | None"], Iterator[Tensor]]
Collected = dict[str, dict[str, RowCollector]]


@dataclass(frozen=True)
class _TaskVectors:
    """The task vectors of a site's weights, block by block; read anew each time."""

    read: TaskVector
    members: Sequence[tuple[LinearWeight, int | None]]

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(starmap(self.read, self.members))


@dataclass(frozen=True)
class LayerSites:
    """The input sites of the layer `name`, in one process of `world`."""

    name: str
    settings: RainSettings
    world: World
    rule: SiteRule

    def picker(
        self,
        collected: Collected,
        stream: Stream,
        sample: int,
        start: Callable[[], int] = lambda: 0,
    ) -> RowPicker:
        """A function that adds a sample's rows of each site to `collected`, by group of positions.

        start: the index in the whole text of the first token that passes at that moment.
        """
        source, collector = stream.samples[sample].source, self.rule.collector
        groups = {
            group: torch.tensor(list(positions), dtype=torch.long, device=self.world.device)
            for group, positions in stream.positions[sample].items()
            if positions
        }

        def pick(site: str, inputs: Tensor, tokens: Tensor | None) -> None:
            for group, index in groups.items():
                if group in READ and not feeds_attention(site):
                    continue
                rows = inputs.index_select(0, _inside(index - start(), inputs.shape[0], tokens))
                if not finite(rows):
                    raise RainError(
                        f"{dotted(self.name, site)}: the features of sample {source} "
                        "contain NaN or Inf: the reasoning model overflows there; try "
                        "--dtype float32, or remove the sample"
                    )
                collected.setdefault(site, {}).setdefault(group, collector()).add(rows)

        return pick

    def solve(
        self,
        sites: SiteMap,
        collected: Collected,
        task_vector: TaskVector,
        max_rank: int,
    ) -> dict[str, SiteResult]:
        """Solve each site, on the process that owns it; its rows in `collected` are freed then."""
        solved: dict[str, SiteResult | None] = {}
        for index, site in enumerate(sites.owners):
            width = sites.widths[site]
            rows = self._collect(width, collected.pop(site, {}), self.world.owner(index))
            deltas = _TaskVectors(task_vector, sites.members(site))
            mine = self.world.owner(index) == self.world.rank
            whole = dotted(self.name, site)
            solve = self.rule.solve
            with phase(SOLVE):
                solved[site] = solve(whole, width, rows, deltas, max_rank) if mine else None
            del rows
            trim_heap()
        return {
            site: share_result(self.world, result, self.world.owner(index))
            for index, (site, result) in enumerate(solved.items())
        }

    def _collect(
        self, width: int, collectors: dict[str, RowCollector], owner: int
    ) -> dict[str, RowCollector]:
        """All processes' rows of a site at its owner; they agree on the order of the groups."""
        empty = self.rule.collector
        everywhere = {name: collectors.get(name, empty()) for name in self.rule.groups}
        for collector in everywhere.values():
            collect_rows(self.world, collector, width, owner)
        return everywhere


def _inside(index: Tensor, rows: int, tokens: Tensor | None) -> Tensor:
    """The rows of the current chunk for the given token indices, counted from its start."""
    if tokens is not None:
        return torch.isin(tokens, index).nonzero().flatten()
    return index[(index >= 0) & (index < rows)]
