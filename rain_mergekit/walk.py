"""One layer of the calibration walk: capture features, solve the sites, measure attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rain_mergekit.attention import observe_attention
from rain_mergekit.capture import LayerCall, SiteMap, capture_inputs, run_layer
from rain_mergekit.chunks import TokenChunks
from rain_mergekit.coefficients import HeadAccumulator, HeadStatistics
from rain_mergekit.data import InstructionTokens, ReasoningTokens
from rain_mergekit.distributed import World
from rain_mergekit.errors import RainError
from rain_mergekit.features import Group, RowCollector, weighted_rows
from rain_mergekit.heap import give_back
from rain_mergekit.probe import SpanProbe
from rain_mergekit.projection import project
from rain_mergekit.settings import RainSettings
from rain_mergekit.solve import SiteResult, solve_site
from rain_mergekit.store import ActivationStore

PositionGroups = Mapping[str, Sequence[int]]
TaskVector = Callable[[str], Iterator[Tensor]]
TokenSamples: TypeAlias = "Sequence[ReasoningTokens | InstructionTokens]"
INSTRUCTION = "instruction"


@dataclass(frozen=True)
class Stream:
    """One set of samples on its way through the layers: hidden states, calls, positions of use."""

    name: str
    store: ActivationStore
    calls: list[Sequence[LayerCall]]
    positions: Sequence[PositionGroups]
    samples: TokenSamples

    def __len__(self) -> int:
        return len(self.store)


@dataclass
class LayerResult:
    """All that one layer contributes to the calibration file."""

    sites: SiteMap
    solved: dict[str, SiteResult] = field(default_factory=dict)
    statistics: HeadStatistics | None = None


class LayerWalk:
    """The passes over one filled layer; each sample passes it once per purpose."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        name: str,
        settings: RainSettings,
        tick: Callable[[int], object],
        chunks: TokenChunks,
        world: World,
    ) -> None:
        self.index, self.layer, self.name = index, layer, name
        self.settings, self._tick, self._chunks = settings, tick, chunks
        self._world = world
        self._device = next(layer.parameters()).device

    def features(
        self, sites: SiteMap, streams: Sequence[Stream]
    ) -> dict[str, dict[str, RowCollector]]:
        """Run every sample once; rows at its positions, by site and group. Finds the sites too."""
        collected: dict[str, dict[str, RowCollector]] = {}
        for stream in streams:
            for sample in range(len(stream)):
                picker = self._picker(collected, stream, sample)
                with capture_inputs(self.layer, sites, picker):
                    self._advance(stream, sample)
        give_back()
        unseen = sorted(set(sites.modules) - set(sites.site_of))
        if unseen:
            raise RainError(f"{self.name}: the layer did not use {', '.join(unseen)}")
        return collected

    def _picker(
        self, collected: dict[str, dict[str, RowCollector]], stream: Stream, sample: int
    ) -> Callable[[str, Tensor], None]:
        source = stream.samples[sample].source
        groups = {
            group: torch.tensor(list(positions), dtype=torch.long, device=self._device)
            for group, positions in stream.positions[sample].items()
            if positions
        }

        def pick(site: str, inputs: Tensor) -> None:
            for group, index in groups.items():
                rows = inputs.index_select(0, self._inside(index, inputs.shape[0]))
                if not bool(torch.isfinite(rows).all()):
                    raise RainError(
                        f"{self.name}.{site}: the features of sample {source} "
                        "contain NaN or Inf: the reasoning model overflows there; try "
                        "--dtype float32, or remove the sample"
                    )
                collected.setdefault(site, {}).setdefault(group, RowCollector()).add(rows)

        return pick

    def _inside(self, index: Tensor, length: int) -> Tensor:
        """Those of the token indices that are in the chunk at hand, counted from its start."""
        index = index - self._chunks.start
        return index[(index >= 0) & (index < length)]

    def _advance(self, stream: Stream, sample: int) -> None:
        hidden = stream.store.get(sample).to(self._device)
        stream.store.put(sample, run_layer(self.layer, hidden, stream.calls[sample][self.index]))
        self._tick(hidden.shape[0])

    def solve(
        self,
        sites: SiteMap,
        collected: dict[str, dict[str, RowCollector]],
        task_vector: TaskVector,
        max_rank: int,
        replace: bool,
    ) -> dict[str, SiteResult]:
        """Solve each site; its rows in `collected` are freed then.

        With `replace` the layer's weights become the merged ones (alpha = lambda = 1).
        """
        solved: dict[str, SiteResult | None] = {}
        for index, site in enumerate(sites.owners):
            rows = self._collect(site, collected.pop(site), self._world.owner(index))
            deltas = chain.from_iterable(task_vector(module) for module in sites.members(site))
            mine = self._world.owner(index) == self._world.rank
            solved[site] = self._solve_site(site, rows, deltas, max_rank) if mine else None
            del rows
            give_back()
        results = {
            site: self._world.share(result, self._world.owner(index))
            for index, (site, result) in enumerate(solved.items())
        }
        if replace:
            for module, site in sites.site_of.items():
                self._merge(module, task_vector(module), results[site])
        return results

    def _collect(
        self, site: str, collectors: dict[str, RowCollector], owner: int
    ) -> dict[str, RowCollector]:
        """All processes' rows of a site at its owner; they agree on the order of the groups."""
        width = self.layer.get_parameter(f"{site}.weight").shape[1]
        names = [*(group.name for group in protected_groups(self.settings)), INSTRUCTION]
        everywhere = {name: collectors.get(name, RowCollector()) for name in names}
        for collector in everywhere.values():
            self._world.collect(collector, width, owner)
        return everywhere

    def _solve_site(
        self,
        site: str,
        collectors: Mapping[str, RowCollector],
        deltas: Iterator[Tensor],
        max_rank: int,
    ) -> SiteResult:
        rows = weighted_rows(collectors, protected_groups(self.settings))
        if rows is None:
            raise RainError(f"{self.name}.{site}: no think position reached this module")
        instruction = weighted_rows(collectors, [Group(INSTRUCTION, 1.0)])
        count = sum(c.count for name, c in collectors.items() if name != INSTRUCTION)
        return solve_site(
            f"{self.name}.{site}",
            rows,
            count,
            instruction,
            deltas,
            self.settings,
            max_rank,
        )

    def _merge(self, module: str, deltas: Iterator[Tensor], result: SiteResult) -> None:
        weight = self.layer.get_parameter(f"{module}.weight")
        merged, start = torch.empty_like(weight), 0
        for delta in deltas:
            rows = slice(start, start := start + delta.shape[0])
            merged[rows] = weight[rows].float() + project(delta, result.factors)
        weight.data = merged

    def statistics(self, stream: Stream, heads: int) -> HeadStatistics:
        """Run the instruction samples through the merged layer; mean attention statistics."""
        accumulator = HeadAccumulator(heads)
        for index, sample in enumerate(stream.samples):
            if not isinstance(sample, InstructionTokens):
                continue
            probe = SpanProbe(sample, leakage_from_thinking=self.settings.leakage_from_thinking)
            with observe_attention(probe):
                self._advance(stream, index)
            if probe.alignment is None or probe.leakage is None:
                raise RainError(
                    f"{self.name}: the layer computed no attention that can be observed; "
                    "set `coefficients: off`"
                )
            if not bool(torch.isfinite(probe.alignment + probe.leakage).all()):
                raise RainError(
                    f"{self.name}: the attention of sample {sample.source} contains NaN or "
                    "Inf in the model merged at alpha = 1; try --dtype float32, more protection "
                    "(`rank_share`), or `coefficients: off`"
                )
            accumulator.add(probe.alignment, probe.leakage)
        return accumulator.summed(self._world.sum).result()


def protected_groups(settings: RainSettings) -> list[Group]:
    """Groups of positions that are protected, with the weight of their mean second moment."""
    groups = [Group("think", 1.0)]
    if settings.protect_thinking > 0:
        groups.append(Group("content", settings.protect_thinking))
    if settings.protect_prompt > 0:
        groups.append(Group("prompt", settings.protect_prompt))
    if settings.protect_response > 0:
        groups.append(Group("response", settings.protect_response))
    return groups
