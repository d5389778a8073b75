"""Both calibration sets of one run, and what the calibration file records of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rain_mergekit.config.settings import RainSettings
from rain_mergekit.models.loading import Trio
from rain_mergekit.models.tokenizer import load_tokenizer
from rain_mergekit.text.calibration_sets import DataSet, load_instruction, load_reasoning
from rain_mergekit.text.marker_detection import find_markers
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens


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
    reasoning = load_reasoning(
        path,
        tokenizer,
        markers=markers,
        chat_template_kwargs=options,
        window=settings.window,
        max_tokens=settings.max_tokens,
        keep_response=settings.keeps_response,
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
        )
    return Samples(reasoning, instruction, markers)


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
        "positions": positions,
    }
