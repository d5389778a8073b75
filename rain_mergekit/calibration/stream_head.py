"""Stream matching of the output head: a ridge regression with a row for each token.

The target is what the teacher's own head makes of its own last features. Errors have as many
numbers a token as there are words, but all of them lie in the span of the two heads' columns; they
are looked at in coordinates of that span, which gives the same change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from rain_mergekit.calibration.fit_rule import FitRule
from rain_mergekit.calibration.lm_head import SITE, HeadWeight
from rain_mergekit.calibration.site_sums import Sums, empty_sums
from rain_mergekit.calibration.stream_types import HiddenStates, Lesson, Teacher
from rain_mergekit.calibration.token_teachers import TaughtText
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.output_head import arriving
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.linalg.ridge_fit import SUM_DTYPE, exact
from rain_mergekit.linalg.ridge_solver import LowRankChange
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.system.distributed import World
from rain_mergekit.system.profile import LOAD, SOLVE, phase

BLOCK_ROWS = 4096
# Directions of the heads with less energy than this share of the largest are rounding.
_NOISE = 1e-13
# From what left the last layer to what the head receives.
Arrive: TypeAlias = "Callable[[Tensor], Tensor]"


@dataclass(frozen=True)
class HeadPair:
    """The rows of both heads that are fitted, W_R and W_I - W_R side by side: W (n, 2 d).

    rows: which rows of the reasoning model's head these are, (vocabulary) bool.
    """

    head: HeadWeight
    reasoning: ModelTensors
    instruct: ModelTensors
    device: torch.device

    @property
    def rows(self) -> Tensor:
        """Those that are merged and that both models have."""
        count = len(self.instruct.of_tokens(self.head.name))
        return self.head.rows & (torch.arange(len(self.head.rows)) < count)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of all rows in order, float64; rows that are not fitted are zero."""
        own = self.reasoning.of_tokens(self.head.name)
        other, kept = self.instruct.of_tokens(self.head.name), self.rows
        for start in range(0, len(own), BLOCK_ROWS):
            block = slice(start, min(len(own), start + BLOCK_ROWS))
            with phase(LOAD):
                mine = own[block].to(self.device).to(SUM_DTYPE)
                theirs = torch.zeros_like(mine)
                there = other[block]
                theirs[: len(there)] = there.to(self.device).to(SUM_DTYPE)
                pair = torch.cat([mine, theirs - mine], 1)
                yield block, pair * kept[block, None].to(self.device)

    def gram(self) -> Tensor:
        """Wᵀ W (2 d, 2 d), float64."""
        size = 2 * self.head.shape[1]
        total = torch.zeros(size, size, dtype=SUM_DTYPE, device=self.device)
        for _, pair in self.blocks():
            if not finite(pair):
                raise RainError(
                    f"{self.head.name} holds NaN or Inf in one of the models: the checkpoint is "
                    "damaged, fetch it again; or set lm_head: off"
                )
            total += pair.mT @ pair
        return total


@dataclass(frozen=True)
class HeadStreams:
    """What leaves the last layer of each model, and how answers are taught."""

    texts: Sequence[TaughtText]
    merged: HiddenStates
    reasoning: HiddenStates
    teachers: Sequence[Teacher]

    @cached_property
    def lessons(self) -> dict[int, list[tuple[Teacher, Lesson]]]:
        """The answers that other models teach, by text."""
        found: dict[int, list[tuple[Teacher, Lesson]]] = {}
        for teacher in self.teachers:
            for lesson in teacher.lessons:
                found.setdefault(lesson.text, []).append((teacher, lesson))
        return found


class HeadFitter:
    """Fits the reasoning model's output head to its teachers' logits, all before their biases."""

    def __init__(
        self, pair: HeadPair, layerwise: LayerwiseModel, instruct: LayerwiseModel, world: World
    ) -> None:
        """layerwise, instruct: the two models, whose final norms run."""
        self._pair, self._own, self._other, self._world = pair, layerwise, instruct, world

    def fit(self, streams: HeadStreams, rule: FitRule) -> LowRankChange:
        """The change of the head; A has a row for each token of the vocabulary, float32.

        Raises:
            RainError: a number is not finite, or the system cannot be solved.
        """
        with phase(SOLVE):
            values, vectors = torch.linalg.eigh(self._pair.gram())
        kept = values > _NOISE * values.max()
        scale, vectors = values[kept].sqrt(), vectors[:, kept]
        with arriving(self._own) as own, arriving(self._other) as other:
            sums = self._sums(streams, rule, (own, other), vectors * scale)
        sums.sum_over(self._world.sum)
        with phase(SOLVE):
            change = sums.changes(rule.epsilon, rule.max_rank, rule.share)[SITE]
            return self._widened(change, vectors / scale)

    def _sums(
        self, streams: HeadStreams, rule: FitRule, arrive: tuple[Arrive, Arrive], span: Tensor
    ) -> Sums:
        """Sums of all texts, with errors in the coordinates that `span` (2 d, k) makes of them."""

        def features(text: int) -> Tensor:
            return arrive[0](streams.merged.store.get(text).to(self._world.device))

        def some(chosen: Mapping[int, Tensor]) -> Tensor:
            return torch.cat([features(text)[at] for text, at in sorted(chosen.items())])

        site = SITE, self._pair.head.shape[1], {SITE: span.shape[1]}
        sums = empty_sums(site, streams.texts, some, rule, self._world)
        for index, text in enumerate(streams.texts):
            if rule.uses(text):
                inputs = features(index)
                # In float64, as two heads that are nearly alike leave directions of little energy.
                lacking = self._lacking(streams, index, inputs, arrive) @ span
                self._require_finite(text, inputs, lacking)
                weights = rule.weights(text).to(self._world.device)
                counted = weights.nonzero().flatten()
                errors = {SITE: lacking[counted].to(exact(inputs))}
                sums.add(inputs[counted], errors, weights[counted], aside=text.held_out)
        return sums

    def _lacking(
        self, streams: HeadStreams, index: int, inputs: Tensor, arrive: tuple[Arrive, Arrive]
    ) -> Tensor:
        """What W_R and W_I - W_R are to be applied to, so that the sum is what the logits lack.

        W_T x_T - W_R x = W_R (x_T - x) + (W_I - W_R) x_I, where x_T mixes all teachers' features.
        """
        device = self._world.device
        aim = arrive[0](streams.reasoning.store.get(index).to(device)).clone()
        second = torch.zeros_like(aim)
        for teacher, lesson in streams.lessons.get(index, ()):
            states = teacher.states.store.get(lesson.reading).to(device)
            rows = lesson.rows(arrive[1](states))
            teacher.mix_into(aim, lesson, rows)
            teacher.mix_into(second, lesson, rows)
        return torch.cat([aim - inputs, second], 1).to(SUM_DTYPE)

    def _widened(self, change: LowRankChange, back: Tensor) -> LowRankChange:
        """From coordinates of the heads' span to a row for each token."""
        inner = back @ change.a
        a = torch.zeros(self._pair.head.shape[0], change.rank)
        for block, pair in self._pair.blocks():
            a[block] = (pair @ inner).float().cpu()
        return replace(change, a=a, b=change.b.float().cpu())

    def _require_finite(self, text: TaughtText, *values: Tensor) -> None:
        if not all(finite(one) for one in values):
            raise RainError(
                f"{SITE}: the hidden states of sample {text.source} contain NaN or Inf "
                "there: a model overflows; try --dtype float32, or remove the sample"
            )
