"""The estimate for a model that is not there: its published config.json is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from rain_mergekit.calibration.estimate import Estimate, Workload, estimate
from rain_mergekit.calibration.estimate_inputs import model_shape
from rain_mergekit.calibration.options import RunOptions, max_rank
from rain_mergekit.calibration.stream_estimate import GIB, StreamWork, estimate_streams
from rain_mergekit.calibration.stream_shape import StreamShape
from rain_mergekit.calibration.token_teachers import HELD_OUT_EVERY
from rain_mergekit.checks.thinking_likelihood import COMPARED
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.models.experts import experts_budget
from rain_mergekit.models.loading import default_dtype
from rain_mergekit.models.outline import ModelOutline, outline_of
from rain_mergekit.system.shipped_files import shipped
from rain_mergekit.text.calibration_sets import read_instruction, read_reasoning
from rain_mergekit.text.samples import InstructionSample, ReasoningSample

# English prose, mathematics and code in the tokenizers of large models.
CHARACTERS_A_TOKEN = 4
# Tokens of a chat template, and protected positions at the markers, in each sample.
_TEMPLATE, _MARKED = 25, 13


@dataclass(frozen=True)
class SetSizes:
    """Tokens of each sample: both sets as the reasoning model reads them, answers alone."""

    reasoning: Sequence[int]
    instruction: Sequence[int]
    answers: Sequence[int]

    @classmethod
    def of(cls, settings: RainSettings) -> SetSizes:
        """Counted by characters, as no tokenizer is at hand; RainError if a set cannot be read."""
        reasoning = read_reasoning(settings.reasoning_data)
        path = settings.instruction_data
        instruction = read_instruction(path) if path is not None else []
        return cls(
            reasoning=[_tokens(_characters(one)) for one in reasoning],
            instruction=[_tokens(_characters(one)) for one in instruction],
            answers=[_tokens(len(one.response or one.output or "")) for one in instruction],
        )


def _characters(sample: ReasoningSample | InstructionSample) -> int:
    asked = sum(len(str(message.get("content", ""))) for message in sample.conversation)
    said = (sample.output, sample.reasoning, sample.response)
    return asked + sum(len(text) for text in said if text is not None)


def _tokens(characters: int) -> int:
    return _TEMPLATE + characters // CHARACTERS_A_TOKEN


def plan_shape(path: str, chosen: Mapping[str, Any], options: RunOptions) -> Estimate:
    """What a calibration of a model with that config.json would need; nothing else is read of it.

    chosen: settings by name; without others, the package's own sets at the defaults. RainError if
    the config, a setting or a set cannot be used.
    """
    return plan_outline(outline_of(path), chosen, options)


def plan_outline(outline: ModelOutline, chosen: Mapping[str, Any], options: RunOptions) -> Estimate:
    """The estimate of `plan_shape` for a model that has been built without weights."""
    with experts_budget(options.experts_budget):
        found = _planned(outline, chosen, options)
    if outline.quantised is None:
        return found
    known = outline.quantised.kind is not None
    how = (
        "calibrations and `mergekit-rain merge` dequantise it tensor by tensor"
        if known
        else "it is not read here, its publisher may have it in bfloat16"
    )
    note = (
        f"it is published in {outline.quantised.words}, and counted as if it were in bfloat16, of "
        f"{outline.bytes / GIB:,.0f} GiB: {how}"
    )
    return replace(found, notes=(note, *found.notes))


def _planned(outline: ModelOutline, chosen: Mapping[str, Any], options: RunOptions) -> Estimate:
    settings = _settings(chosen)
    sizes = SetSizes.of(settings)
    itemsize = forward_type(outline, options).itemsize
    if settings.fit == "streams":
        shape = StreamShape.of(
            outline, experts=settings.stream_experts, head=settings.lm_head != "off"
        )
        rank = shape.rank_within(settings)
        own = [*sizes.reasoning, *sizes.instruction]
        chooses = settings.stream_epsilon == "auto"
        fitted = [tokens for index, tokens in enumerate(own) if chooses or index % HELD_OUT_EVERY]
        compares = settings.compares_answers
        work = StreamWork(
            own=own,
            fitted=fitted,
            others=sizes.instruction,
            itemsize=itemsize,
            rank=rank,
            budget=options.activation_budget,
            batch=options.tokens_together,
            ahead=options.read_ahead,
            chooses=chooses,
            before=2 * list(sizes.instruction) if compares else (),
            compared=sum(sizes.answers) if compares else 0,
        )
        return estimate_streams(shape, work)
    whole = model_shape(outline)
    return estimate(
        whole,
        _workload(sizes, settings, itemsize),
        budget=options.activation_budget,
        rank=max_rank(whole, settings),
        oblique=settings.projection == "oblique",
        stores_v=settings.stores_v,
        ahead=options.read_ahead,
    )


def forward_type(outline: ModelOutline, options: RunOptions) -> torch.dtype:
    """The type of the forward pass."""
    return options.dtype or default_dtype(outline.config, options.device)


def _settings(chosen: Mapping[str, Any]) -> RainSettings:
    sets = shipped("calibration")
    own = {f"{kind}_data": str(sets / f"{kind}.jsonl") for kind in ("reasoning", "instruction")}
    try:
        return RainSettings(**{**own, **chosen})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RainError(f"{where or 'settings'}: {first['msg']}") from None


def _workload(sizes: SetSizes, settings: RainSettings, itemsize: int) -> Workload:
    content = min(settings.content_rows, sum(sizes.reasoning)) if settings.protect_thinking else 0
    read = min(2 * settings.content_rows, sum(sizes.reasoning)) if settings.reading_share else 0
    return Workload(
        reasoning_lengths=sizes.reasoning,
        instruction_lengths=sizes.instruction,
        protected_rows=content + _MARKED * len(sizes.reasoning),
        instruction_rows=min(settings.instruction_rows, sum(sizes.answers)),
        instruction_passes=(settings.projection == "oblique") + (settings.coefficients != "off"),
        itemsize=itemsize,
        reading_rows=read,
        compared_lengths=sorted(sizes.instruction)[:COMPARED],
    )
