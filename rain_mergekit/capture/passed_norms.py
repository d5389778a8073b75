"""Norms that the output of a linear map passes on its way to the residual stream.

Some families (Gemma, OLMo 2) normalise what attention and MLP give before it is added: the stream
after a map is h + g * z / rms(z), with z the map's output and g the norm's scale. A change d of z
changes the stream by g * (d - z (z . d) / |z|²) / rms(z), to first order in d. So a lack r of the
stream is a lack rms(z) r / g of z, without what lies along z, which the norm takes away again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    def rows(self) -> Tensor:
        """What it received, (n, d)."""
        return self.inputs.reshape(-1, len(self.scale))

    def undone(self, lack: Tensor, rows: Tensor) -> Tensor:
        """The change of some of its rows (n, d) that makes a change `lack` (n, d) after it.

        It is at right angles to each row. At least float32, like what `relative` gives.
        """
        lack = _exact(lack)
        scale, rows = self.scale.to(lack), rows.to(lack)
        floor = FLOOR**2 * scale.square().mean()
        change = lack * (scale / (scale.square() + floor)) * _size(rows)
        along = functional.normalize(rows, dim=1)
        return change - along * (along * change).sum(1, keepdim=True)

    @staticmethod
    def relative(values: Tensor, rows: Tensor) -> Tensor:
        """Values (n, any) over the root mean square of each row (n, d); 0 where that is 0."""
        values = _exact(values)
        size = _size(rows.to(values))
        return torch.where(size == 0, 0.0, values / size)


@contextmanager
def watched_norms(
    layer: nn.Module,
    enter: Callable[[nn.Module, Tensor], _Kept | None],
    leave: Callable[[_Kept, Tensor], None],
) -> Iterator[None]:
    """Inside the block, tell of what the norms of a layer receive and give.

    enter: told of a norm and its input; what it gives back, if anything, is given to leave, with
    the norm's result. Norms are known by their names; those that take a gate beside their input are
    left out.
    """
    with ExitStack() as stack:
        for module in layer.modules():
            if "norm" in type(module).__name__.lower() and _takes_one(module):
                kept: list[Any] = []
                before, after = partial(_before, enter, kept), partial(_after, leave, kept)
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        yield


def _before(enter: Callable[..., Any], kept: list[Any], norm: nn.Module, inputs: Any) -> None:
    kept[:] = [enter(norm, inputs[0])] if inputs and isinstance(inputs[0], Tensor) else []


def _after(leave: Callable[..., None], kept: list[Any], _norm: Any, _in: Any, result: Any) -> None:
    if kept and kept[0]:
        leave(kept.pop(), result)


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1 and not any(module.children())


@torch.no_grad()
def scale_of(norm: nn.Module) -> Tensor | None:
    """The scale g, (d), by what the norm makes of equal numbers; None with a bias or a mean."""
    own = dict(norm.named_parameters(recurse=False))
    if set(own) != {"weight"} or own["weight"].dim() != 1:
        return None
    ones = torch.ones_like(own["weight"])[None]
    # Not by calling the norm, which would tell of it.
    scale, doubled, turned = (_exact(norm.forward(one)[0]) for one in (ones, 2 * ones, -ones))
    same = torch.allclose(doubled, scale, rtol=_PROBE, atol=_PROBE * float(scale.abs().max()))
    return scale if same and torch.equal(turned, -scale) and scale.any() else None


def _size(rows: Tensor) -> Tensor:
    return rows.square().mean(1, keepdim=True).sqrt()


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
