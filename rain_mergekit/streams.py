"""The streams of hidden states that walk through the layers, and which of their rows are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from rain_mergekit.calibration_data import Samples
from rain_mergekit.capture import LayerCall, Shell
from rain_mergekit.data import InstructionTokens, ReasoningTokens
from rain_mergekit.features import spread
from rain_mergekit.settings import RainSettings
from rain_mergekit.store import ActivationStore
from rain_mergekit.walk import INSTRUCTION, PositionGroups, Stream

REASONING = "reasoning"
MERGED = "merged"
TokenSamples: TypeAlias = "Sequence[ReasoningTokens | InstructionTokens]"


def build_streams(
    shell: Shell, samples: Samples, settings: RainSettings, budget: int, folder: Path
) -> dict[str, Stream]:
    """Embed both sets; the instruction set twice where it also passes the merged layers."""
    plans: dict[str, TokenSamples] = {REASONING: samples.reasoning.samples}
    if samples.instruction is not None:
        if settings.projection == "oblique":
            plans[INSTRUCTION] = samples.instruction.samples
        if settings.coefficients != "off":
            plans[MERGED] = samples.instruction.samples
    share = budget // len(plans)
    streams: dict[str, Stream] = {}
    for name, members in plans.items():
        positions = [{}] * len(members) if name == MERGED else _positions(members, settings)
        streams[name] = _stream(shell, name, members, positions, share, folder)
    return streams


def _stream(
    shell: Shell,
    name: str,
    samples: TokenSamples,
    positions: Sequence[PositionGroups],
    budget: int,
    folder: Path,
) -> Stream:
    lengths = [len(sample.input_ids) for sample in samples]
    store = ActivationStore(
        lengths, shell.hidden_size, shell.dtype, budget, folder / f"{name}.activations"
    )
    # Longest first, so that shorter samples share the memory of its rotary tables.
    order = sorted(range(len(samples)), key=lambda index: -lengths[index])
    calls: list[list[LayerCall]] = [[] for _ in samples]
    recorded = shell.record([samples[index].input_ids for index in order])
    for index, (hidden, layer_calls) in zip(order, recorded, strict=True):
        store.put(index, hidden)
        calls[index] = layer_calls
    return Stream(name, store, calls, positions, [sample.source for sample in samples])


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
        return {INSTRUCTION: spread(sample.response_positions, instruction)}
    groups: dict[str, Sequence[int]] = {"think": sample.think_positions}
    if settings.protect_thinking > 0:
        groups["content"] = spread(sample.content_positions, content)
    if settings.protect_response > 0:
        groups["response"] = spread(sample.response_positions, content)
    return groups
