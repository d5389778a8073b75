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
from rain_mergekit.models.empty_model import embedding_weight, output_head

# A float32 copy of this many logits takes 64 MiB, and so does a block of the head at width 4096.
_LOGITS = 2**24
_HEAD_ROWS = 4096


@contextmanager
def finishing(shell: LayerwiseModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the map from rows (n, d) that left the last layer to next-token logits (n, vocabulary).

    The model's own code runs, with stubs for its layers that return the rows: whatever it does to
    its logits is done here too.
    """
    name, own = output_head(shell.model)
    head = _BlockHead(shell, name, own)
    with _ending(shell, name, head) as run:

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
def arriving(shell: LayerwiseModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the map from rows (n, d) that left the last layer to what the head receives (n, width).

    The model's own code runs, up to its head.
    """
    name, _ = output_head(shell.model)
    arrival = _Arrival(shell)
    with _ending(shell, name, arrival) as run:

        def arrive(rows: Tensor) -> Tensor:
            with suppress(_Arrived):
                run(rows)
            return arrival.rows[0]

        yield arrive


def block_rows(vocabulary: int) -> int:
    """How many rows at once keep the logits small."""
    return max(1, _LOGITS // vocabulary)


@contextmanager
def _ending(shell: LayerwiseModel, name: str, head: nn.Module) -> Iterator[Callable[[Tensor], Any]]:
    """Run the model on rows that left its last layer, with another head in the place of its own."""
    given = [_Given(layer, as_tuple=shell.as_tuple) for layer in shell.layers]
    parent = shell.model.get_submodule(name.rpartition(".")[0])
    place = name.rpartition(".")[2]
    own = getattr(parent, place)
    with ExitStack() as stack:
        _fill_rest(shell, stack)
        stack.enter_context(shell.replaced(nn.ModuleList(given)))
        setattr(parent, place, head)
        try:
            with torch.no_grad():
                yield lambda rows: _run(shell, given, rows)
        finally:
            setattr(parent, place, own)
            shell.tensors.release()


class _Given(RecordingLayer):
    """A layer that returns what it was given beforehand."""

    def __init__(self, layer: nn.Module, *, as_tuple: bool) -> None:
        super().__init__(layer, last=False, notes=[])
        self.rows = torch.empty(0)
        self._as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ARG002
        return (self.rows[None], None) if self._as_tuple else self.rows[None]


class _Head(nn.Module):
    """Stands for the head; some models ask for the type of their head's weight."""

    def __init__(self, shell: LayerwiseModel) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=shell.dtype, device=shell.device)


class _Arrived(Exception):
    """Raised by the stand-in for the head: logits are not needed."""


class _Arrival(_Head):
    """Keeps what the head would receive."""

    def __init__(self, shell: LayerwiseModel) -> None:
        super().__init__(shell)
        self.rows = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows = hidden
        raise _Arrived


class _BlockHead(_Head):
    """The head, without ever holding it as a whole in the forward type."""

    def __init__(self, shell: LayerwiseModel, name: str, head: nn.Module) -> None:
        super().__init__(shell)
        self._read, self._numbers = shell.tensors.get, shell.numbers
        self._dtype, self._device = shell.dtype, shell.device
        names, own = shell.tensors.sources, f"{name}.weight"
        self._weight = own if own in names else embedding_weight(shell.model)
        has_bias = getattr(head, "bias", None) is not None
        self._bias = f"{name}.bias" if has_bias and f"{name}.bias" in names else None
        self.logits: Tensor | None = None

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
        return self._numbers(self._weight, block.to(self._device, self._dtype))


def _run(shell: LayerwiseModel, given: list[_Given], rows: Tensor) -> Any:
    for stub in given:
        stub.rows = rows.to(shell.device, shell.dtype)
    nothing = torch.zeros(1, *rows.shape, dtype=shell.dtype, device=shell.device)
    return shell.model(inputs_embeds=nothing, use_cache=False)


def _fill_rest(shell: LayerwiseModel, stack: ExitStack) -> None:
    """Everything of the decoder beside its layers and the embedding: the final norm, mostly."""
    embedding = shell.decoder.get_input_embeddings()
    for name, part in shell.decoder.named_children():
        if part is not embedding and part is not shell.layers:
            stack.enter_context(shell.filled(part, dotted(shell.home, name)))
