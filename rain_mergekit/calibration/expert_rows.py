"""What the routed experts of one layer see and lack, text by text, and which tokens each gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rain_mergekit.calibration.stream_types import Lesson, SiteTargets, Teacher
from rain_mergekit.capture.linear_outputs import RoutedOutput
from rain_mergekit.capture.text_batches import TextBatch

# Tokens of an expert that are looked at together: enough for large products, few in memory.
BATCH = 4096
# Inputs of the reasoning model less those of the merged one; of the other teachers by their
# shares; of the merged model; and what the experts together are to give, or lack of it.
LAG, OTHER, INPUTS, AFTER = PARTS = ("lag", "other", "inputs", "after")


@dataclass(frozen=True)
class ExpertBatch:
    """Some tokens of one expert, m of them.

    inputs, lag, other, after: (m, d), as above. gates: how much the expert counts at each token
    (m), and total: how much all of the token's experts do. keep, share: of the reasoning model
    and of the other teachers in the aim (m). weights: (m) float64. aside: held out.
    """

    inputs: Tensor
    lag: Tensor
    other: Tensor
    after: Tensor
    gates: Tensor
    total: Tensor
    keep: Tensor
    share: Tensor
    weights: Tensor
    aside: bool


@dataclass(frozen=True)
class RoutedText:
    """The routed experts of a module in one text of n tokens.

    inputs: what they see (n, d); chosen and gates: where each token goes, and how much each expert
    counts (n, k); given: what they give together (n, width), before it is scaled.
    """

    inputs: Tensor
    chosen: Tensor
    gates: Tensor
    given: Tensor

    @classmethod
    def of(cls, found: RoutedOutput, batch: TextBatch, number: int) -> RoutedText:
        """Text `number` of a batch that passed together."""
        call, output = found.call, found.output
        return cls(
            inputs=batch.part(call.inputs, number),
            chosen=batch.part(call.chosen, number),
            gates=batch.part(call.gates, number),
            given=batch.part(output.rows, number) / output.factor,
        )


@dataclass(frozen=True)
class _Routed:
    """Of one text: the experts of each token, their gates (n, k), and the token's weight (n)."""

    chosen: Tensor
    gates: Tensor
    weights: Tensor
    aside: bool


class ExpertRows:
    """Mutable: the rows of one module of experts for all texts of this process."""

    def __init__(self, name: str, targets: SiteTargets, lengths: Sequence[int]) -> None:
        """name: of the module; its rows are among the targets, under names that begin with it."""
        self._name, self._targets, self._lengths = name, targets, lengths
        self._routed: dict[int, _Routed] = {}

    @cached_property
    def _mix(self) -> list[Tensor]:
        """By text, what the reasoning model and the other teachers count at each token (n, 2)."""
        return [torch.tensor([[1.0, 0.0]]).repeat(length, 1) for length in self._lengths]

    def part(self, name: str) -> str:
        """The name of one kind of row among the targets."""
        return f"{self._name} {name}"

    def open(self, width: int) -> None:
        """Reserve room; beyond the budget it is on disk."""
        self._targets.open({self.part(one): width for one in PARTS}, self._lengths)

    def close(self) -> None:
        """Free the room."""
        for one in PARTS:
            self._targets.close(self.part(one))

    def teach(self, text: int, found: RoutedText) -> None:
        """What the reasoning model's experts saw and gave."""
        self._targets.put(self.part(LAG), text, found.inputs)
        self._targets.put(self.part(OTHER), text, torch.zeros_like(found.inputs))
        self._targets.put(self.part(AFTER), text, found.given)

    def teach_answer(self, lesson: Lesson, found: RoutedText, teacher: Teacher) -> None:
        """What another model's experts saw and gave at an answer."""
        rows, after = lesson.rows(found.inputs), lesson.rows(found.given)
        self._targets.mix(self.part(AFTER), lesson, after, teacher)
        self._targets.mix(self.part(LAG), lesson, torch.zeros_like(rows), teacher)
        self._targets.mix(self.part(OTHER), lesson, rows, teacher)
        share = torch.tensor([[0.0, 1.0]]).expand(lesson.tokens, 2)
        teacher.mix_into(self._mix[lesson.text], lesson, share)

    def meet(self, text: int, found: RoutedText, weights: Tensor, *, aside: bool) -> None:
        """What the merged model's experts see, and which tokens go where; weights (n)."""
        inputs = found.inputs
        lag = self._targets.get(self.part(LAG), text, inputs.device) - inputs
        self._targets.put(self.part(LAG), text, lag)
        self._targets.put(self.part(INPUTS), text, inputs)
        chosen, gates = found.chosen.cpu(), found.gates.float().cpu()
        self._routed[text] = _Routed(chosen, gates, weights.cpu(), aside)

    def lack(self, text: int, found: RoutedText) -> None:
        """What is missing in what the merged model's experts give now."""
        after = self._targets.get(self.part(AFTER), text, found.given.device)
        self._targets.put(self.part(AFTER), text, after - found.given)

    def counts(self, experts: int) -> Tensor:
        """How many tokens that are fitted go to each expert, (E)."""
        total = torch.zeros(experts, dtype=torch.long)
        for one in self._routed.values():
            if not one.aside:
                total += torch.bincount(one.chosen[one.weights > 0].flatten(), minlength=experts)
        return total

    def batches(self, expert: int, device: torch.device) -> Iterator[ExpertBatch]:
        """The tokens of one expert, those that are fitted and those that are held out apart."""
        for aside in (False, True):
            found: list[tuple[int, Tensor, Tensor]] = []
            for text, one in self._routed.items():
                if one.aside != aside:
                    continue
                tokens, place = torch.where((one.chosen == expert) & (one.weights > 0)[:, None])
                if len(tokens):
                    found.append((text, tokens, place))
                if sum(len(tokens) for _, tokens, _ in found) >= BATCH:
                    yield self._batch(found, device, aside=aside)
                    found.clear()
            if found:
                yield self._batch(found, device, aside=aside)

    def _batch(
        self, found: Sequence[tuple[int, Tensor, Tensor]], device: torch.device, *, aside: bool
    ) -> ExpertBatch:
        rows = {
            part: torch.cat([self._targets.rows(self.part(part), t, at) for t, at, _ in found])
            for part in PARTS
        }
        routed = [(self._routed[text], tokens, place) for text, tokens, place in found]
        mix = torch.cat([self._mix[text][tokens] for text, tokens, _ in found]).to(device)
        return ExpertBatch(
            inputs=rows[INPUTS].to(device),
            lag=rows[LAG].to(device),
            other=rows[OTHER].to(device),
            after=rows[AFTER].to(device),
            gates=torch.cat([one.gates[at, place] for one, at, place in routed]).to(device),
            total=torch.cat([one.gates[at].sum(1) for one, at, _ in routed]).to(device),
            keep=mix[:, 0],
            share=mix[:, 1],
            weights=torch.cat([one.weights[at] for one, at, _ in routed]).to(device),
            aside=aside,
        )
