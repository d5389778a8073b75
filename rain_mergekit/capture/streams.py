"""Streams of hidden states: one set of samples on its way through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from rain_mergekit.capture.activation_store import ActivationStore
from rain_mergekit.capture.layer_calls import LayerCall
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.system.distributed import World
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

PositionGroups = Mapping[str, Sequence[int]]
TokenSamples: TypeAlias = "Sequence[ReasoningTokens | InstructionTokens]"


@dataclass(frozen=True)
class Stream:
    """One set of samples on its way through the layers: hidden states, calls, positions of use.

    merged: the hidden states come from the merged layers.
    """

    name: str
    store: ActivationStore
    calls: list[Sequence[LayerCall]]
    positions: Sequence[PositionGroups]
    samples: TokenSamples
    merged: bool = False

    def __len__(self) -> int:
        return len(self.store)


REASONING = "reasoning"


@dataclass(frozen=True)
class StreamPlan:
    """The samples of one stream, by name, and which of their rows are used; merged: as `Stream`."""

    name: str
    samples: TokenSamples
    positions: Sequence[PositionGroups]
    merged: bool = False

    def part(self, world: World) -> StreamPlan:
        """The share of one process."""
        samples, positions = world.part(self.samples), world.part(self.positions)
        return StreamPlan(self.name, samples, positions, self.merged)


def build_streams(
    layerwise: LayerwiseModel,
    plans: Sequence[StreamPlan],
    budget: int,
    folder: Path,
    keep_on_device: bool,
) -> dict[str, Stream]:
    """Embed the samples; `budget` bytes of hidden states stay in memory, the rest goes to disk."""
    streams: dict[str, Stream] = {}
    for plan in plans:
        store = ActivationStore(
            [len(sample.input_ids) for sample in plan.samples],
            layerwise.hidden_size,
            layerwise.dtype,
            budget,
            folder / f"{plan.name}.activations",
            layerwise.device if keep_on_device else torch.device("cpu"),
        )
        budget -= store.memory_bytes
        streams[plan.name] = Stream(plan.name, store, [], plan.positions, plan.samples, plan.merged)
    try:
        for members in _by_samples(plans):
            _embed(layerwise, members[0].samples, [streams[plan.name] for plan in members])
    except BaseException:  # no caller can close them yet
        for stream in streams.values():
            stream.store.close()
        raise
    return streams


def _by_samples(plans: Sequence[StreamPlan]) -> list[list[StreamPlan]]:
    """The plans of the same samples together."""
    found: dict[tuple[int, ...], list[StreamPlan]] = {}
    for plan in plans:
        found.setdefault(tuple(map(id, plan.samples)), []).append(plan)
    return list(found.values())


def _embed(layerwise: LayerwiseModel, samples: TokenSamples, streams: Sequence[Stream]) -> None:
    """Embed each sample once, for all streams that carry it; they share its layer calls."""
    # Longest first, so that shorter samples share the memory of its rotary tables.
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    calls: list[Sequence[LayerCall]] = [()] * len(samples)
    recorded = layerwise.record([samples[index].input_ids for index in order])
    for index, (hidden, calls[index]) in zip(order, recorded, strict=True):
        for stream in streams:
            stream.store.put(index, hidden)
    for stream in streams:
        stream.calls.extend(calls)
