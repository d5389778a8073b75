"""Layer-by-layer forward passes through a model's own modules.

The model is built on the meta device. Stubs in place of its decoder layers record what each layer
is called with; every sample passes that shell once. Afterwards one real layer at a time is filled
from the checkpoint, called with the recorded arguments, and emptied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rain_mergekit import attention
from rain_mergekit.checkpoint import Checkpoint
from rain_mergekit.errors import RainError

TensorReader: TypeAlias = "Callable[[str, tuple[int, ...]], Tensor]"
_KEPT_MAPPED = 1 << 20


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer call besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _EndOfShell(Exception):
    """Raised by the last stub: norm and head are not needed."""


class Stub(nn.Module):
    """Stands for a layer that is not there: records its calls and passes hidden states on."""

    def __init__(self, layer: nn.Module, calls: list[LayerCall], last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._calls, self._last = calls, last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Record the arguments besides the hidden states."""
        self._calls.append(LayerCall(args, kwargs))
        if self._last:
            raise _EndOfShell
        return hidden_states


class Shell:
    """A decoder without weights, and the way to fill one of its layers at a time."""

    def __init__(
        self, checkpoint: Checkpoint, config: Any, dtype: torch.dtype, device: str
    ) -> None:
        attention.register()
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=dtype,
                attn_implementation=attention.NAME,
                trust_remote_code=checkpoint.trust_remote_code,
            )
        self.model.eval()
        self.hidden_size = int(config.hidden_size)
        self.layers, self.prefix = _decoder_layers(self.model, config)
        self.decoder = self.model.get_submodule(self.prefix.rpartition(".")[0])

    def record(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[LayerCall]]]:
        """Embed each sample: its hidden states (T, d) and one LayerCall a layer.

        Arguments that are prefixes of a longer sample's (rotary tables, positions) share its
        memory, so callers should pass the longest sample first.
        """
        calls: list[LayerCall] = []
        stubs = nn.ModuleList(
            Stub(layer, calls, index == len(self.layers) - 1)
            for index, layer in enumerate(self.layers)
        )
        shared = _PrefixSharing()
        embedding = self.decoder.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embedding)
        self.decoder.layers = stubs
        self.decoder.to(self.device) if _has_no_meta(self.decoder) else _move_buffers(
            self.decoder, self.device
        )
        try:
            used = torch.tensor(sorted({token for ids in samples for token in ids}))
            read = partial(self._read_rows, used)
            with self.filled(embedding, name, read), torch.no_grad():
                for ids in samples:
                    yield self._record_one(ids, calls, shared)
        finally:
            self.decoder.layers = self.layers

    def _record_one(
        self, ids: Sequence[int], calls: list[LayerCall], shared: _PrefixSharing
    ) -> tuple[Tensor, list[LayerCall]]:
        calls.clear()
        hidden: list[Tensor] = []
        first = self.decoder.layers[0]
        handle = first.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
        try:
            self.decoder(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)
        except _EndOfShell:
            pass
        finally:
            handle.remove()
        shared.begin()
        return hidden[0][0].clone(), _deduplicated(shared.call(call, len(ids)) for call in calls)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The real layer `index` of the checkpoint, on the device, in the forward dtype."""
        layer = self.layers[index]
        _move_buffers(layer, self.device)
        with self.filled(layer, f"{self.prefix}.{index}"), torch.no_grad():
            yield layer

    @contextmanager
    def filled(
        self, module: nn.Module, prefix: str, read: TensorReader | None = None
    ) -> Iterator[None]:
        """Fill the empty tensors of `module` from the checkpoint (prefix.name); empty them after.

        RainError if one is missing or has another shape than the model wants.
        """
        empty = dict(module.state_dict())
        meta = {name: tensor for name, tensor in empty.items() if tensor.is_meta}
        filled = {
            name: (read or self._read)(f"{prefix}.{name}", tuple(tensor.shape))
            for name, tensor in meta.items()
        }
        module.load_state_dict(filled, strict=False, assign=True)
        filled.clear()  # what the module lets go of later must not live on here
        try:
            yield
        finally:
            module.load_state_dict(meta, strict=False, assign=True)
            self.checkpoint.release()

    def _read(self, name: str, expected: tuple[int, ...]) -> Tensor:
        stored = self._stored(name, expected)
        tensor = stored.to(self.device, self.dtype)
        if tensor is not stored and stored.nbytes > _KEPT_MAPPED:
            self.checkpoint.release()  # else the stored form stays in memory beside the converted
        return tensor

    def _read_rows(self, rows: Tensor, name: str, expected: tuple[int, ...]) -> Tensor:
        """Only the rows that are used; pages of the table that nobody touches take no memory."""
        stored = self._stored(name, expected)
        table = torch.empty(expected, dtype=self.dtype, device=self.device)
        table[rows.to(self.device)] = stored[rows].to(self.device, self.dtype)
        return table

    def _stored(self, name: str, expected: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.get(name)
        if tuple(tensor.shape) != expected:
            raise RainError(
                f"{self.checkpoint.reference}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"but config.json asks for {expected}"
            )
        return tensor


def _deduplicated(calls: Iterable[LayerCall]) -> list[LayerCall]:
    """One object for calls with the same arguments; most models call all layers alike."""
    kept: dict[Any, LayerCall] = {}
    return [kept.setdefault(_identity((call.args, call.kwargs)), call) for call in calls]


def _identity(value: Any) -> Any:
    """Equal for values that are made of the same objects; valid while these objects live."""
    if isinstance(value, tuple):
        return tuple(_identity(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _identity(part)) for key, part in value.items())
    return id(value)


def _decoder_layers(model: nn.Module, config: Any) -> tuple[nn.ModuleList, str]:
    count = int(config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and name.endswith(".layers"):
            return module, name
    raise RainError(f"{type(model).__name__}: found no list of {count} decoder layers")


def _has_no_meta(module: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in module.state_dict().values())


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(part, name, buffer.to(device))


class _PrefixSharing:
    """Keep one copy of arguments that a shorter sample has as a prefix of a longer one's."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, torch.dtype], Tensor] = {}
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []

    def begin(self) -> None:
        self._seen.clear()
        self._alive.clear()

    def call(self, call: LayerCall, length: int) -> LayerCall:
        kwargs = {key: self._value(key, value, length) for key, value in call.kwargs.items()}
        args = tuple(self._value(str(i), value, length) for i, value in enumerate(call.args))
        return LayerCall(args, kwargs)

    def _value(self, key: str, value: Any, length: int) -> Any:
        if isinstance(value, tuple):
            return tuple(self._value(f"{key}.{i}", part, length) for i, part in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._seen:
            self._alive.append(value)  # an id is only unique while its object lives
            self._seen[id(value)] = self._shared(key, value, length)
        return self._seen[id(value)]

    def _shared(self, key: str, value: Tensor, length: int) -> Tensor:
        if length not in value.shape:
            return value
        axis = value.shape.index(length)
        longest = self._longest.setdefault((key, value.dtype), value)
        if longest is not value and longest.dim() == value.dim() and longest.shape[axis] >= length:
            prefix = longest.narrow(axis, 0, length)
            if prefix.shape == value.shape and torch.equal(prefix, value):
                return prefix
        return value


RowPicker = Callable[[str, Tensor], None]


class SiteMap:
    """Which linear modules of a layer see the same input tensor, observed on its first pass."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = tuple(modules)
        self.site_of: dict[str, str] = {}

    @property
    def owners(self) -> tuple[str, ...]:
        """One module a site: the first to see the tensor; its name names the site."""
        return tuple(dict.fromkeys(self.site_of.values()))

    def members(self, site: str) -> tuple[str, ...]:
        """The modules that see the site's tensor, in the order in which they ran."""
        return tuple(name for name, owner in self.site_of.items() if owner == site)


def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """One sample (T, d) through one layer; its output hidden states (T, d)."""
    output = layer(hidden[None], *call.args, **call.kwargs)
    if isinstance(output, tuple):
        output = output[0]
    result: Tensor = output[0]
    return result


@contextmanager
def capture_inputs(layer: nn.Module, sites: SiteMap, pick: RowPicker) -> Iterator[None]:
    """Call pick(site, input (T, d)) for each site of the layer during the forward pass inside.

    The layer's first pass also finds its sites, so that no pass is spent on that alone.
    """
    seen: list[tuple[Tensor, str]] = []  # inputs stay alive, so that addresses are not reused

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if name not in sites.site_of:
                owner = next((first for tensor, first in seen if _same(tensor, x)), name)
                sites.site_of[name] = owner
                seen.append((x, owner))
            if sites.site_of[name] == name:
                pick(name, x.reshape(-1, x.shape[-1]))

        return observe

    names = sites.owners or sites.modules
    handles = [layer.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.shape == right.shape
