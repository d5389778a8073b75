"""The routed experts of one layer in stream matching: taught with the layer, fitted after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from rain_mergekit.calibration.expert_fit import ExpertFitter, ExpertsFit
from rain_mergekit.calibration.expert_rows import ExpertRows, RoutedText
from rain_mergekit.calibration.fit_rule import FitRule
from rain_mergekit.calibration.layer_passes import LayerPasses
from rain_mergekit.calibration.stream_types import Lesson, SiteTargets, Teacher
from rain_mergekit.calibration.token_teachers import TaughtText
from rain_mergekit.capture.input_sites import dotted
from rain_mergekit.capture.linear_outputs import RoutedOutput
from rain_mergekit.capture.text_batches import TextBatch
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.ridge_solver import LowRankChange
from rain_mergekit.models.experts import changed_experts
from rain_mergekit.system.distributed import World

Routed = Mapping[str, RoutedOutput]


@dataclass(frozen=True)
class ExpertChange:
    """The changes of one parameter with the weights of all experts, by expert.

    shape: of the parameter; input_axis: of its input features, -1 or -2.
    """

    shape: tuple[int, ...]
    input_axis: int
    changes: Mapping[int, LowRankChange]


class LayerExperts:
    """Mutable: the modules of routed experts in one layer; most layers have one or none.

    fitted: whether they are fitted at all.
    """

    def __init__(self, *, fitted: bool) -> None:
        self._fitted = fitted
        self._rows: dict[str, ExpertRows] = {}
        self._fitters: list[ExpertFitter] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def open(self, found: Routed, targets: SiteTargets, lengths: Sequence[int]) -> None:
        """Reserve room for what the experts of each text see and give."""
        for name, one in found.items() if self._fitted else ():
            rows = self._rows[name] = ExpertRows(name, targets, lengths)
            rows.open(int(one.call.inputs.shape[1]))

    def teach(self, batch: TextBatch, found: Routed) -> None:
        """What the reasoning model's experts saw and gave in these texts."""
        for name, rows in self._present(found):
            for number, text in enumerate(batch.texts):
                rows.teach(text, RoutedText.of(found[name], batch, number))

    def teach_answers(
        self, batch: TextBatch, lessons: Mapping[int, Lesson], found: Routed, teacher: Teacher
    ) -> None:
        """What another model's experts saw and gave; lessons: by that model's own texts."""
        for name, rows in self._present(found):
            for number, reading in enumerate(batch.texts):
                seen = RoutedText.of(found[name], batch, number)
                rows.teach_answer(lessons[reading], seen, teacher)

    def _present(self, found: Routed) -> list[tuple[str, ExpertRows]]:
        """Modules that do not run for a text are not fitted."""
        for name in self._rows.keys() - found.keys():
            self._rows.pop(name).close()
        return list(self._rows.items())

    def fit(
        self,
        passes: LayerPasses,
        texts: Sequence[TaughtText],
        other: nn.Module,
        rule: FitRule,
        world: World,
    ) -> None:
        """Fit all experts; passes: of the merged stream; other: the instruct model's layer."""
        parts = (one.only(lambda text: rule.uses(texts[text])) for one in passes.batches)
        batches = [one for one in parts if one is not None]
        found: Routed = {}
        for batch in batches:
            found = passes.experts(batch)
            for name, rows in self._present(found):
                for number, index in enumerate(batch.texts):
                    text, seen = texts[index], RoutedText.of(found[name], batch, number)
                    _require_finite(name, text, seen)
                    rows.meet(index, seen, rule.weights(text), aside=text.held_out)
        self._fitters = [
            ExpertFitter(name, found[name].call, rows, rule, world)
            for name, rows in self._rows.items()
        ]
        for one in self._fitters:
            one.fit_up(other.get_submodule(one.name))
        for batch in batches:
            with self.changed():
                found = passes.experts(batch)
            for one in self._fitters:
                for number, index in enumerate(batch.texts):
                    one.rows.lack(index, RoutedText.of(found[one.name], batch, number))
        for one in self._fitters:
            if one.fits_down:
                one.fit_down()
            one.rows.close()

    def changed(self) -> AbstractContextManager[None]:
        """Inside the block the experts compute with their changes."""
        return changed_experts({one.module: one.added for one in self._fitters})

    def changes(self) -> dict[str, ExpertChange]:
        """By the names of the parameters in the layer."""
        found: dict[str, ExpertChange] = {}
        for one in self._fitters:
            for name in dict.fromkeys(name for name, _ in one.changes):
                shape = tuple(one.module.get_parameter(name).shape)
                mine = {e: change for (which, e), change in one.changes.items() if which == name}
                found[dotted(one.name, name)] = ExpertChange(shape, one.axis, mine)
        return found

    def reports(self) -> dict[str, ExpertsFit]:
        """What became of each expert, by module."""
        return {one.name: one.report() for one in self._fitters}


def _require_finite(name: str, text: TaughtText, seen: RoutedText) -> None:
    if not (finite(seen.inputs) and finite(seen.given)):
        raise RainError(
            f"{name}: the hidden states of sample {text.source} contain NaN or Inf "
            "there: a model overflows; try --dtype float32, or remove the sample"
        )
