"""Calibrate one layer: collect features, solve its input sites, measure its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, starmap

import torch
from torch import Tensor, nn

from rain_mergekit.calibration.exchange import collect_rows, share_result
from rain_mergekit.calibration.protected_positions import INSTRUCTION, READ, protected_groups
from rain_mergekit.calibration.site_solver import SiteResult, solve_site, unconstrained
from rain_mergekit.capture.attention_statistics import AttentionStatistics
from rain_mergekit.capture.input_sites import (
    LinearWeight,
    RowPicker,
    SiteMap,
    capture_inputs,
    dotted,
)
from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.streams import Stream
from rain_mergekit.capture.token_chunks import TokenChunks
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.coefficients import HeadAccumulator, HeadStatistics
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.row_collector import Group, RowCollector, weighted_rows
from rain_mergekit.models.attention import Heads, observe_attention
from rain_mergekit.models.head_layout import HeadLayout, feeds_attention
from rain_mergekit.system.distributed import World
from rain_mergekit.system.memory import trim_heap
from rain_mergekit.text.token_positions import InstructionTokens

TaskVector = Callable[[LinearWeight, "int | None"], Iterator[Tensor]]


@dataclass(frozen=True)
class _TaskVectors:
    """The task vectors of a site's weights, block by block; read anew each time."""

    read: TaskVector
    members: Sequence[tuple[LinearWeight, int | None]]

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(starmap(self.read, self.members))


@dataclass
class LayerResult:
    """All that one layer contributes to the calibration file.

    tokens: for weights whose rows are tokens, 1 for each row that is merged and 0 for the others.
    """

    sites: SiteMap
    solved: dict[str, SiteResult] = field(default_factory=dict)
    statistics: HeadStatistics | None = None
    layout: HeadLayout | None = None
    tokens: Tensor | None = None


class LayerCalibrator:
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
        model_type: str = "",
    ) -> None:
        self.index, self.layer, self.name, self._type = index, layer, name, model_type
        self.settings, self._tick, self._chunks = settings, tick, chunks
        self._world = world
        self._device = world.device

    def features(
        self, sites: SiteMap, streams: Sequence[Stream]
    ) -> dict[str, dict[str, RowCollector]]:
        """Run every sample once; rows at its positions, by site and group. Finds the sites too."""
        collected: dict[str, dict[str, RowCollector]] = {}
        for stream in streams:
            for sample in range(len(stream)):
                picker = self._picker(collected, stream, sample)
                whole = stream.store.lengths[sample]
                with capture_inputs(self.layer, sites, picker, partial(self._length, whole)):
                    self._advance(stream, sample)
        trim_heap()
        return collected

    def _length(self, whole: int) -> int:
        return self._chunks.length or whole

    def _picker(
        self, collected: dict[str, dict[str, RowCollector]], stream: Stream, sample: int
    ) -> RowPicker:
        source = stream.samples[sample].source
        groups = {
            group: torch.tensor(list(positions), dtype=torch.long, device=self._device)
            for group, positions in stream.positions[sample].items()
            if positions
        }

        def pick(site: str, inputs: Tensor, tokens: Tensor | None) -> None:
            for group, index in groups.items():
                if group in READ and not feeds_attention(site):
                    continue
                rows = inputs.index_select(0, self._inside(index, inputs.shape[0], tokens))
                if not finite(rows):
                    raise RainError(
                        f"{dotted(self.name, site)}: the features of sample {source} "
                        "contain NaN or Inf: the reasoning model overflows there; try "
                        "--dtype float32, or remove the sample"
                    )
                collected.setdefault(site, {}).setdefault(group, RowCollector()).add(rows)

        return pick

    def _inside(self, index: Tensor, rows: int, tokens: Tensor | None) -> Tensor:
        """The rows of the chunk at hand that belong to the token indices (of the whole text)."""
        index = index - self._chunks.start
        if tokens is not None:
            return torch.isin(tokens, index).nonzero().flatten()
        return index[(index >= 0) & (index < rows)]

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
            width = sites.widths[site]
            rows = self._collect(width, collected.pop(site, {}), self._world.owner(index))
            deltas = _TaskVectors(task_vector, sites.members(site))
            mine = self._world.owner(index) == self._world.rank
            solved[site] = self._solve_site(site, width, rows, deltas, max_rank) if mine else None
            del rows
            trim_heap()
        results = {
            site: share_result(self._world, result, self._world.owner(index))
            for index, (site, result) in enumerate(solved.items())
        }
        if replace:
            for weight in sites.weights.values():
                self._merge(weight, task_vector, results)
        return results

    def _collect(
        self, width: int, collectors: dict[str, RowCollector], owner: int
    ) -> dict[str, RowCollector]:
        """All processes' rows of a site at its owner; they agree on the order of the groups."""
        names = [*(group.name for group in protected_groups(self.settings)), *READ, INSTRUCTION]
        everywhere = {name: collectors.get(name, RowCollector()) for name in names}
        for collector in everywhere.values():
            collect_rows(self._world, collector, width, owner)
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
        return solve_site(
            dotted(self.name, site),
            rows,
            count,
            instruction,
            deltas,
            self.settings,
            max_rank,
            [rows for rows in read if rows is not None],
        )

    def _merge(
        self, weight: LinearWeight, task_vector: TaskVector, results: Mapping[str, SiteResult]
    ) -> None:
        """Replace one weight of the layer, expert by expert, by the merged one."""
        parameter = self.layer.get_parameter(weight.name)
        merged = parameter.detach().clone()
        matrices = merged if weight.input_axis == -1 else merged.mT
        if matrices.dim() == 2:
            _add(matrices, task_vector(weight, None), results[weight.sites[0]])
        else:
            for expert, matrix in enumerate(matrices):
                _add(matrix, task_vector(weight, expert), results[weight.site_of(expert)])
        parameter.data = merged

    def statistics(self, stream: Stream) -> tuple[HeadStatistics, HeadLayout] | None:
        """Run the instruction samples through the merged layer; mean attention statistics.

        None for a layer without attention that can be observed.
        """
        accumulator: HeadAccumulator | None = None
        layout: HeadLayout | None = None
        for index, sample in enumerate(stream.samples):
            if not isinstance(sample, InstructionTokens):
                continue
            probe = AttentionStatistics(
                sample, leakage_from_thinking=self.settings.leakage_from_thinking
            )
            with observe_attention(probe):
                self._advance(stream, index)
            if probe.alignment is None or probe.leakage is None or probe.call is None:
                continue
            if not finite(probe.alignment + probe.leakage):
                raise RainError(
                    f"{self.name}: the attention of sample {sample.source} contains NaN or "
                    "Inf in the model merged at alpha = 1; try --dtype float32, more protection "
                    "(`rank_share`), or `coefficients: off`"
                )
            layout = layout or self._layout(probe.call)
            accumulator = accumulator or HeadAccumulator(layout.heads)
            accumulator.add(probe.alignment, probe.leakage)
        if accumulator is None or layout is None:
            return None
        return accumulator.summed(self._world.sum).result(), layout

    def _layout(self, call: Heads) -> HeadLayout:
        modules = ((name, module) for name, module in self.layer.named_modules())
        name = next((name for name, module in modules if module is call.module), "")
        return HeadLayout(name, call.heads, call.kv_heads, call.width, call.value_width, self._type)


def _add(rows: Tensor, deltas: Iterator[Tensor], result: SiteResult) -> None:
    """Add the projected task vector to the rows (d_out, d_in), in place."""
    start = 0
    for delta in deltas:
        part = slice(start, start := start + delta.shape[0])
        rows[part] = rows[part].float() + result.factors.project(delta)
