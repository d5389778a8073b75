"""Which teacher each token of the calibration texts has in stream matching, and how much it weighs.

The reasoning model is the teacher of prompts, markers, thinking, and of the reasoning set's
responses. The instruct model is the teacher of the instruction set's answers, from the token that
predicts an answer's first token on, but for tokens of which the reasoning model says better what
follows; and of the instructions in its prompts, where that is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

PROMPTS, MARKERS, THINKING, ANSWERS, RESPONSES = GROUPS = (
    "prompts",
    "markers",
    "thinking",
    "answers",
    "responses",
)
# About one text in so many is held out of the fit, where a set has at least twice as many texts.
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class TaughtText:
    """One calibration text: its token ids and the group of each token, by index into GROUPS.

    held_out: its tokens measure the fit and take no part in it. emphasis: how much each of the
    last tokens counts beside others of `answers`; all alike where there is none. better: tokens of
    `answers` that the reasoning model teaches, because it says what follows them better. asked:
    tokens of the prompt that the instruct model teaches, sorted. twin: another text has the same
    prompt and stands for it, so the tokens of `prompts` count nothing here.
    """

    source: str
    input_ids: tuple[int, ...]
    groups: tuple[int, ...]
    held_out: bool
    emphasis: tuple[float, ...] = ()
    better: frozenset[int] = frozenset()
    asked: tuple[int, ...] = ()
    twin: bool = False

    @property
    def answer_start(self) -> int:
        """The first token that the instruct model teaches; the text's length if there is none."""
        answers = GROUPS.index(ANSWERS)
        return self.groups.index(answers) if answers in self.groups else len(self.groups)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first thinking marker, or before the token that decides on it.

        Or before the token that predicts the answer, where that comes first.
        """
        first = {GROUPS.index(MARKERS), GROUPS.index(ANSWERS)}
        return self.input_ids[: next(i for i, group in enumerate(self.groups) if group in first)]

    @property
    def lesson_start(self) -> int:
        """The first token that the instruct model teaches, instructions among them."""
        return min(self.answer_start, *self.asked) if self.asked else self.answer_start

    @property
    def kept(self) -> tuple[int, ...]:
        """Tokens from `lesson_start` on that the instruct model does not teach."""
        answers, prompts = GROUPS.index(ANSWERS), GROUPS.index(PROMPTS)
        taught = {i for i, group in enumerate(self.groups) if group == answers} - self.better
        taught |= {i for i in self.asked if self.groups[i] == prompts}
        return tuple(i for i in range(self.lesson_start, len(self.groups)) if i not in taught)

    @property
    def shares(self) -> Tensor:
        """How much each token counts beside others of its group, (n) float64; mostly 1."""
        found = torch.ones(len(self.groups), dtype=torch.float64)
        if self.emphasis:
            last = torch.tensor(self.emphasis, dtype=torch.float64)
            taught = torch.tensor(self.groups[-len(last) :]) == GROUPS.index(ANSWERS)
            found[-len(last) :] = torch.where(taught, last, 1.0)
        if self.twin:
            found[torch.tensor(self.groups) == GROUPS.index(PROMPTS)] = 0.0
        return found

    def without_response(self) -> TaughtText:
        """The text up to its last response; it stays in the same part of the fit."""
        end = len(self.groups)
        while end and self.groups[end - 1] == GROUPS.index(RESPONSES):
            end -= 1
        return replace(self, input_ids=self.input_ids[:end], groups=self.groups[:end])


def taught_texts(
    reasoning: Sequence[ReasoningTokens], instruction: Sequence[InstructionTokens]
) -> tuple[list[TaughtText], list[TaughtText]]:
    """Both sets with the group of every token; about one text in eight of each is held out.

    Where both sets have the same prompt, the reasoning set's text ends with its thinking: the
    instruct model teaches what follows there, and one place has one teacher. So the prompt counts
    in the instruction set's text alone, where that model teaches a part of it.
    """
    answered = [
        replace(_text(one, _of_instruction(one), len(instruction)), asked=one.asked_positions)
        for one in instruction
    ]
    twins = {text.prompt: bool(text.asked) for text in answered}
    own = [_text(one, _of_reasoning(one), len(reasoning)) for one in reasoning]
    return [
        replace(text.without_response(), twin=twins[text.prompt]) if text.prompt in twins else text
        for text in own
    ], answered


def _text(
    sample: ReasoningTokens | InstructionTokens, groups: Sequence[str], count: int
) -> TaughtText:
    numbers = tuple(GROUPS.index(group) for group in groups)
    held_out = count >= 2 * HELD_OUT_EVERY and _lot(sample.input_ids) % HELD_OUT_EVERY == 0
    return TaughtText(sample.source, sample.input_ids, numbers, held_out)


def _lot(ids: Sequence[int]) -> int:
    """What decides whether a text is held out: a hash, as sets often list kinds in rotation."""
    return crc32(" ".join(map(str, ids)).encode())


def _of_reasoning(sample: ReasoningTokens) -> list[str]:
    """Everything in no other group counts as prompt: later questions, tool results, white space."""
    groups = [PROMPTS] * len(sample.input_ids)
    _mark(groups, sample.response_positions, RESPONSES)
    _mark(groups, sample.content_positions, THINKING)
    _mark(groups, sample.think_positions, MARKERS)
    return groups


def _of_instruction(sample: InstructionTokens) -> list[str]:
    """White space between the close marker and the answer belongs to the markers."""
    groups = [PROMPTS] * len(sample.input_ids)
    _mark(groups, sample.thinking_positions, THINKING)
    _mark(groups, sample.response_positions, MARKERS)
    _mark(groups, sample.think_positions, MARKERS)
    _mark(groups, range(sample.answer_start, len(groups)), ANSWERS)
    _mark(groups, sample.kept_positions, THINKING)
    _mark(groups, {*sample.kept_positions} & {*sample.think_positions}, MARKERS)
    return groups


def _mark(groups: list[str], positions: Iterable[int], name: str) -> None:
    for position in positions:
        groups[position] = name


def token_weights(
    texts: Iterable[TaughtText], totals: Mapping[str, float], *, held_out: bool = False
) -> dict[str, float]:
    """What a group's total weight is divided into: the weight of a token that counts once.

    Only tokens of texts that are fitted count, or only those of texts that are held out.
    """
    sums = torch.zeros(len(GROUPS), dtype=torch.float64)
    for text in texts:
        if text.held_out == held_out:
            sums.index_add_(0, torch.tensor(text.groups, dtype=torch.long), text.shares)
    return {
        name: totals[name] / count if count else 0.0
        for name, count in zip(GROUPS, sums.tolist(), strict=True)
    }


def weights_of(text: TaughtText, by_group: Mapping[str, float]) -> Tensor:
    """The weight of each token, (n) float64."""
    values = torch.tensor([by_group[name] for name in GROUPS], dtype=torch.float64)
    return values[torch.tensor(text.groups, dtype=torch.long)] * text.shares
