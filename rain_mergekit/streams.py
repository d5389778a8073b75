"""The streams of hidden states that walk through the layers, and which of their rows are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rain_mergekit.calibration_data import Samples
from rain_mergekit.capture import LayerCall, Shell
from rain_mergekit.data import InstructionTokens, ReasoningTokens
from rain_mergekit.distributed import World
from rain_mergekit.features import spread
from rain_mergekit.settings import RainSettings
from rain_mergekit.store import ActivationStore
from rain_mergekit.walk import INSTRUCTION, READ, PositionGroups, Stream, TokenSamples

REASONING = "reasoning"
MERGED = "merged"


@dataclass(frozen=True)
class StreamPlan:
    """Which samples walk through the layers under one name, and which of their rows are used."""

    name: str
    samples: TokenSamples
    positions: Sequence[PositionGroups]

    def part(self, world: World) -> StreamPlan:
        """The share of one process."""
        return StreamPlan(self.name, world.part(self.samples), world.part(self.positions))


def plan_streams(samples: Samples, settings: RainSettings) -> list[StreamPlan]:
    """Both sets; the instruction set twice where it also passes the merged layers."""
    members = samples.reasoning.samples
    plans = [StreamPlan(REASONING, members, _positions(members, settings))]
    if samples.instruction is not None:
        others = samples.instruction.samples
        if settings.projection == "oblique":
            plans.append(StreamPlan(INSTRUCTION, others, _positions(others, settings)))
        if settings.coefficients != "off":
            plans.append(StreamPlan(MERGED, others, [{}] * len(others)))
    return plans


def build_streams(
    shell: Shell, plans: Sequence[StreamPlan], budget: int, folder: Path, keep_on_device: bool
) -> dict[str, Stream]:
    """Embed the samples; `budget` bytes of hidden states stay in memory, the rest goes to disk."""
    streams: dict[str, Stream] = {}
    for plan in plans:
        store = ActivationStore(
            [len(sample.input_ids) for sample in plan.samples],
            shell.hidden_size,
            shell.dtype,
            budget,
            folder / f"{plan.name}.activations",
            shell.device if keep_on_device else torch.device("cpu"),
        )
        budget -= store.memory_bytes
        streams[plan.name] = Stream(plan.name, store, [], plan.positions, plan.samples)
    try:
        _embed(shell, plans[0].samples, [streams[REASONING]])
        if len(plans) > 1:
            _embed(shell, plans[1].samples, [streams[plan.name] for plan in plans[1:]])
    except BaseException:  # nobody else knows of their files yet
        for stream in streams.values():
            stream.store.close()
        raise
    return streams


def _embed(shell: Shell, samples: TokenSamples, streams: Sequence[Stream]) -> None:
    """Embed each sample once, for all streams that carry it; they share its layer calls."""
    # Longest first, so that shorter samples share the memory of its rotary tables.
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    calls: list[Sequence[LayerCall]] = [()] * len(samples)
    recorded = shell.record([samples[index].input_ids for index in order])
    for index, (hidden, calls[index]) in zip(order, recorded, strict=True):
        for stream in streams:
            stream.store.put(index, hidden)
    for stream in streams:
        stream.calls.extend(calls)


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
    if settings.protect_prompt > 0:
        groups["prompt"] = spread(range(sample.think_positions[0]), content)
    if settings.protect_response > 0:
        groups["response"] = spread(sample.response_positions, content)
    if settings.reading_share > 0:
        prompt = range(sample.think_positions[0])
        places = (prompt, sample.response_positions)
        groups |= {name: spread(place, content) for name, place in zip(READ, places, strict=True)}
    return groups
