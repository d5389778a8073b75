"""The final norm and the output head, which follow the last layer; the head in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.capture.input_sites import dotted
from rain_mergekit.capture.layer_calls import RecordingLayer
from rain_mergekit.capture.layerwise_model import LayerwiseModel
from rain_mergekit.capture.single_experts import numbers
from rain_mergekit.models.empty_model import embedding_weight, output_head

# A float32 copy of this many logits takes 64 MiB, and so does a block of the head at width 4096.
LOGITS = 2**24
_HEAD_ROWS = 4096


@contextmanager
def finishing(layerwise: LayerwiseModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from rows (n, d) after the last layer to next-token logits (n, vocabulary).

    The model's own code runs, with stubs for its layers that return the rows, so that scaling or
    capping of logits is included.
    """
    name, own = output_head(layerwise.model)
    head = _BlockHead.of(layerwise, name, own)
    with _ending(layerwise, name, head) as run:

        def logits(rows: Tensor) -> Tensor:
            head.logits = None
            try:
                found: Tensor = run(rows).logits
            except AttributeError as error:
                # transformers 5.24 computes the logits of Llama 4 and then fails to hand them out
                found = head.kept(error)
            return found[0]

        yield logits


@contextmanager
def arriving(layerwise: LayerwiseModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from rows (n, d) after the last layer to what the head receives (n, width).

    The model's own code runs, up to its head.
    """
    name, _ = output_head(layerwise.model)
    arrival = _Arrival(layerwise)
    with _ending(layerwise, name, arrival) as run:

        def arrive(rows: Tensor) -> Tensor:
            with suppress(_Arrived):
                run(rows)
            return arrival.rows[0]

        yield arrive


def block_rows(vocabulary: int) -> int:
    """How many rows at once keep the logits small."""
    return max(1, LOGITS // vocabulary)


@contextmanager
def _ending(
    layerwise: LayerwiseModel, name: str, head: nn.Module
) -> Iterator[Callable[[Tensor], Any]]:
    """Run the model on rows that left its last layer, with another head in the place of its own."""
    given = [_Given(layer, as_tuple=layerwise.as_tuple) for layer in layerwise.layers]
    parent = layerwise.model.get_submodule(name.rpartition(".")[0])
    place = name.rpartition(".")[2]
    own = getattr(parent, place)
    with ExitStack() as stack:
        _fill_rest(layerwise, stack)
        stack.enter_context(layerwise.replaced(nn.ModuleList(given)))
        setattr(parent, place, head)
        try:
            with torch.no_grad():
                yield lambda rows: _run(layerwise, given, rows)
        finally:
            setattr(parent, place, own)
            layerwise.tensors.release()


class _Given(RecordingLayer):
    """A layer that returns what it was given beforehand."""

    def __init__(self, layer: nn.Module, *, as_tuple: bool) -> None:
        super().__init__(layer, last=False, notes=[])
        self.rows = torch.empty(0)
        self._as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ARG002
        return (self.rows[None], None) if self._as_tuple else self.rows[None]


class _Head(nn.Module):
    """Replaces the head; it has a weight because some models ask for its type."""

    def __init__(self, layerwise: LayerwiseModel) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=layerwise.dtype, device=layerwise.device)


class _Arrived(Exception):
    """Raised by the stand-in for the head: logits are not needed."""


class _Arrival(_Head):
    """Keeps what the head would receive."""

    def __init__(self, layerwise: LayerwiseModel) -> None:
        super().__init__(layerwise)
        self.rows = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows = hidden
        raise _Arrived


class _BlockHead(_Head):
    """The head, converted to the forward type block by block."""

    def __init__(self, layerwise: LayerwiseModel, weight: str, bias: str | None) -> None:
        """weight, bias: names of its tensors."""
        super().__init__(layerwise)
        self._read, self._checkpoint = layerwise.tensors.get, layerwise.checkpoint
        self._dtype, self._device = layerwise.dtype, layerwise.device
        self._weight, self._bias = weight, bias
        self.logits: Tensor | None = None

    @classmethod
    def of(cls, layerwise: LayerwiseModel, name: str, head: nn.Module) -> _BlockHead:
        """name: that of `head`; where it has no weight of its own, the embedding is its weight."""
        names, weight, bias = layerwise.tensors.sources, f"{name}.weight", f"{name}.bias"
        has_bias = getattr(head, "bias", None) is not None and bias in names
        own = weight if weight in names else embedding_weight(layerwise.model)
        return cls(layerwise, own, bias if has_bias else None)

    def forward(self, hidden: Tensor) -> Tensor:
        blocks = torch.split(self._read(self._weight), _HEAD_ROWS)
        parts = [hidden @ self._weights(block).mT for block in blocks]
        logits = torch.cat(parts, dim=-1)
        self.logits = logits if self._bias is None else logits + self._read(self._bias).to(logits)
        return self.logits

    def kept(self, error: AttributeError) -> Tensor:
        """The logits of a run that ended in this error after they were computed."""
        if self.logits is None:
            raise error
        return self.logits

    def _weights(self, block: Tensor) -> Tensor:
        return numbers(self._checkpoint, self._weight, block.to(self._device, self._dtype))


def _run(layerwise: LayerwiseModel, given: list[_Given], rows: Tensor) -> Any:
    for stub in given:
        stub.rows = rows.to(layerwise.device, layerwise.dtype)
    nothing = torch.zeros(1, *rows.shape, dtype=layerwise.dtype, device=layerwise.device)
    return layerwise.model(inputs_embeds=nothing, use_cache=False)


def _fill_rest(layerwise: LayerwiseModel, stack: ExitStack) -> None:
    """Fill what the decoder has beside its layers and the embedding: mostly the final norm."""
    embedding = layerwise.decoder.get_input_embeddings()
    for name, part in layerwise.decoder.named_children():
        if part is not embedding and part is not layerwise.layers:
            stack.enter_context(layerwise.filled(part, dotted(layerwise.home, name)))
