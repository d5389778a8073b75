"""Stream matching of a whole model: streams of hidden states pass both models layer by layer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch

from rain_mergekit.calibration.answer_emphasis import AnswerReader, comparable
from rain_mergekit.calibration.estimate import Estimate
from rain_mergekit.calibration.fit_rule import FitRule
from rain_mergekit.calibration.job import CalibrationJob
from rain_mergekit.calibration.layer_names import (
    layer_shapes,
    matrix_names,
)
from rain_mergekit.calibration.lm_head import find_head
from rain_mergekit.calibration.progress import Progress
from rain_mergekit.calibration.result_writer import ResultWriter
from rain_mergekit.calibration.stream_estimate import StreamWork, estimate_streams
from rain_mergekit.calibration.stream_head import HeadFitter, HeadPair, HeadStreams
from rain_mergekit.calibration.stream_layer import StreamLayer
from rain_mergekit.calibration.stream_layer_file import write_stream_head, write_stream_layer
from rain_mergekit.calibration.stream_result import StreamLayerResult
from rain_mergekit.calibration.stream_shape import StreamShape
from rain_mergekit.calibration.stream_texts import StreamTexts, stream_texts
from rain_mergekit.calibration.stream_types import HiddenStates, Lesson, SiteTargets, Teacher
from rain_mergekit.calibration.task_vectors import TrioTensors
from rain_mergekit.calibration.token_teachers import token_weights
from rain_mergekit.calibration.work_folder import WorkDir
from rain_mergekit.capture.activation_store import ActivationStore
from rain_mergekit.capture.layers_ahead import ReaderThread
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.streams import embed
from rain_mergekit.capture.text_batches import batches
from rain_mergekit.checks.thinking_likelihood import Likelihood, likelihood, shortest
from rain_mergekit.models.loading import read_model_config
from rain_mergekit.system.memory import CALIBRATION, naming_shortage, trim_heap

LOG = logging.getLogger(__name__)
REASONING, MERGED, INSTRUCT, BARE = "reasoning", "merged", "instruct", "uninstructed"


class StreamEngine:
    """The work of one process: its share of the texts, every layer.

    One layer of each model is in memory at a time.
    """

    def __init__(
        self,
        job: CalibrationJob,
        layerwise: LayerwiseModel,
        instruct: LayerwiseModel,
        head: HeadPair | None,
    ) -> None:
        """layerwise, instruct: the reasoning and the instruct model; head: None: it stays."""
        self._job, self._settings, self._options = job, job.settings, job.options
        self._samples, self._world = job.samples, job.world
        self.layerwise, self.instruct, self._head = layerwise, instruct, head
        self.indices = range(len(layerwise.layers))
        self._passes = Counter[str]()

    @classmethod
    def of(cls, job: CalibrationJob) -> StreamEngine:
        """Read the models' headers; RainError names what does not fit together."""
        trio, dtype, device = job.trio, job.dtype, str(job.world.device)
        layerwise = LayerwiseModel.open(trio.reasoning, trio.config, dtype, device)
        config = read_model_config(trio.instruct)
        instruct = LayerwiseModel.open(trio.instruct, config, dtype, device)
        weights = TrioTensors.of(trio, layerwise.model, layerwise.tensors)
        weights.check(layer_shapes(layerwise), matrix_names(layerwise))
        head = None
        if job.settings.lm_head != "off":
            found = find_head(layerwise, trio, weights, job.samples, job.settings)
            head = HeadPair(found, layerwise.tensors, weights.instruct, job.world.device)
        return cls(job, layerwise, instruct, head)

    @cached_property
    def texts(self) -> StreamTexts:
        """All texts of all processes."""
        return stream_texts(self._settings, self._job.trio, self._samples)

    @cached_property
    def _rule(self) -> FitRule:
        settings = self._settings
        totals = settings.stream_weights.model_dump()
        return FitRule(
            epsilon=None if settings.stream_epsilon == "auto" else settings.stream_epsilon,
            share=settings.stream_rank_share,
            max_rank=self._shape.rank_within(settings),
            budget=self._options.activation_budget // 2,
            token_weight=token_weights(self.texts.all, totals),
            held_out_weight=token_weights(self.texts.all, totals, held_out=True),
        )

    @cached_property
    def _shape(self) -> StreamShape:
        return StreamShape.of(
            self.layerwise.outline,
            experts=self._settings.stream_experts,
            head=self._head is not None,
        )

    @property
    def parts(self) -> int:
        """How many parts the calibration file is made of: one a layer, and one for the head."""
        return len(self.indices) + (self._head is not None)

    def layer_passes(self) -> dict[str, int]:
        """Samples x layers by stream, over all processes."""
        names = [REASONING, INSTRUCT, MERGED]
        counts = self._world.sum(torch.tensor([self._passes[name] for name in names]))
        return dict(zip(names, counts.tolist(), strict=True))

    def walk(self, work: WorkDir) -> tuple[int, Likelihood]:
        """Fit all layers that are not done yet, in order; returns the index of the first.

        Also returns how likely the markers are by the hidden states that left the last layer.
        """
        folder = work.path / f"process-{self._world.rank}"
        self.texts = self._emphasised(work, folder)  # before the rule is made of them
        texts = self.texts.part(self._world)
        with ExitStack() as stack:
            streams = stack.enter_context(self._streams(texts, folder))
            stores = {name: states.store for name, states in streams.items()}
            first = work.restore(stores)
            if self._options.read_ahead:
                thread = stack.enter_context(ReaderThread(self._options.loader))
                for model in (self.layerwise, self.instruct):
                    stack.enter_context(model.reading_ahead(self.indices[first:], thread))
            writer = stack.enter_context(ResultWriter())
            samples, tokens = self._work(texts).passes(self._shape.layers[-1][0])
            quiet = self._job.quiet
            with Progress(len(self.indices), samples, tokens, first=first, quiet=quiet) as progress:
                for index in self.indices[first:]:
                    progress.layer(index)
                    with naming_shortage(
                        f"in layer {index + 1} of {len(self.indices)}", CALIBRATION
                    ):
                        result = self._layer(index, texts, streams, folder, progress.sample)
                    if self._world.rank == 0:
                        place, name = work.part(index), self._name(index)
                        writer.submit(partial(write_stream_layer, place, name, result))
                    LOG.info("finished layer %d of %d", index + 1, len(self.indices))
                    if index + 1 < self.parts:
                        work.save(index, stores, writer.wait)
            writer.wait()
            if self._head is not None:
                with naming_shortage("at the output head", CALIBRATION):
                    self._fit_head(self._head, texts, streams, work.part(len(self.indices)))
            return first, self._likelihood(streams[REASONING])

    def _fit_head(
        self, pair: HeadPair, texts: StreamTexts, streams: Mapping[str, HiddenStates], path: Path
    ) -> None:
        fitter = HeadFitter(pair, self.layerwise, self.instruct, self._world)
        teachers = self._teachers(texts, streams)
        seen = HeadStreams(texts.all, streams[MERGED], streams[REASONING], teachers)
        change = fitter.fit(seen, self._rule)
        if self._world.rank == 0:
            write_stream_head(path, pair.head, pair.rows, change)
        LOG.info("finished the output head")

    def estimate(self) -> Estimate:
        """Memory, disk and operations of the whole run on one process."""
        return estimate_streams(self._shape, self._work(self.texts))

    def _work(self, texts: StreamTexts) -> StreamWork:
        itemsize = self.layerwise.dtype.itemsize
        work = StreamWork.of(texts, self._rule, itemsize, self._options)
        compared = self._settings.compares_answers and comparable(texts)
        return work.comparing(texts) if compared else work

    def _emphasised(self, work: WorkDir, folder: Path) -> StreamTexts:
        """All texts, with what the two models' next tokens say of the answers, where wanted."""
        settings = self._settings
        if not settings.compares_answers:
            return self.texts
        how = self._options, self._world, folder
        weighed = settings.stream_emphasis == "divergence"
        reader = AnswerReader(self.layerwise, self.instruct, *how, weighed, settings.answer_margin)
        with naming_shortage("while both models read the answers", CALIBRATION):
            return reader.emphasised(self.texts, work, quiet=self._job.quiet)

    def _layer(
        self,
        index: int,
        texts: StreamTexts,
        streams: Mapping[str, HiddenStates],
        folder: Path,
        tick: Callable[[int], object],
    ) -> StreamLayerResult:
        targets = SiteTargets(folder, self._options.activation_budget // 2, self.layerwise.dtype)
        teachers = self._teachers(texts, streams)
        try:
            with self.layerwise.layer(index) as layer, ExitStack() as stack:
                name = self._name(index)
                experts = self._settings.stream_experts
                fit = StreamLayer(name, index, layer, texts.all, self._world, tick, experts=experts)
                fit.teach(streams[REASONING], targets)
                other = stack.enter_context(self.instruct.layer(index))
                for teacher in teachers:
                    fit.teach_answers(other, teacher, targets)
                if self._settings.stream_start:
                    fit.start(other, self._settings.stream_start)
                if not fit.experts:  # else these are compared one by one
                    stack.close()
                trim_heap()
                changes = fit.fit(streams[MERGED], targets, self._rule, other)
                stack.close()
                fit.advance(streams[MERGED])
                errors = fit.errors(streams[MERGED], streams[REASONING], teachers)
                result = fit.result(changes, errors)
        finally:
            targets.close_all()
        self._count(texts, len(fit.sites) + 2 * bool(fit.experts))
        trim_heap()
        return result

    def _teachers(self, texts: StreamTexts, streams: Mapping[str, HiddenStates]) -> list[Teacher]:
        """The instruct model at its lessons; for the contrast, minus itself uninstructed."""
        first = len(texts.reasoning)
        lessons = [
            Lesson.of(first + number, number, text, reading)
            for number, (reading, text) in enumerate(
                zip(texts.readings, texts.instruction, strict=True)
            )
        ]
        if not lessons:  # more processes than texts
            return []
        strength = self._settings.teacher_strength
        if self._settings.teacher == "contrast":
            return [
                Teacher(streams[INSTRUCT], lessons, share=strength, keeps=1.0),
                Teacher(streams[BARE], lessons, share=-strength, keeps=1.0),
            ]
        return [Teacher(streams[INSTRUCT], lessons, share=strength, keeps=1.0 - strength)]

    @contextmanager
    def _streams(self, texts: StreamTexts, folder: Path) -> Iterator[dict[str, HiddenStates]]:
        """Embed all texts; half of the activation budget holds hidden states, the rest is on disk.

        The merged stream starts as the reasoning model's, because embeddings are not merged.
        """
        own = [text.input_ids for text in texts.all]
        streams: dict[str, HiddenStates] = {}
        budget = self._options.activation_budget // 2
        try:
            for name, ids in (
                (REASONING, own),
                (MERGED, own),
                (INSTRUCT, [one.input_ids for one in texts.readings]),
                (BARE, [one.input_ids for one in texts.bare]),
            ):
                if ids:
                    store = self._store(name, ids, budget, folder)
                    budget -= store.memory_bytes
                    streams[name] = HiddenStates(store, [()] * len(ids))
            embed(self.layerwise, own, [streams[REASONING], streams[MERGED]])
            for name, readings in ((INSTRUCT, texts.readings), (BARE, texts.bare)):
                if readings:
                    embed(self.instruct, [one.input_ids for one in readings], [streams[name]])
            together = self._options.tokens_together
            for states in streams.values():
                states.batches[:] = batches(states.calls, states.store.lengths, together)
            yield streams
        finally:
            for states in streams.values():
                states.store.close()

    def _store(
        self, name: str, ids: Sequence[Sequence[int]], budget: int, folder: Path
    ) -> ActivationStore:
        layerwise = self.layerwise
        place = layerwise.device if self._options.keep_on_device else torch.device("cpu")
        lengths = [len(one) for one in ids]
        path = folder / f"{name}.activations"
        return ActivationStore(lengths, layerwise.hidden_size, layerwise.dtype, budget, path, place)

    def _likelihood(self, states: HiddenStates) -> Likelihood:
        samples = self._world.part(self._samples.reasoning.samples)
        rows = (states.store.get(index) for index in range(len(samples)))
        few = shortest(self._samples.reasoning.samples)
        return likelihood(self.layerwise, samples, rows, self._world, few)

    def _name(self, index: int) -> str:
        return f"{self.layerwise.prefix}.{index}"

    def _count(self, texts: StreamTexts, sites: int) -> None:
        self._passes[REASONING] += len(texts.all)
        self._passes[INSTRUCT] += len(texts.readings) + len(texts.bare)
        self._passes[MERGED] += (sites + 1) * len(texts.all)
