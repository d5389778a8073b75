"""Streams of hidden states: one set of samples on its way through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

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
        calls: list[Sequence[LayerCall]] = [()] * len(plan.samples)
        streams[plan.name] = Stream(
            plan.name, store, calls, plan.positions, plan.samples, plan.merged
        )
    try:
        for members in _by_samples(plans):
            texts = [sample.input_ids for sample in members[0].samples]
            embed(layerwise, texts, [streams[plan.name] for plan in members])
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


class Carried(Protocol):
    """What is embedded: a place for the hidden states of texts, and for their layer calls."""

    @property
    def store(self) -> ActivationStore:
        """The hidden states, by text."""
        ...

    @property
    def calls(self) -> list[Sequence[LayerCall]]:
        """Of each text, a call for each layer."""
        ...


def embed(
    layerwise: LayerwiseModel, texts: Sequence[Sequence[int]], streams: Sequence[Carried]
) -> None:
    """Embed each text once, for all streams that carry it; they share its layer calls.

    Every stream has a place for each text, in the same order.
    """
    # Longest first, so that shorter texts share the memory of its rotary tables.
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    recorded = layerwise.record([texts[index] for index in order])
    for index, (hidden, calls) in zip(order, recorded, strict=True):
        for stream in streams:
            stream.store.put(index, hidden)
            stream.calls[index] = calls
