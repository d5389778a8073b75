"""Calibrate all layers of a model in order, with the hidden states of all samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from rain_mergekit.calibration.estimate import (
    Estimate,
    Workload,
    estimate,
    hidden_budget,
)
from rain_mergekit.calibration.estimate_inputs import model_shape, workload
from rain_mergekit.calibration.job import CalibrationJob
from rain_mergekit.calibration.layer import LayerCalibrator, LayerResult
from rain_mergekit.calibration.layer_file import write_part
from rain_mergekit.calibration.layer_names import (
    layer_shapes,
    matrix_names,
)
from rain_mergekit.calibration.layer_sites import LayerSites
from rain_mergekit.calibration.lm_head import HeadWeight, calibrate_head, find_head
from rain_mergekit.calibration.model_shape import ModelShape
from rain_mergekit.calibration.options import max_rank
from rain_mergekit.calibration.progress import Progress
from rain_mergekit.calibration.protected_positions import MERGED
from rain_mergekit.calibration.regmean_site import UNMERGED
from rain_mergekit.calibration.result_writer import ResultWriter
from rain_mergekit.calibration.site_rule import SiteRule, rule_of
from rain_mergekit.calibration.task_vectors import TrioTensors
from rain_mergekit.calibration.work_folder import WorkDir
from rain_mergekit.capture.input_sites import LinearWeight, SiteMap
from rain_mergekit.capture.layers_ahead import ReaderThread
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.streams import REASONING, Stream, StreamPlan, build_streams
from rain_mergekit.capture.token_chunks import TokenChunks
from rain_mergekit.checks.thinking_likelihood import Likelihood, likelihood, shortest
from rain_mergekit.errors import RainError
from rain_mergekit.system.memory import CALIBRATION, naming_shortage, trim_heap
from rain_mergekit.text.token_positions import ReasoningTokens

LOG = logging.getLogger(__name__)


class CalibrationEngine:
    """The work of one process: its share of the samples, every layer."""

    def __init__(
        self,
        job: CalibrationJob,
        layerwise: LayerwiseModel,
        weights: TrioTensors,
        head: HeadWeight | None,
    ) -> None:
        self._job, self._settings, self._options = job, job.settings, job.options
        self._samples, self._world = job.samples, job.world
        self.layerwise, self._weights, self._head = layerwise, weights, head
        self.indices = range(len(layerwise.layers))
        self._passes: dict[str, int] = {}

    @classmethod
    def of(cls, job: CalibrationJob) -> CalibrationEngine:
        """Read the headers of the three models; RainError names what does not fit together."""
        trio, count = job.walked, len(job.samples.reasoning.samples)
        layerwise = LayerwiseModel.open(
            trio.reasoning, trio.config, job.dtype, str(job.world.device)
        )
        weights = TrioTensors.of(trio, layerwise.model, layerwise.tensors, job.settings.gamma)
        weights.check(layer_shapes(layerwise), matrix_names(layerwise))
        head = None
        if job.settings.lm_head != "off":
            head = find_head(layerwise, trio, weights, job.samples, job.settings)
        if count < job.world.size:
            raise RainError(
                f"{job.world.size} processes for {count} usable reasoning samples: start at most "
                "one process a sample"
            )
        return cls(job, layerwise, weights, head)

    @cached_property
    def _rule(self) -> SiteRule:
        return rule_of(self._job.method, self._settings)

    @cached_property
    def max_rank(self) -> int:
        """The largest number of directions at any site."""
        return max_rank(self.needs[0], self._settings)

    @cached_property
    def plans(self) -> list[StreamPlan]:
        """All samples of all streams."""
        return self._rule.plan(self._samples)

    @cached_property
    def needs(self) -> tuple[ModelShape, Workload]:
        """The shapes and token counts that determine the memory of this run."""
        positions = {plan.name: plan.positions for plan in self.plans}
        vocabulary = 0 if self._head is None else self._head.shape[0]
        return model_shape(self.layerwise.outline, vocabulary), workload(
            self._samples, positions, len(self.plans) - 1, self.layerwise.dtype, self._job.compared
        )

    @property
    def parts(self) -> int:
        """How many parts the calibration file is made of: one a layer, and one for the head."""
        return len(self.indices) + (self._head is not None)

    def layer_passes(self) -> dict[str, int]:
        """Samples x layers by purpose, over all processes."""
        names = [plan.name for plan in self.plans]
        counts = self._world.sum(torch.tensor([self._passes.get(name, 0) for name in names]))
        return dict(zip(names, counts.tolist(), strict=True))

    def walk(self, work: WorkDir) -> tuple[int, Likelihood]:
        """Calibrate all layers that are not done yet, in order; returns the index of the first.

        Also returns how likely the markers are by the hidden states that left the last layer.
        """
        streams = self._streams(work)
        stores = {name: stream.store for name, stream in streams.items()}
        try:
            first = work.restore(stores)
            tokens = sum(sum(store.lengths) for store in stores.values())
            quiet = self._job.quiet
            samples = sum(map(len, stores.values()))
            with (
                self._reading_ahead(first),
                ResultWriter() as writer,
                Progress(len(self.indices), samples, tokens, first=first, quiet=quiet) as progress,
            ):
                for index in self.indices[first:]:
                    progress.layer(index)
                    where = f"in layer {index + 1} of {len(self.indices)}"
                    with naming_shortage(where, CALIBRATION):
                        result = self._layer(index, streams, progress.sample)
                        if self._world.rank == 0:
                            place, name = work.part(index), self._name(index)
                            writer.submit(partial(write_part, place, name, result))
                        LOG.info("finished layer %d of %d", index + 1, len(self.indices))
                        if index + 1 < self.parts:
                            work.save(index, stores, writer.wait)
            if self._head is not None:
                with naming_shortage("at the output head", CALIBRATION):
                    self._solve_head(self._head, streams, work.part(len(self.indices)))
            found = self._likelihood(streams.get(UNMERGED, streams[REASONING]))
        finally:
            for store in stores.values():
                store.close()
        return first, found

    @contextmanager
    def _reading_ahead(self, first: int) -> Iterator[None]:
        if not self._options.read_ahead:
            yield
            return
        indices, reader = self.indices[first:], ReaderThread(self._options.loader)
        with reader as thread, self.layerwise.reading_ahead(indices, thread):
            yield

    def _solve_head(self, head: HeadWeight, streams: Mapping[str, Stream], path: Path) -> None:
        original = [stream for stream in streams.values() if not stream.merged]
        sites = LayerSites("", self._settings, self._world, self._rule)
        result = calibrate_head(self.layerwise, head, self._weights, original, sites, self.max_rank)
        if self._world.rank == 0:
            write_part(path, "", result)
        self._weights.release()
        LOG.info("finished the output head")

    def _likelihood(self, stream: Stream) -> Likelihood:
        states = (stream.store.get(index) for index in range(len(stream)))
        samples = [item for item in stream.samples if isinstance(item, ReasoningTokens)]
        few = shortest(self._samples.reasoning.samples)
        return likelihood(self.layerwise, samples, states, self._world, few)

    def _streams(self, work: WorkDir) -> dict[str, Stream]:
        oblique = self._settings.projection == "oblique"
        budget = self._options.activation_budget
        hidden = hidden_budget(budget, *self.needs, self.max_rank, oblique=oblique)
        plans = [plan.part(self._world) for plan in self.plans]
        keep = self._options.keep_on_device
        folder = work.path / f"process-{self._world.rank}"
        return build_streams(self.layerwise, plans, hidden, folder, keep_on_device=keep)

    def estimate(self) -> Estimate:
        """Memory, disk and operations of the whole run on one process."""
        oblique = self._settings.projection == "oblique"
        budget = self._options.activation_budget
        return estimate(
            *self.needs,
            budget=budget,
            rank=self.max_rank,
            oblique=oblique,
            stores_v=self._settings.stores_v,
            ahead=self._options.read_ahead,
        )

    def _layer(
        self, index: int, streams: Mapping[str, Stream], tick: Callable[[int], object]
    ) -> LayerResult:
        chunks, name = TokenChunks(), self._name(index)
        with self.layerwise.layer(index) as layer, chunks.applied(layer):
            solver = LayerSites(name, self._settings, self._world, self._rule)
            model_type = self._job.trio.config.model_type
            calibrator = LayerCalibrator(index, layer, solver, tick, chunks, model_type)
            sites = SiteMap()
            merged = [stream for stream in streams.values() if stream.merged]
            looked_at = [s for s in streams.values() if not s.merged or any(s.positions)]
            collected = calibrator.features(sites, looked_at)
            self._count(looked_at)
            task_vector = partial(self._task_vector, name)
            solved = solver.solve(sites, collected, task_vector, self.max_rank)
            result = LayerResult(sites, solved)
            if merged:
                calibrator.merge(sites, task_vector, solved)
                self._count(merged)
            if MERGED in streams:
                measured = calibrator.statistics(streams[MERGED])
                result.statistics, result.layout = measured or (None, None)
            else:
                calibrator.advance(merged)
        self._weights.release()
        trim_heap()
        return result

    def _task_vector(
        self, layer: str, weight: LinearWeight, expert: int | None
    ) -> Iterator[Tensor]:
        return self._weights.task_vector(layer, weight, expert, self.layerwise.device)

    def _name(self, index: int) -> str:
        return f"{self.layerwise.prefix}.{index}"

    def _count(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            self._passes[stream.name] = self._passes.get(stream.name, 0) + len(stream)
