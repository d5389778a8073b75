"""One layer of the calibration walk: capture features, solve the sites, measure attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rain_mergekit.attention import observe_attention
from rain_mergekit.capture import LayerCall, SiteMap, capture_inputs, find_sites, run_layer
from rain_mergekit.coefficients import HeadAccumulator, HeadStatistics
from rain_mergekit.data import InstructionTokens
from rain_mergekit.errors import RainError
from rain_mergekit.features import Group, RowCollector, weighted_rows
from rain_mergekit.probe import SpanProbe
from rain_mergekit.projection import project
from rain_mergekit.settings import RainSettings
from rain_mergekit.solve import SiteResult, solve_site
from rain_mergekit.store import ActivationStore

PositionGroups = Mapping[str, Sequence[int]]
TaskVector = Callable[[str], Tensor]
INSTRUCTION = "instruction"


@dataclass(frozen=True)
class Stream:
    """One set of samples on its way through the layers: hidden states, calls, positions of use."""

    name: str
    store: ActivationStore
    calls: Sequence[Sequence[LayerCall]]
    positions: Sequence[PositionGroups]
    sources: Sequence[str]

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
    ) -> None:
        self.index, self.layer, self.name = index, layer, name
        self.settings, self._tick = settings, tick
        self._device = next(layer.parameters()).device

    def find_sites(self, modules: Sequence[str], stream: Stream) -> SiteMap:
        """Group the modules by their input; runs the shortest sample once, its output unused."""
        shortest = min(range(len(stream)), key=lambda i: stream.store.get(i).shape[0])
        hidden = stream.store.get(shortest).to(self._device)
        return find_sites(self.layer, modules, hidden, stream.calls[shortest][self.index])

    def features(
        self, sites: SiteMap, streams: Sequence[Stream]
    ) -> dict[str, dict[str, RowCollector]]:
        """Run every sample once; rows at its positions, by site and group."""
        collected: dict[str, dict[str, RowCollector]] = {site: {} for site in sites.owners}
        for stream in streams:
            for sample in range(len(stream)):
                picker = self._picker(collected, stream, sample)
                with capture_inputs(self.layer, sites, picker):
                    self._advance(stream, sample)
        return collected

    def _picker(
        self, collected: dict[str, dict[str, RowCollector]], stream: Stream, sample: int
    ) -> Callable[[str, Tensor], None]:
        groups = {
            group: torch.tensor(list(positions), dtype=torch.long, device=self._device)
            for group, positions in stream.positions[sample].items()
            if positions
        }

        def pick(site: str, inputs: Tensor) -> None:
            for group, index in groups.items():
                rows = inputs.index_select(0, index)
                if not bool(torch.isfinite(rows).all()):
                    raise RainError(
                        f"{self.name}.{site}: the features of sample {stream.sources[sample]} "
                        "contain NaN or Inf: the reasoning model overflows there; try "
                        "--dtype float32, or remove the sample"
                    )
                collected[site].setdefault(group, RowCollector()).add(rows)

        return pick

    def _advance(self, stream: Stream, sample: int) -> None:
        hidden = stream.store.get(sample).to(self._device)
        stream.store.put(sample, run_layer(self.layer, hidden, stream.calls[sample][self.index]))
        self._tick(hidden.shape[0])

    def solve(
        self,
        sites: SiteMap,
        collected: Mapping[str, Mapping[str, RowCollector]],
        task_vector: TaskVector,
        max_rank: int,
        replace: bool,
    ) -> tuple[dict[str, SiteResult], dict[str, Tensor]]:
        """Solve each site; with `replace` also the merged weights (alpha = lambda = 1)."""
        solved: dict[str, SiteResult] = {}
        merged: dict[str, Tensor] = {}
        for site in sites.owners:
            deltas = {module: task_vector(module) for module in sites.members(site)}
            solved[site] = self._solve_site(site, collected[site], deltas, max_rank)
            if replace:
                for module, delta in deltas.items():
                    merged[f"{module}.weight"] = self._merged(module, delta, solved[site])
        return solved, merged

    def _solve_site(
        self,
        site: str,
        collectors: Mapping[str, RowCollector],
        deltas: Mapping[str, Tensor],
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
            list(deltas.values()),
            self.settings,
            max_rank,
        )

    def _merged(self, module: str, delta: Tensor, result: SiteResult) -> Tensor:
        weight = self.layer.get_parameter(f"{module}.weight")
        return (weight.float() + project(delta, result.factors)).to(weight.dtype)

    def statistics(
        self, stream: Stream, samples: Sequence[InstructionTokens], heads: int
    ) -> HeadStatistics:
        """Run the instruction samples through the merged layer; mean attention statistics."""
        accumulator = HeadAccumulator(heads)
        for index, sample in enumerate(samples):
            probe = SpanProbe(sample, leakage_from_thinking=self.settings.leakage_from_thinking)
            with observe_attention(probe):
                self._advance(stream, index)
            if probe.alignment is None or probe.leakage is None:
                raise RainError(
                    f"{self.name}: the layer computed no attention that can be observed; "
                    "set `coefficients: off`"
                )
            accumulator.add(probe.alignment, probe.leakage)
        return accumulator.result()


def protected_groups(settings: RainSettings) -> list[Group]:
    """Groups of positions that are protected, with the weight of their mean second moment."""
    groups = [Group("think", 1.0)]
    if settings.protect_thinking > 0:
        groups.append(Group("content", settings.protect_thinking))
    if settings.protect_response > 0:
        groups.append(Group("response", settings.protect_response))
    return groups
