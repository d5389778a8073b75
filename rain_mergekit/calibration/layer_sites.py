"""The input sites of one layer: feature rows picked for them, then each of them solved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, starmap

import torch
from torch import Tensor

from rain_mergekit.calibration.exchange import collect_rows, share_result
from rain_mergekit.calibration.protected_positions import INSTRUCTION, READ, protected_groups
from rain_mergekit.calibration.site_solver import (
    SiteFeatures,
    SiteResult,
    solve_site,
    unconstrained,
)
from rain_mergekit.capture.input_sites import LinearWeight, RowPicker, SiteMap, dotted
from rain_mergekit.capture.streams import Stream
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.row_collector import Group, RowCollector, weighted_rows
from rain_mergekit.models.head_layout import feeds_attention
from rain_mergekit.system.distributed import World
from rain_mergekit.system.memory import trim_heap

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
        source = stream.samples[sample].source
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
                collected.setdefault(site, {}).setdefault(group, RowCollector()).add(rows)

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
            solved[site] = self._solve_site(site, width, rows, deltas, max_rank) if mine else None
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
        names = [*(group.name for group in protected_groups(self.settings)), *READ, INSTRUCTION]
        everywhere = {name: collectors.get(name, RowCollector()) for name in names}
        for collector in everywhere.values():
            collect_rows(self.world, collector, width, owner)
        return everywhere

    def _solve_site(
        self,
        site: str,
        width: int,
        collectors: Mapping[str, RowCollector],
        deltas: Iterable[Tensor],
        max_rank: int,
    ) -> SiteResult:
        rows = weighted_rows(collectors, protected_groups(self.settings))
        if rows is None:  # experts to which no protected token was routed
            return unconstrained(width)
        instruction = weighted_rows(collectors, [Group(INSTRUCTION, 1.0)])
        read = [weighted_rows(collectors, [Group(name, 1.0)]) for name in READ]
        count = sum(c.count for name, c in collectors.items() if name not in (*READ, INSTRUCTION))
        trim_heap()
        attended = [rows for rows in read if rows is not None]
        features = SiteFeatures(rows, count, instruction, attended)
        return solve_site(dotted(self.name, site), features, deltas, self.settings, max_rank)


def _inside(index: Tensor, rows: int, tokens: Tensor | None) -> Tensor:
    """The rows of the current chunk for the given token indices, counted from its start."""
    if tokens is not None:
        return torch.isin(tokens, index).nonzero().flatten()
    return index[(index >= 0) & (index < rows)]
