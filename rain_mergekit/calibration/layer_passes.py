"""How the texts of one stream pass one layer: together where the layer lets them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor, nn

from rain_mergekit.calibration.stream_types import HiddenStates
from rain_mergekit.capture.layer_calls import LayerCall, run_layer
from rain_mergekit.capture.linear_outputs import (
    LayerCutShort,
    LinearOutput,
    LinearOutputs,
    RoutedOutput,
)
from rain_mergekit.capture.text_batches import TextBatch, agree

LOG = logging.getLogger(__name__)


class LayerPasses:
    """The passes of a stream's texts through the layer with that index, on that device."""

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        states: HiddenStates,
        device: torch.device,
        tick: Callable[[int], object],
        several: dict[int, bool],
    ) -> None:
        """tick: told of the tokens of each text that has passed.

        several: whether a layer takes several texts together, by the layer's id; what is not known
        yet is tried and noted there.
        """
        self._layer, self._index, self._states = layer, index, states
        self._device, self._tick, self._several = device, tick, several

    @cached_property
    def batches(self) -> list[TextBatch]:
        """All texts; each alone where the layer gives something else for several."""
        every, layer = self._states.batches, id(self._layer)
        shared = [one for one in every if len(one.texts) > 1]
        if not shared:
            return every
        if layer not in self._several:
            self._several[layer] = agree(self._layer, shared[-1], self._hidden, self._call)
            if not self._several[layer]:
                LOG.info("layer %d takes one text at a time", self._index)
        return every if self._several[layer] else [t for one in every for t in one.alone]

    def outputs(self, batch: TextBatch, wanted: Collection[str]) -> dict[str, LinearOutput]:
        """What these maps receive and give; the layer runs as far as that, nothing is stored."""
        hidden = self._joined(batch)
        trace = LinearOutputs(self._layer, hidden.shape[0] * hidden.shape[1], wanted)
        with trace, suppress(LayerCutShort):
            self._run(batch, hidden)
        self._count(batch)
        return trace.outputs()

    def features(self, wanted: str, chosen: Mapping[int, Tensor]) -> Tensor:
        """What a map receives at the chosen tokens of each text, one text after the other."""
        rows: dict[int, Tensor] = {}
        for whole in self.batches:
            batch = whole.only(chosen.__contains__)
            if batch is not None:
                inputs = self.outputs(batch, [wanted])[wanted].inputs
                for number, text in enumerate(batch.texts):
                    rows[text] = batch.part(inputs, number)[chosen[text].to(self._device)]
                del inputs
        return torch.cat([rows[text] for text in sorted(rows)])

    def teach(self, batch: TextBatch) -> LinearOutputs:
        """What all maps receive and give; the hidden states are those after the layer then."""
        trace, after = self._watched(batch)
        self._put(batch, after)
        return trace

    def experts(self, batch: TextBatch) -> dict[str, RoutedOutput]:
        """What the routed experts receive and give; nothing is stored."""
        trace, _ = self._watched(batch)
        self._count(batch)
        return trace.experts()

    def _watched(self, batch: TextBatch) -> tuple[LinearOutputs, Tensor]:
        hidden = self._joined(batch)
        trace = LinearOutputs(self._layer, hidden.shape[0] * hidden.shape[1])
        with trace:
            after = self._run(batch, hidden)
        return trace, after

    def advance(self, batch: TextBatch) -> None:
        """The hidden states are those after the layer then."""
        self._put(batch, self._run(batch, self._joined(batch)))

    def _joined(self, batch: TextBatch) -> Tensor:
        return batch.join([self._hidden(text) for text in batch.texts])

    def _run(self, batch: TextBatch, hidden: Tensor) -> Tensor:
        return run_layer(self._layer, hidden, self._call(batch.texts[0]))

    def _put(self, batch: TextBatch, after: Tensor) -> None:
        for number, text in enumerate(batch.texts):
            self._states.store.put(text, batch.part(after, number))
        self._count(batch)

    def _count(self, batch: TextBatch) -> None:
        for length in batch.lengths:
            self._tick(length)

    def _hidden(self, text: int) -> Tensor:
        return self._states.store.get(text).to(self._device)

    def _call(self, text: int) -> LayerCall:
        return self._states.calls[text][self._index]
