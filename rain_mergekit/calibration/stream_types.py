"""What passes through one layer in stream matching: texts, teachers, and the targets they set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rain_mergekit.calibration.token_teachers import GROUPS, TaughtText
from rain_mergekit.capture.activation_store import ActivationStore
from rain_mergekit.capture.layer_calls import LayerCall
from rain_mergekit.capture.text_batches import TextBatch
from rain_mergekit.text.answer_readings import AnswerReading


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of some texts on their way through one model.

    calls: of each text, a call for each layer. batches: which texts pass a layer together.
    """

    store: ActivationStore
    calls: list[Sequence[LayerCall]]
    batches: list[TextBatch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.store)


@dataclass(frozen=True)
class Lesson:
    """What a second model teaches of one text: the answer, and perhaps tokens of the prompt.

    text: index of the text among all; reading: index among that model's own texts; tokens: how
    many of the text's last tokens are looked at; kept: those of them that this model does not
    teach; places: where each of them is in that model's own text (anywhere for those kept), empty
    where they are the last ones there too.
    """

    text: int
    reading: int
    tokens: int
    kept: tuple[int, ...] = ()
    places: tuple[int, ...] = ()

    @classmethod
    def of(cls, index: int, number: int, text: TaughtText, reading: AnswerReading) -> Lesson:
        """The lesson of the text `index`, of which the other model's text `number` is a reading."""
        if not text.asked:
            return cls(index, number, reading.answer, text.kept)
        first, answer = text.lesson_start, text.answer_start
        asked = dict(zip(text.asked, reading.asked, strict=True))
        ahead = (asked.get(place, 0) for place in range(first, answer))
        there = len(reading.input_ids)
        places = (*ahead, *range(there - reading.answer, there))
        return cls(index, number, len(places), text.kept, places)

    def rows(self, reading: Tensor) -> Tensor:
        """The other model's rows for `tokens`, from those of its whole text."""
        return reading[list(self.places)] if self.places else reading[-self.tokens :]


@dataclass(frozen=True)
class Teacher:
    """A model that teaches lessons: target = Σ share · its output, beside the reasoning model's.

    share: of this model in the target of a lesson. keeps: the factor on the target so far.
    """

    states: HiddenStates
    lessons: Sequence[Lesson]
    share: float
    keeps: float

    def mix_into(self, target: Tensor, lesson: Lesson, rows: Tensor) -> None:
        """Mix this model's `rows` into the last tokens of `target`, in place."""
        kept = list(lesson.kept)
        own = target[kept]
        answer = target[-lesson.tokens :]
        answer.mul_(self.keeps).add_(rows.to(target), alpha=self.share)
        target[kept] = own


@dataclass
class StreamErrors:
    """Squared distance of the merged stream from its teachers, and their squared norm, by group."""

    distance: Tensor = field(default_factory=lambda: torch.zeros(len(GROUPS), dtype=torch.float64))
    norm: Tensor = field(default_factory=lambda: torch.zeros(len(GROUPS), dtype=torch.float64))

    def add(self, merged: Tensor, target: Tensor, groups: Tensor) -> None:
        """Add the tokens (n, d) of one text."""
        for total, values in ((self.distance, merged - target), (self.norm, target)):
            squares = values.double().square().sum(1)
            total.index_add_(0, groups, squares.cpu())

    def relative(self) -> dict[str, float]:
        """‖h_M - h_T‖ / ‖h_T‖ of each group that has tokens."""
        shares = (self.distance / self.norm.clamp(min=1e-300)).sqrt().tolist()
        return {
            name: share
            for name, share, norm in zip(GROUPS, shares, self.norm.tolist(), strict=True)
            if norm > 0
        }


class SiteTargets:
    """Mutable: the target outputs of every site for all texts, each (n, Σ d_out)."""

    def __init__(self, folder: Path, budget: int, dtype: torch.dtype) -> None:
        self._folder, self._budget, self._dtype = folder, budget, dtype
        self._stores: dict[str, ActivationStore] = {}

    def open(self, widths: Mapping[str, int], lengths: Sequence[int]) -> None:
        """Reserve room for texts of these lengths, by site; beyond the budget they go to disk."""
        for name, width in widths.items():
            path = self._folder / f"targets-{len(self._stores)}.activations"
            store = ActivationStore(lengths, width, self._dtype, self._budget, path)
            self._budget -= store.memory_bytes
            self._stores[name] = store

    def put(self, site: str, text: int, rows: Tensor) -> None:
        """The targets of one text."""
        self._stores[site].put(text, rows)

    def get(self, site: str, text: int, device: torch.device) -> Tensor:
        """The targets of one text."""
        return self._stores[site].get(text).to(device)

    def rows(self, site: str, text: int, tokens: Tensor) -> Tensor:
        """The targets of some tokens of one text, on the CPU."""
        return self._stores[site].rows(text, tokens)

    def mix(self, site: str, lesson: Lesson, rows: Tensor, teacher: Teacher) -> None:
        """Mix another model's outputs `rows` (tokens, Σ d_out) into the target of an answer."""
        target = self._stores[site].get(lesson.text).clone()
        teacher.mix_into(target, lesson, rows)
        self._stores[site].put(lesson.text, target)

    def close(self, site: str) -> None:
        """Free one site's targets."""
        self._stores.pop(site).close()

    def close_all(self) -> None:
        """Free everything."""
        for site in list(self._stores):
            self.close(site)
