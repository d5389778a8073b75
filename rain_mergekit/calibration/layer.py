"""Calibrate one layer: collect features, solve its input sites, measure its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from rain_mergekit.calibration.layer_sites import Collected, LayerSites, TaskVector
from rain_mergekit.calibration.site_solver import SiteResult
from rain_mergekit.capture.attention_statistics import AttentionStatistics
from rain_mergekit.capture.input_sites import (
    LinearWeight,
    SiteMap,
    capture_inputs,
)
from rain_mergekit.capture.layer_calls import run_layer
from rain_mergekit.capture.streams import Stream
from rain_mergekit.capture.token_chunks import TokenChunks
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.coefficients import HeadAccumulator, HeadStatistics
from rain_mergekit.linalg.finite import finite
from rain_mergekit.models.attention import Heads, observe_attention
from rain_mergekit.models.head_layout import HeadLayout
from rain_mergekit.system.memory import trim_heap
from rain_mergekit.text.token_positions import InstructionTokens


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
        sites: LayerSites,
        tick: Callable[[int], object],
        chunks: TokenChunks,
        model_type: str = "",
    ) -> None:
        self.index, self.layer, self._type = index, layer, model_type
        self._sites, self._tick, self._chunks = sites, tick, chunks

    def features(self, sites: SiteMap, streams: Sequence[Stream]) -> Collected:
        """Run every sample once; rows at its positions, by site and group. Finds the sites too.

        The hidden states of streams that pass the merged layers stay where they are.
        """
        collected: Collected = {}
        for stream in streams:
            run = self._run if stream.merged else self._advance
            for sample in range(len(stream)):
                picker = self._sites.picker(collected, stream, sample, lambda: self._chunks.start)
                whole = stream.store.lengths[sample]
                length, leave = partial(self._length, whole), self._sites.rule.leave
                with capture_inputs(self.layer, sites, picker, length, leave):
                    run(stream, sample)
        trim_heap()
        return collected

    def advance(self, streams: Sequence[Stream]) -> None:
        """Run every sample once, and nothing else."""
        for stream in streams:
            for sample in range(len(stream)):
                self._advance(stream, sample)

    def _length(self, whole: int) -> int:
        return self._chunks.length or whole

    def _advance(self, stream: Stream, sample: int) -> None:
        hidden = self._run(stream, sample)
        stream.store.put(sample, hidden)
        self._tick(hidden.shape[0])

    def _run(self, stream: Stream, sample: int) -> Tensor:
        hidden = stream.store.get(sample).to(self._sites.world.device)
        return run_layer(self.layer, hidden, stream.calls[sample][self.index])

    def merge(
        self, sites: SiteMap, task_vector: TaskVector, results: Mapping[str, SiteResult]
    ) -> None:
        """The layer's weights become the merged ones (alpha = lambda = 1)."""
        for weight in sites.weights.values():
            self._merge(weight, task_vector, results)

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
                sample, leakage_from_thinking=self._sites.settings.leakage_from_thinking
            )
            with observe_attention(probe):
                self._advance(stream, index)
            if probe.alignment is None or probe.leakage is None or probe.call is None:
                continue
            if not finite(probe.alignment + probe.leakage):
                raise RainError(
                    f"{self._sites.name}: the attention of sample {sample.source} contains NaN or "
                    "Inf in the model merged at alpha = 1; try --dtype float32, more protection "
                    "(`rank_share`), or `coefficients: off`"
                )
            layout = layout or self._layout(probe.call)
            accumulator = accumulator or HeadAccumulator(layout.heads)
            accumulator.add(probe.alignment, probe.leakage)
        if accumulator is None or layout is None:
            return None
        return accumulator.summed(self._sites.world.sum).result(), layout

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
