"""The calibration texts of stream matching, and how the instruct model reads their answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rain_mergekit.calibration.samples import Samples, instruct_tokenizer
from rain_mergekit.calibration.token_teachers import TaughtText, taught_texts
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.system.distributed import World
from rain_mergekit.system.wording import counted
from rain_mergekit.text.answer_readings import AnswerReading, read_answers
from rain_mergekit.text.rendering import Renderer
from rain_mergekit.text.samples import InstructionSample
from rain_mergekit.text.token_positions import InstructionTokens

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamTexts:
    """All texts: the reasoning set's, then the instruction set's.

    readings: how the instruct model reads each text of the instruction set; bare: the same texts
    without their instructions, for the contrast; empty otherwise. dropped: sources of samples
    that cannot be used, with the reason.
    """

    reasoning: Sequence[TaughtText]
    instruction: Sequence[TaughtText]
    readings: Sequence[AnswerReading]
    bare: Sequence[AnswerReading]
    dropped: Sequence[tuple[str, str]]

    @property
    def all(self) -> list[TaughtText]:
        """Both sets, in order."""
        return [*self.reasoning, *self.instruction]

    @property
    def compared(self) -> list[int]:
        """Lengths of the instruction set's texts, as each of the two models reads them."""
        own = [len(text.input_ids) for text in self.instruction]
        return [*own, *(len(one.input_ids) for one in self.readings)]

    def part(self, world: World) -> StreamTexts:
        """The share of one process."""
        return StreamTexts(
            world.part(self.reasoning),
            world.part(self.instruction),
            world.part(self.readings),
            world.part(self.bare),
            self.dropped,
        )


def stream_texts(settings: RainSettings, trio: Trio, samples: Samples) -> StreamTexts:
    """Group the tokens, and read every answer as the instruct model does, in its own chat format.

    RainError if no sample of the instruction set is left.
    """
    if samples.instruction is None or settings.instruction_data is None:
        raise RainError("fit: streams needs rain.instruction_data: its answers are what is fitted")
    used = {one.source: one for one in samples.instruction.samples}
    own = load_tokenizer(trio.reasoning)
    other = instruct_tokenizer(trio, own)
    renderer = Renderer(own, samples.markers, settings.chat_template_kwargs)
    raw = [
        renderer.with_opening(one)  # the instruct model's template may not open the block
        for one in samples.instruction.read
        if isinstance(one, InstructionSample) and one.source in used
    ]
    views = [_readings(raw, other, settings, samples, bare=False)]
    if settings.teacher == "contrast":
        views.append(_readings(raw, other, settings, samples, bare=True))
    kept: list[tuple[InstructionTokens, list[AnswerReading]]] = []
    dropped: list[tuple[str, str]] = []
    for source, tokens in used.items():
        found = [view[source] for view in views]
        problem = next((p for p in (_problem(tokens, f, own, other) for f in found) if p), None)
        if problem is None:
            readings = [one for one in found if isinstance(one, AnswerReading)]
            kept.append((_asked_alike(tokens, readings[0], own, other), readings))
        else:
            dropped.append((source, problem))
    if apart := sum(t.asked_positions != used[t.source].asked_positions for t, _ in kept):
        LOG.warning(
            "the instruct model's tokenizer divides the instructions of %s otherwise, so the "
            "reasoning model teaches them there (teach_instructions)",
            counted(apart, "sample"),
        )
    for source, problem in dropped[:3]:
        LOG.warning("%s is left out: %s", source, problem)
    if not kept:
        raise RainError(
            f"{settings.instruction_data}: the instruct model {trio.instruct.reference} can read "
            f"none of its {counted(len(used), 'sample')} ({dropped[0][0]}: {dropped[0][1]})"
        )
    reasoning, instruction = taught_texts(samples.reasoning.samples, [tokens for tokens, _ in kept])
    bare = [views[1] for _, views in kept] if len(views) > 1 else []
    return StreamTexts(reasoning, instruction, [v[0] for _, v in kept], bare, dropped)


def _asked_alike(
    tokens: InstructionTokens,
    reading: AnswerReading,
    own: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
) -> InstructionTokens:
    """Without its instructions' tokens where the instruct model does not read the same ones."""
    mine = own.convert_ids_to_tokens([tokens.input_ids[place] for place in tokens.asked_positions])
    theirs = other.convert_ids_to_tokens([reading.input_ids[place] for place in reading.asked])
    return tokens if mine == theirs else replace(tokens, asked_positions=())


def _readings(
    raw: Sequence[InstructionSample],
    tokenizer: PreTrainedTokenizerBase,
    settings: RainSettings,
    samples: Samples,
    *,
    bare: bool,
) -> dict[str, AnswerReading | str]:
    options = settings.chat_template_kwargs
    return read_answers(
        raw,
        tokenizer,
        samples.markers,
        options,
        without_instructions=bare,
        asked_needed=settings.teach_instructions,
    )


def _problem(
    tokens: InstructionTokens,
    found: AnswerReading | str,
    own: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
) -> str | None:
    """Why the two tokenisations of an answer do not match token by token; None if they do."""
    count = len(tokens.input_ids) - tokens.answer_start
    if count < 2:
        return "it has no answer after its thinking"
    if isinstance(found, str):
        return found
    mine = own.convert_ids_to_tokens(list(tokens.input_ids[-count:]))
    theirs = other.convert_ids_to_tokens(list(found.input_ids[-count:]))
    if found.answer != count or mine[1:] != theirs[1:]:  # the first only predicts the answer
        return "the instruct model's tokenizer divides its answer otherwise"
    return None
