"""Recording how a model calls its layers, and running one layer with such a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.system.profile import FORWARD, phase


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer call besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class EndOfRecording(Exception):
    """Raised by the last stub: norm and head are not needed."""


class TupleExpected(Exception):
    """Raised by the second stub: layers of this family return a tuple."""


class ForwardRecord:
    """What the stubs record in one pass."""

    def __init__(self, *, as_tuple: bool) -> None:
        self.hidden: Tensor | None = None
        self.calls: list[LayerCall] = []
        self._as_tuple = as_tuple

    def add(self, hidden: Tensor, call: LayerCall) -> Any:
        """Record a call; returns the stub's result: its input, unchanged."""
        if self.hidden is None:
            self.hidden = hidden
        elif hidden.shape != self.hidden.shape:
            raise TupleExpected
        self.calls.append(call)
        return (hidden, None) if self._as_tuple else hidden


class RecordingLayer(nn.Module):
    """Replaces a layer: records its calls and returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module, last: bool, notes: list[ForwardRecord]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._last, self._notes = last, notes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments besides the hidden states."""
        result = self._notes[-1].add(hidden_states, LayerCall(args, kwargs))
        if self._last:
            raise EndOfRecording
        return result


def deduplicated(calls: Iterable[LayerCall]) -> list[LayerCall]:
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


class PrefixSharing:
    """Keep one copy of arguments that a shorter sample has as a prefix of a longer one's."""

    def __init__(self) -> None:
        self._longest: dict[tuple[str, torch.dtype], Tensor] = {}
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []

    def begin(self) -> None:
        """Forget the values of the sample before."""
        self._seen.clear()
        self._alive.clear()

    def call(self, call: LayerCall, length: int) -> LayerCall:
        """The same call, of a sample with `length` tokens, with shared values where they agree."""
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
        longest = self._longest.setdefault((key, value.dtype), value)
        if longest is not value and longest.dim() == value.dim():
            # a mask has the length twice, so every axis is cut
            prefix = longest[tuple(slice(size) for size in value.shape)]
            if prefix.shape == value.shape and torch.equal(prefix, value):
                return prefix
        return value


def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """One sample (T, d) through one layer, or some of them (n, T, d); the output likewise."""
    several = hidden.dim() > 2
    with phase(FORWARD):
        output = layer(hidden if several else hidden[None], *call.args, **call.kwargs)
    if isinstance(output, tuple):
        output = output[0]
    result: Tensor = output if several else output[0]
    return result


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move what is computed of a module, such as rotary tables, to the device."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                setattr(part, name, buffer.to(device))


def strange_layers(model: nn.Module) -> str:
    """The message for a model whose layers exchange more than hidden states."""
    return (
        f"{type(model).__name__}: its layers exchange something other than one hidden state per "
        "token, which a layer-by-layer calibration does not support; the model cannot be calibrated"
    )
