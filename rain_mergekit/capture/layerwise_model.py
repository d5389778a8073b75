"""Layer-by-layer forward passes through a model's own modules.

The model is built on the meta device. Stubs in place of its decoder layers record what each layer
is called with; every sample passes the rest of the model once. Afterwards one real layer at a time
is filled from the checkpoint, called with the recorded arguments, and emptied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rain_mergekit.capture.layer_calls import (
    EndOfRecording,
    ForwardRecord,
    LayerCall,
    PrefixSharing,
    RecordingLayer,
    TupleExpected,
    deduplicated,
    move_buffers,
    strange_layers,
)
from rain_mergekit.capture.layers_ahead import (
    KEPT_MAPPED,
    LayerReader,
    LayersAhead,
    ReaderThread,
    StoredLayer,
    use,
)
from rain_mergekit.capture.single_experts import SingleExperts, fitting, numbers
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.empty_model import decoder_layers, empty_model, text_config
from rain_mergekit.models.experts import expert_weights, stays_stored
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.outline import ModelOutline
from rain_mergekit.system.profile import LOAD, moved, phase

TensorReader: TypeAlias = "Callable[[str, tuple[int, ...], torch.dtype], Tensor]"


class LayerwiseModel:
    """A decoder without weights, and the way to fill one of its layers at a time."""

    def __init__(
        self,
        model: Any,
        tensors: ModelTensors,
        layers: nn.ModuleList,
        prefix: str,
        *,
        single: SingleExperts,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """prefix: the name of `layers` in `model`; dtype: of the forward pass.

        single: it knows the experts' weights while the layers are there: at times others take
        their place.
        """
        self.model, self.tensors, self.checkpoint = model, tensors, tensors.checkpoint
        self.layers, self.prefix, self.dtype, self.device = layers, prefix, dtype, device
        self._single = single
        self.as_tuple = False
        self._ahead: LayersAhead | None = None

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, config: Any, dtype: torch.dtype, device: str
    ) -> LayerwiseModel:
        """Build the modules without weights; no tensor of the checkpoint is read yet.

        Raises:
            RainError: transformers cannot build it, or it has no list of decoder layers.
        """
        model = empty_model(config, dtype, trust_remote_code=checkpoint.trust_remote_code)
        layers, prefix = decoder_layers(model, config)
        tensors, where = ModelTensors.of(checkpoint, model), torch.device(device)
        single = SingleExperts(tensors, expert_weights(model), where, dtype)
        return cls(model, tensors, layers, prefix, single=single, dtype=dtype, device=where)

    @property
    def hidden_size(self) -> int:
        """The width d of the hidden states."""
        return int(text_config(self.model.config).hidden_size)

    @property
    def home(self) -> str:
        """The name of the decoder: the module with the list of layers."""
        return self.prefix.rpartition(".")[0]

    @property
    def decoder(self) -> Any:
        """The module with the list of layers; it embeds and calls them."""
        return self.model.get_submodule(self.home)

    @property
    def _list(self) -> str:
        return self.prefix.rpartition(".")[2]

    @property
    def outline(self) -> ModelOutline:
        """What can be said of the model without reading a tensor."""
        config, size = self.model.config, self.checkpoint.bytes
        return ModelOutline(config, self.model, self.layers, self.hidden_size, size)

    def record(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[LayerCall]]]:
        """Embed each sample: its hidden states (T, d) and one LayerCall a layer.

        Arguments that are prefixes of a longer sample's (rotary tables, positions) share its
        memory, so callers should pass the longest sample first.
        """
        notes: list[ForwardRecord] = []
        last = self.layers[-1]
        stubs = nn.ModuleList(RecordingLayer(layer, layer is last, notes) for layer in self.layers)
        shared = PrefixSharing()
        move_buffers(self.decoder, self.device)
        used = torch.tensor(sorted({token for ids in samples for token in ids}))
        with self.replaced(stubs), self._surroundings(used), torch.no_grad():
            for ids in samples:
                yield self._record_one(ids, notes, shared)

    @contextmanager
    def replaced(self, layers: nn.ModuleList) -> Iterator[None]:
        """Replace the decoder's layers inside the block."""
        setattr(self.decoder, self._list, layers)
        try:
            yield
        finally:
            setattr(self.decoder, self._list, self.layers)

    @contextmanager
    def _surroundings(self, used: Tensor) -> Iterator[None]:
        """Fill everything besides the layers, e.g. embeddings of tokens and positions.

        Of tables with a row for each token, only the rows of the `used` tokens.
        """
        decoder: Any = self.decoder
        vocabulary = decoder.get_input_embeddings().weight.shape[0]
        with ExitStack() as stack:
            for name, module in self.decoder.named_modules():
                if name.split(".")[0] == self._list or list(module.children()):
                    continue
                by_token = isinstance(module, nn.Embedding) and module.num_embeddings >= vocabulary
                read = partial(self._read_rows, used) if by_token else None
                prefix = ".".join(part for part in (self.home, name) if part)
                stack.enter_context(self.filled(module, prefix, read))
            yield

    def _record_one(
        self, ids: Sequence[int], notes: list[ForwardRecord], shared: PrefixSharing
    ) -> tuple[Tensor, list[LayerCall]]:
        record = ForwardRecord(as_tuple=self.as_tuple)
        notes[:] = [record]
        try:
            self.decoder(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)
        except EndOfRecording:
            pass
        except (TupleExpected, ValueError) as error:
            # A ValueError after the first layer: the decoder tried to unpack what it returned.
            if isinstance(error, ValueError) and len(record.calls) != 1:
                raise
            if self.as_tuple:
                raise RainError(strange_layers(self.model)) from None
            self.as_tuple = True
            return self._record_one(ids, notes, shared)
        hidden = record.hidden
        if hidden is None or hidden.shape != (1, len(ids), self.hidden_size):
            raise RainError(strange_layers(self.model))
        shared.begin()
        calls = deduplicated(shared.call(call, len(ids)) for call in record.calls)
        return hidden[0].clone(), calls

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The real layer `index` of the checkpoint, on the device, in the forward dtype."""
        layer = self.layers[index]
        move_buffers(layer, self.device)
        with phase(LOAD):
            found = None if self._ahead is None else self._ahead.take(index)
        read = None if found is None else partial(self._convert_from, found)
        prefix = f"{self.prefix}.{index}"
        with self.filled(layer, prefix, read), self._single.read(layer, prefix), torch.no_grad():
            yield layer

    @contextmanager
    def reading_ahead(self, indices: Sequence[int], thread: ReaderThread) -> Iterator[None]:
        """Inside the block, layers are read before they are asked for, in that order.

        One more layer is in memory then, in the type in which it is stored.
        """
        reader = LayerReader.of(self._names, self.tensors.twin(), self.device, thread.loader)
        self._ahead = LayersAhead.begin(reader.read, indices, thread)
        try:
            yield
        finally:
            self._ahead = None

    def _names(self, index: int) -> list[str]:
        """The tensors that fill layer `index`, by their names in the checkpoint."""
        prefix = f"{self.prefix}.{index}"
        return [f"{prefix}.{name}" for name in self.needed(self.layers[index], prefix)]

    def needed(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The empty tensors of `module` that the checkpoint fills, by their names in it.

        Without experts that are read one by one.
        """
        empty, later = dict(module.state_dict()), self._single.of(prefix)
        mine = {n: t for n, t in empty.items() if f"{prefix}.{n}" not in later}
        return {n: t for n, t in mine.items() if t.is_meta or self._has(f"{prefix}.{n}")}

    @contextmanager
    def filled(
        self, module: nn.Module, prefix: str, read: TensorReader | None = None
    ) -> Iterator[None]:
        """Fill the empty tensors of `module` from the checkpoint (prefix.name); empty them after.

        RainError if one is missing or has another shape than the model wants.
        """
        stored = self.needed(module, prefix)
        read = read or self._read
        with phase(LOAD):
            filled = {n: read(f"{prefix}.{n}", t.shape, t.dtype) for n, t in stored.items()}
        module.load_state_dict(filled, strict=False, assign=True)
        filled.clear()  # must not keep alive what the module frees later
        try:
            yield
        finally:
            module.load_state_dict(stored, strict=False, assign=True)
            self.tensors.release()

    def _has(self, name: str) -> bool:
        return name in self.tensors.sources

    def _read(self, name: str, expected: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        stored = self._stored(name, expected)
        moved(LOAD, stored.nbytes)
        tensor = self._converted(name, stored, dtype)
        if tensor is not stored and stored.nbytes > KEPT_MAPPED:
            self.tensors.release()  # else the stored form stays in memory beside the converted
        return tensor

    def _convert_from(
        self, found: StoredLayer, name: str, expected: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """What was read ahead; each stored tensor is let go of when it has been converted."""
        stored = fitting(self.checkpoint, name, use(found.pop(name)), expected)
        return self._converted(name, stored, dtype)

    def _converted(self, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor on the device, in the forward type; large tensors of experts as stored."""
        if name in self._single.names and stays_stored(
            stored.numel(), dtype.itemsize, stored.dtype.itemsize
        ):
            dtype = stored.dtype
        return numbers(self.checkpoint, name, stored.to(self.device, dtype))

    def _read_rows(
        self, rows: Tensor, name: str, expected: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Only the rows that are used; pages of the table that nobody touches take no memory."""
        stored = self._stored(name, expected)
        table = torch.empty(expected, dtype=dtype, device=self.device)
        values = stored[rows].to(self.device, dtype)
        table[rows.to(self.device)] = numbers(self.checkpoint, name, values)
        return table

    def _stored(self, name: str, expected: tuple[int, ...]) -> Tensor:
        return fitting(self.checkpoint, name, self.tensors.get(name), expected)
