"""Norms that the output of a linear map passes on its way to the residual stream.

Some families (Gemma, OLMo 2) normalise what attention and MLP give before it is added: the stream
after a map is h + g * z / rms(z), with z the map's output and g the norm's scale. The norm is
undone at the scale of the merged model's own z, so that a lack r of the stream is a lack
rms(z) r / g of z.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Of the scale's own root mean square: a coordinate that the norm scales by less can hardly be
# reached through it, and is not pushed as if it could.
FLOOR = 0.1
_PROBE = 1e-3
_Kept = TypeVar("_Kept")


@dataclass(frozen=True)
class PassedNorm:
    """A norm in one pass.

    inputs: what it received, (..., d). scale: g, (d).
    """

    inputs: Tensor
    scale: Tensor

    @property
    def size(self) -> Tensor:
        """The root mean square of each token's input, (n, 1)."""
        rows = self.inputs.reshape(-1, len(self.scale))
        return _exact(rows).square().mean(1, keepdim=True).sqrt()

    def undone(self, lack: Tensor, size: Tensor) -> Tensor:
        """By how much the inputs of some tokens must change for a change `lack` (n, d) after it."""
        scale = self.scale.to(lack)
        floor = FLOOR**2 * scale.square().mean()
        return lack * (scale / (scale.square() + floor)) * size.to(lack)


class NormHooks:
    """A context: tells of each norm of a layer that scales by its root mean square.

    enter: told of what a norm receives; what it gives back, if anything, is given to leave, with
    the norm and its result.
    """

    def __init__(
        self,
        layer: nn.Module,
        enter: Callable[[Tensor], _Kept],
        leave: Callable[[_Kept, PassedNorm, Tensor], None],
    ) -> None:
        self._layer, self._enter, self._leave = layer, enter, leave

    @cached_property
    def _hooks(self) -> ExitStack:
        """What ends with the context."""
        return ExitStack()

    def __enter__(self) -> NormHooks:  # noqa: PYI034 - Self needs Python 3.11
        for norm, scale in _norms(self._layer):
            kept: list[Any] = []
            before = partial(self._before, kept)
            after = partial(self._after, kept, scale)
            self._hooks.callback(norm.register_forward_pre_hook(before).remove)
            self._hooks.callback(norm.register_forward_hook(after).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def _before(self, kept: list[Any], _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        kept[:] = [self._enter(inputs[0])] if inputs and isinstance(inputs[0], Tensor) else []

    def _after(
        self, kept: list[Any], scale: Tensor, _norm: nn.Module, inputs: tuple[Any, ...], result: Any
    ) -> None:
        if kept and kept[0]:
            self._leave(kept.pop(), PassedNorm(inputs[0], scale), result)


@torch.no_grad()
def _norms(layer: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Norms without bias and mean, by what they make of equal numbers, and their scales."""
    for module in layer.modules():
        own = dict(module.named_parameters(recurse=False))
        if not _named_norm(module) or set(own) != {"weight"} or own["weight"].dim() != 1:
            continue
        ones = torch.ones_like(own["weight"])[None]
        scale, doubled, turned = (_exact(module(values)[0]) for values in (ones, 2 * ones, -ones))
        same = torch.allclose(doubled, scale, rtol=_PROBE, atol=_PROBE * float(scale.abs().max()))
        if same and torch.equal(turned, -scale) and scale.any():
            yield module, scale


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _named_norm(module: nn.Module) -> bool:
    """By its name; those that take a gate beside their input are left out."""
    takes = inspect.signature(module.forward).parameters
    alone = len(takes) == 1 and not any(module.children())
    return alone and "norm" in type(module).__name__.lower()
