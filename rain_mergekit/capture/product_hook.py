"""Observe which weights of a layer multiply which features, where torch computes the product.

No list of module classes: whatever calls `linear`, `addmm`, `matmul` or `bmm` with a weight of the
layer is seen, be it nn.Linear, a transposed Conv1D, a router or a batch of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# on_product(name, inputs (..., d_in), input_axis): input_axis is that of the stored weight.
OnProduct = Callable[[str, Tensor, int], None]
_TRANSPOSED = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
_CASTS = {Tensor.to, Tensor.float, Tensor.type}
_WITH_BIAS = {torch.addmm, torch.baddbmm}
_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.__matmul__,
}


def _nothing(_name: str, _inputs: Tensor, _axis: int) -> None:
    """After the block nothing is reported."""


class WeightProductHook(TorchFunctionMode):
    """Inside the block, report every product of features with one of the layer's weights."""

    def __init__(self, layer: nn.Module, on_product: OnProduct) -> None:
        super().__init__()
        self._layer, self._on_product = layer, on_product

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of what was watched: a callback that knows the hook would keep it alive."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self.__dict__.pop("_weights", None)
        self._on_product = _nothing

    @cached_property
    def _weights(self) -> dict[int, tuple[Tensor, str, int]]:
        """By id: the value's first item keeps the tensor alive, so that no id is used twice."""
        return {
            id(parameter): (parameter, name, -1)
            for name, parameter in self._layer.named_parameters()
            if parameter.dim() in (2, 3)
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each of its functions."""
        if func is functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            self._report(args[0], weight, transposed=False)
        elif func in _WITH_BIAS and len(args) == 3:
            self._report(args[1], args[2], transposed=True)
        elif func in _PRODUCTS and len(args) == 2:
            self._report(args[0], args[1], transposed=True)
            if id(args[0]) in self._weights and isinstance(args[1], Tensor):  # W x^T
                self._report(args[1].mT, args[0], transposed=False)
        result = func(*args, **(kwargs or {}))
        if args and id(args[0]) in self._weights:
            self._follow(func, args[0], result)
        return result

    def _report(self, inputs: Any, weight: Any, *, transposed: bool) -> None:
        known = self._weights.get(id(weight))
        if known is not None:
            _, name, axis = known
            # A product x W reads the second last axis of what it is given, x W^T the last.
            self._on_product(name, inputs, -3 - axis if transposed else axis)

    def _follow(self, func: Any, weight: Tensor, result: Any) -> None:
        """A cast or transposed weight is still that weight."""
        _, name, axis = self._weights[id(weight)]
        if func in _TRANSPOSED:
            self._weights[id(result)] = (result, name, -3 - axis)
        elif func in _CASTS and isinstance(result, Tensor):
            self._weights[id(result)] = (result, name, axis)
