"""Which positions of each sample are protected, and which of their feature rows are used."""

from __future__ import annotations

from rain_mergekit.calibration.samples import Samples
from rain_mergekit.capture.streams import (
    REASONING,
    PositionGroups,
    StreamPlan,
    TokenSamples,
)
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.linalg.row_collector import Group
from rain_mergekit.system.evenly_spaced import evenly_spaced
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

MERGED = "merged"
INSTRUCTION = "instruction"
READ = ("read prompt", "read response")


def plan_streams(samples: Samples, settings: RainSettings) -> list[StreamPlan]:
    """Both sets; the instruction set twice where it also passes the merged layers."""
    members = samples.reasoning.samples
    plans = [StreamPlan(REASONING, members, _positions(members, settings))]
    if samples.instruction is not None:
        others = samples.instruction.samples
        if settings.projection == "oblique":
            plans.append(StreamPlan(INSTRUCTION, others, _positions(others, settings)))
        if settings.coefficients != "off":
            plans.append(StreamPlan(MERGED, others, [{}] * len(others), merged=True))
    return plans


def _positions(samples: TokenSamples, settings: RainSettings) -> list[PositionGroups]:
    """Which rows of each sample are used, by group, within the row limits of the settings."""
    content = max(1, settings.content_rows // len(samples))
    instruction = max(1, settings.instruction_rows // len(samples))
    return [_groups(sample, settings, content, instruction) for sample in samples]


def _groups(
    sample: ReasoningTokens | InstructionTokens,
    settings: RainSettings,
    content: int,
    instruction: int,
) -> PositionGroups:
    if isinstance(sample, InstructionTokens):
        return {INSTRUCTION: evenly_spaced(sample.response_positions, instruction)}
    wanted = [
        ("content", settings.protect_thinking, sample.content_positions),
        ("prompt", settings.protect_prompt, sample.prompt_positions),
        ("response", settings.protect_response, sample.response_positions),
    ]
    places = (sample.prompt_positions, sample.response_positions)
    wanted += [
        (name, settings.reading_share, place) for name, place in zip(READ, places, strict=True)
    ]
    some = {name: evenly_spaced(place, content) for name, weight, place in wanted if weight > 0}
    return {"think": sample.think_positions, **some}


def protected_groups(settings: RainSettings) -> list[Group]:
    """Groups of positions that are protected, with the weight of their mean second moment."""
    groups = [Group("think", 1.0)]
    if settings.protect_thinking > 0:
        groups.append(Group("content", settings.protect_thinking))
    if settings.protect_prompt > 0:
        groups.append(Group("prompt", settings.protect_prompt))
    if settings.protect_response > 0:
        groups.append(Group("response", settings.protect_response))
    return groups
