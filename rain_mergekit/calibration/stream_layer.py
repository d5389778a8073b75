"""One layer of stream matching: the teachers' outputs, then one module after the other is fitted.

Modules are solved in the order in which they run, each on what the modules before it now give, so
that a later one repairs what an earlier one left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rain_mergekit.calibration.fit_rule import FitRule
from rain_mergekit.calibration.layer_experts import LayerExperts
from rain_mergekit.calibration.layer_passes import LayerPasses
from rain_mergekit.calibration.linear_sites import LinearSite, linear_sites
from rain_mergekit.calibration.site_sums import Sums, empty_sums
from rain_mergekit.calibration.stream_result import StreamLayerResult
from rain_mergekit.calibration.stream_start import Start, moved
from rain_mergekit.calibration.stream_types import (
    HiddenStates,
    SiteTargets,
    StreamErrors,
    Teacher,
)
from rain_mergekit.calibration.token_teachers import TaughtText
from rain_mergekit.capture.input_sites import dotted
from rain_mergekit.capture.linear_outputs import LinearOutput
from rain_mergekit.capture.text_batches import TextBatch
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.ridge_solver import LowRankChange
from rain_mergekit.system.distributed import World
from rain_mergekit.system.memory import trim_heap
from rain_mergekit.system.profile import SOLVE, phase


class StreamLayer:
    """Fits one layer. `layer` holds the reasoning model's weights and, in the end, the merged."""

    def __init__(
        self,
        name: str,
        index: int,
        layer: nn.Module,
        texts: Sequence[TaughtText],
        world: World,
        tick: Callable[[int], object],
        *,
        experts: bool,
    ) -> None:
        """experts: whether routed experts are fitted."""
        self.name, self.index, self.layer, self.texts = name, index, layer, texts
        self._world, self._tick, self._device = world, tick, world.device
        self.sites: dict[str, LinearSite] = {}
        self.experts = LayerExperts(fitted=experts)
        self._unfit: set[str] = set()
        self._several: dict[int, bool] = {}
        self._starts: dict[str, float] = {}

    def teach(self, states: HiddenStates, targets: SiteTargets) -> None:
        """Run the reasoning model: its outputs become the targets everywhere."""
        passes = self._passes(self.layer, states)
        for batch in passes.batches:
            trace = passes.teach(batch)
            found, routed = trace.outputs(), trace.experts()
            if not self.sites:
                self.sites = linear_sites(self.layer, found)
                widths = {name: site.rows for name, site in self.sites.items()}
                targets.open(widths, states.store.lengths)
                self.experts.open(routed, targets, states.store.lengths)
            for name, rows in self._by_site(found):
                for number, text in enumerate(batch.texts):
                    targets.put(name, text, batch.part(rows, number))
            self.experts.teach(batch, routed)
            del trace, found, routed  # else they live on while the next texts pass
            trim_heap()

    def teach_answers(self, layer: nn.Module, teacher: Teacher, targets: SiteTargets) -> None:
        """Run another model's layer: its outputs enter the targets at the answers."""
        lessons = {one.reading: one for one in teacher.lessons}
        passes = self._passes(layer, teacher.states)
        for batch in passes.batches:
            trace = passes.teach(batch)
            for name, rows in self._by_site(trace.outputs()):
                for number, reading in enumerate(batch.texts):
                    taught = lessons[reading].rows(batch.part(rows, number))
                    targets.mix(name, lessons[reading], taught, teacher)
            self.experts.teach_answers(batch, lessons, trace.experts(), teacher)
            del trace
            trim_heap()

    def start(self, other: nn.Module, start: Start) -> None:
        """Move each weight towards the other layer's; routed experts stay."""
        for weight in (one for name in self.sites for one in self._fitted(name)):
            own, goal = self.layer.get_parameter(weight), other.get_parameter(weight)
            own.data, self._starts[weight] = moved(own.data, goal.data, start)

    def _fitted(self, name: str) -> list[str]:
        return [one for one in self.sites[name].outputs if one not in self._unfit]

    def fit(
        self, states: HiddenStates, targets: SiteTargets, rule: FitRule, other: nn.Module
    ) -> dict[str, LowRankChange]:
        """Solve every site in order and change the layer's weights; returns the changes.

        Routed experts come last; other: the instruct model's layer, for these.
        """
        changes: dict[str, LowRankChange] = {}
        for name in self.sites:
            if wanted := self._fitted(name):
                trim_heap()
                sums = self._sums(name, wanted, states, targets, rule)
                changes |= self._solve(name, sums, rule)
            targets.close(name)
        if self.experts:
            passes = self._passes(self.layer, states)
            self.experts.fit(passes, self.texts, other, rule, self._world)
        return changes

    def _sums(
        self,
        name: str,
        wanted: Sequence[str],
        states: HiddenStates,
        targets: SiteTargets,
        rule: FitRule,
    ) -> Sums:
        passes = self._passes(self.layer, states)
        sums = self._empty(name, wanted, passes, rule)
        for whole in passes.batches:
            batch = whole.only(lambda text: rule.uses(self.texts[text]))
            if batch is None:
                continue
            found = passes.outputs(batch, wanted)
            for number, index in enumerate(batch.texts):
                self._add(sums, self._lacking(name, found, batch, number, targets), index, rule)
            del found  # else it lives on while the next texts pass
        sums.sum_over(self._world.sum)
        return sums

    def _lacking(
        self,
        name: str,
        found: Mapping[str, LinearOutput],
        batch: TextBatch,
        number: int,
        targets: SiteTargets,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a text of the batch gives the site, and what each map lacks of its target."""
        site, text = self.sites[name], self.texts[batch.texts[number]]
        wanted = self._fitted(name)
        missing = set(wanted) - found.keys()
        if missing:
            raise RainError(
                f"{self.name}.{min(missing)}: it runs for some texts and not for others, so it "
                f"cannot be fitted (the text {text.source}); set fit: projection"
            )
        rows = targets.get(name, batch.texts[number], self._device)
        goals = dict(
            zip(site.outputs, torch.split(rows, list(site.outputs.values()), dim=1), strict=True)
        )
        errors = {one: _lack(goals[one], found[one], batch, number) for one in wanted}
        inputs = batch.part(found[wanted[0]].inputs, number)
        normed = found[wanted[0]].normed
        if normed is not None and len(wanted) == 1:  # tokens count by what their stream lacks
            sizes = batch.part(normed.rows, number)
            inputs = normed.relative(inputs, sizes)
            errors = {one: normed.relative(rows, sizes) for one, rows in errors.items()}
        self._require_finite(name, text, inputs, *errors.values())
        return inputs, errors

    def _add(
        self,
        sums: Sums,
        lacking: tuple[Tensor, dict[str, Tensor]],
        index: int,
        rule: FitRule,
    ) -> None:
        """The tokens of one text that count enter the sums."""
        inputs, errors = lacking
        weights = rule.weights(self.texts[index]).to(self._device)
        counted = weights.nonzero().flatten()
        with phase(SOLVE):
            sums.add(
                inputs[counted],
                {one: rows[counted] for one, rows in errors.items()},
                weights[counted],
                aside=self.texts[index].held_out,
            )

    def _empty(self, name: str, wanted: Sequence[str], passes: LayerPasses, rule: FitRule) -> Sums:
        site = self.sites[name]
        outputs = {one: site.outputs[one] for one in wanted}
        whole = dotted(self.name, name), site.width, outputs
        features = partial(passes.features, wanted[0])
        return empty_sums(whole, self.texts, features, rule, self._world)

    def _solve(self, name: str, sums: Sums, rule: FitRule) -> dict[str, LowRankChange]:
        with phase(SOLVE):
            try:
                changes = sums.changes(rule.epsilon, rule.max_rank, rule.share)
            except RainError as error:
                raise RainError(f"{dotted(self.name, name)}: {error}") from None
            for weight, change in changes.items():
                self._apply(weight, change)
        return changes

    def _apply(self, weight: str, change: LowRankChange) -> None:
        parameter = self.layer.get_parameter(weight)
        matrix = change.matrix if self._axis(weight) == -1 else change.matrix.mT
        parameter.data = (parameter.data.double() + matrix).to(parameter.dtype)

    def _axis(self, weight: str) -> int:
        return next(s.input_axes[weight] for s in self.sites.values() if weight in s.input_axes)

    def advance(self, states: HiddenStates) -> None:
        """The merged stream passes the finished layer."""
        passes = self._passes(self.layer, states)
        with self.experts.changed():
            for batch in passes.batches:
                passes.advance(batch)

    def errors(
        self, merged: HiddenStates, reasoning: HiddenStates, teachers: Sequence[Teacher]
    ) -> tuple[StreamErrors, StreamErrors]:
        """How far the merged stream is from its teachers' after the layer: fitted, held out."""
        found = StreamErrors(), StreamErrors()
        lessons = {
            text: [(t, one) for t in teachers for one in t.lessons if one.text == text]
            for text in {one.text for t in teachers for one in t.lessons}
        }
        for index, text in enumerate(self.texts):
            target = reasoning.store.get(index).clone()
            for teacher, lesson in lessons.get(index, ()):
                rows = lesson.rows(teacher.states.store.get(lesson.reading))
                teacher.mix_into(target, lesson, rows)
            groups = torch.tensor(text.groups, dtype=torch.long)
            found[text.held_out].add(merged.store.get(index), target, groups)
        for one in found:
            one.distance, one.norm = self._world.sum(one.distance), self._world.sum(one.norm)
        return found

    def result(
        self,
        changes: Mapping[str, LowRankChange],
        errors: tuple[StreamErrors, StreamErrors],
    ) -> StreamLayerResult:
        """What this layer contributes to the calibration file."""
        axes = {one: axis for s in self.sites.values() for one, axis in s.input_axes.items()}
        return StreamLayerResult(
            changes=changes,
            starts={one: share for one, share in self._starts.items() if share},
            shapes={one: tuple(self.layer.get_parameter(one).shape) for one in changes},
            input_axes={one: axes[one] for one in changes},
            left=tuple(sorted(self._unfit)),
            fitted=errors[0].relative(),
            held_out=errors[1].relative(),
            expert_changes=self.experts.changes(),
            experts=self.experts.reports(),
        )

    def _passes(self, layer: nn.Module, states: HiddenStates) -> LayerPasses:
        return LayerPasses(layer, self.index, states, self._device, self._tick, self._several)

    def _by_site(self, found: Mapping[str, LinearOutput]) -> Iterator[tuple[str, Tensor]]:
        """The outputs of each site's maps, concatenated; zeros for a map that did not run."""
        for name, site in self.sites.items():
            self._unfit |= site.outputs.keys() - found.keys()
            there = [found[one] for one in site.outputs if one in found]
            if not there:
                continue
            count = there[0].inputs.shape[0]
            rows = [
                _goal(found[one]) if one in found else there[0].rows.new_zeros(count, size)
                for one, size in site.outputs.items()
            ]
            yield name, torch.cat(rows, 1)

    def _require_finite(self, name: str, text: TaughtText, *values: Tensor) -> None:
        if not all(finite(one) for one in values):
            raise RainError(
                f"{self.name}.{name}: the hidden states of sample {text.source} contain NaN or Inf "
                "there: a model overflows; try --dtype float32, or remove the sample"
            )


def _goal(found: LinearOutput) -> Tensor:
    """What a teacher's map gives; of one that passes a norm, the residual stream after it."""
    return found.rows if found.normed else found.rows / found.factor


def _lack(goal: Tensor, found: LinearOutput, batch: TextBatch, number: int) -> Tensor:
    """What the map's own output lacks of its target at the tokens of one text."""
    rows = batch.part(found.rows, number)
    if found.normed is None:
        return goal - rows / found.factor
    return found.normed.undone(goal - rows, batch.part(found.normed.rows, number)) / found.factor
