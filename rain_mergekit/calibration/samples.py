"""Both calibration sets of one run, and what the calibration file records of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rain_mergekit.config.settings import RainSettings
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.tokenizer import has_tokenizer, load_tokenizer
from rain_mergekit.system.wording import counted
from rain_mergekit.text.calibration_sets import (
    DataSet,
    load_instruction,
    load_reasoning,
    read_instruction,
    read_reasoning,
)
from rain_mergekit.text.chat_template import ChatTemplate
from rain_mergekit.text.later_turns import LaterTurns, turns_of
from rain_mergekit.text.marker_detection import find_markers
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.samples import InstructionSample, ReasoningSample
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Both calibration sets as token positions; no instruction set where none is needed."""

    reasoning: DataSet[ReasoningTokens]
    instruction: DataSet[InstructionTokens] | None
    markers: Markers


def load_samples(settings: RainSettings, trio: Trio) -> Samples:
    """Read, render and tokenise the calibration sets with the reasoning model's tokenizer."""
    tokenizer = load_tokenizer(trio.reasoning)
    options, path = settings.chat_template_kwargs, settings.reasoning_data
    markers = settings.marker_texts or find_markers(path, tokenizer, options)
    markers = replace(markers, optional=markers.optional or settings.blocks == "optional")
    later = _later_turns(settings, trio, markers, tokenizer) if settings.later_turns else None
    reasoning = load_reasoning(
        path,
        tokenizer,
        markers=markers,
        chat_template_kwargs=options,
        window=settings.window,
        max_tokens=settings.max_tokens,
        keep_response=settings.keeps_response,
        later=later,
    )
    instruction = None
    if settings.needs_instruction_data and settings.instruction_data is not None:
        instruction = load_instruction(
            settings.instruction_data,
            tokenizer,
            markers=markers,
            chat_template_kwargs=options,
            window=settings.window,
            max_tokens=settings.max_tokens,
            spans=settings.spans_read,
            later=later,
        )
    for found in (reasoning, instruction):
        if found is not None and found.alone:
            LOG.warning(
                "%s: %s cannot be a chat's second turn and stay its first (later_turns): %s: %s",
                found.path,
                counted(len(found.alone), "sample"),
                *found.alone[0],
            )
    return Samples(reasoning, instruction, markers)


def instruct_tokenizer(trio: Trio, own: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The instruct model's tokenizer; own: the reasoning model's.

    An instruct model without a tokenizer or chat template of its own uses the reasoning model's.
    """
    if not has_tokenizer(trio.instruct.path):
        return own
    other = load_tokenizer(trio.instruct)
    if not other.chat_template:
        other.chat_template = own.chat_template
    return other


def _later_turns(
    settings: RainSettings, trio: Trio, markers: Markers, own: PreTrainedTokenizerBase
) -> LaterTurns | None:
    """What is to go before samples; None where a chat template takes no second turn.

    own: the reasoning model's tokenizer. None too where no sample can go before another.
    """
    readers = [own, instruct_tokenizer(trio, own)] if settings.fit == "streams" else [own]
    for template in (ChatTemplate(one, settings.chat_template_kwargs) for one in readers):
        if not template.takes_turns():
            LOG.warning(
                "the chat template of %s takes no second turn, so every sample stays a chat's "
                "first (later_turns)",
                template.name,
            )
            return None
    path = settings.instruction_data if settings.needs_instruction_data else None
    said: Sequence[ReasoningSample | InstructionSample] = (
        read_reasoning(settings.reasoning_data)
        if path is None
        else read_instruction(path, spans_needed=settings.spans_read == "all")
    )
    turns = turns_of(said, markers, own.all_special_tokens)
    if not turns:
        where = path or settings.reasoning_data
        LOG.warning("no sample of %s can go before another one (later_turns)", where)
        return None
    return LaterTurns(settings.later_turns, turns)


def record(samples: Samples) -> dict[str, Any]:
    """The header's `data` entry."""
    think = sum(len(sample.think_positions) for sample in samples.reasoning.samples)
    instruction = samples.instruction
    return {
        "markers": [list(pair) for pair in samples.markers.pairs],
        "reasoning": _record(samples.reasoning, think),
        "instruction": None
        if instruction is None
        else _record(instruction, sum(len(s.response_positions) for s in instruction.samples)),
    }


def _record(data: DataSet[Any], positions: int) -> dict[str, Any]:
    used = len(data.samples)
    return {
        "path": data.path,
        "sha256": data.sha256,
        "total": data.total,
        "used": used,
        "skipped": data.total - used,
        "later": data.later,
        "positions": positions,
    }
