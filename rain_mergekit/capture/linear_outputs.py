"""What the linear maps of a layer receive and what their outputs add up to, during one pass.

The output of a linear map is followed through scalings by a number, views, casts, dropout and sums
until anything else uses it. For a map that writes to the residual stream the end of that chain is
the residual stream after the map; for other maps it is their own output. A norm between the map and
the residual stream is followed too. What the routed experts of a layer give together is followed in
the same way, but through no norm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rain_mergekit.capture.passed_norms import PassedNorm, scale_of, watched_norms
from rain_mergekit.capture.product_hook import WeightProductHook
from rain_mergekit.models.experts import ExpertsCall, ExpertsObserver, observe_experts

_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_IN_PLACE_SUMS = {Tensor.add_, Tensor.__iadd__}
_SCALINGS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_SAME_VALUES = {
    functional.dropout,
    torch.reshape,
    Tensor.view,
    Tensor.reshape,
    Tensor.contiguous,
    Tensor.flatten,
    Tensor.squeeze,
    Tensor.unsqueeze,
    Tensor.to,
    Tensor.float,
}


class LayerCutShort(Exception):
    """Raised inside a layer when everything that was asked for has been recorded."""


@dataclass
class LinearOutput:
    """One linear map in one pass.

    inputs: what it received, (n, d_in) for a text of n tokens. value: the end of its chain, with
    one row a token. factor: by how much its output was multiplied on the way there. normed: the
    norm that it passed.
    """

    name: str
    input_axis: int
    inputs: Tensor
    value: Tensor
    factor: float = 1.0
    summed: bool = False
    normed: PassedNorm | None = None
    _version: int = field(default=0, repr=False)

    @property
    def rows(self) -> Tensor:
        """The end of the chain, (n, width)."""
        return self.value.reshape(self.inputs.shape[0], -1)

    def settle(self) -> None:
        """What follows a norm is the end of the chain only where it came to a sum."""
        if self.normed is not None and not self.summed:
            self.follow(self.normed.inputs)
            self.normed = None

    @property
    def altered(self) -> bool:
        """Whether somebody wrote into the value after the chain had ended."""
        return self.value._version != self._version  # noqa: SLF001 - torch offers no other way

    def follow(self, value: Tensor, factor: float = 1.0, *, summed: bool = False) -> None:
        """The chain goes on with `value`."""
        self.value, self._version = value, value._version  # noqa: SLF001
        self.factor *= factor
        self.summed = self.summed or summed


@dataclass(frozen=True)
class RoutedOutput:
    """The routed experts of a layer in one pass.

    name: of the module that holds them, in the layer. output: what they give together, followed to
    the end of its chain.
    """

    name: str
    call: ExpertsCall
    output: LinearOutput


class LinearOutputs(WeightProductHook):
    """A context: records every linear map of `layer` that sees one row a token.

    routed: its routed experts too, by the names of the modules that hold them, unless only some
    weights are wanted.

    length: tokens of the text. wanted: record only these weights, and raise LayerCutShort as soon
    as the chains of all of them have ended; None: record all, and let the layer run to its end.
    """

    def __init__(
        self, layer: nn.Module, length: int, wanted: Collection[str] | None = None
    ) -> None:
        super().__init__(layer, self._product)
        self._length, self._wanted = length, None if wanted is None else set(wanted)
        self._pending: LinearOutput | None = None
        self._open: dict[int, list[LinearOutput]] = {}
        self._alive: list[Tensor] = []
        self.found: dict[str, LinearOutput] = {}
        self.routed: dict[str, RoutedOutput] = {}
        self.unfit: set[str] = set()

    def __enter__(self) -> LinearOutputs:  # noqa: PYI034 - Self needs Python 3.11
        self._stack.enter_context(watched_norms(self._layer, self._enter_norm, self._leave_norm))
        super().__enter__()  # type: ignore[no-untyped-call]
        if self._wanted is None:
            observer = ExpertsObserver(lambda _: None, lambda *_: None, self._routed)
            self._stack.enter_context(observe_experts(observer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The tensors on the way are let go of; those that were asked for stay."""
        self._stack.close()
        super().__exit__(kind, error, trace)
        self._open.clear()
        self._alive.clear()
        self._pending = None

    @cached_property
    def _stack(self) -> ExitStack:
        """What ends with the context."""
        return ExitStack()

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self._layer.named_modules()}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._layer.named_parameters()}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each of its functions."""
        used = self._used(args, kwargs or {})
        result = super().__torch_function__(func, types, args, kwargs)
        if used and isinstance(result, Tensor):
            self._go_on(func, args, used, result)
        pending = self._taken()
        if pending is not None and isinstance(result, Tensor):
            self._begin(pending, result)
        return result

    def outputs(self) -> dict[str, LinearOutput]:
        """The recorded outputs in the order of the products, without unfit ones."""
        for one in self.found.values():
            one.settle()
        return {n: one for n, one in self.found.items() if n not in self.unfit and not one.altered}

    def experts(self) -> dict[str, RoutedOutput]:
        """The routed experts by the name of their module, without unfit ones."""
        return {
            name: one
            for name, one in self.routed.items()
            if name not in self.unfit and not one.output.altered
        }

    def _product(self, name: str, inputs: Tensor, input_axis: int) -> None:
        if self._wanted is not None and name not in self._wanted:
            return
        width = self._shapes[name][input_axis]
        one_row_a_token = inputs.shape[-1] == width and inputs.numel() == width * self._length
        if len(self._shapes[name]) != 2 or not one_row_a_token or name in self.found:
            self.unfit.add(name)
            return
        rows = inputs.reshape(-1, width)
        self._pending = LinearOutput(name, input_axis, rows, rows)

    def _routed(self, call: ExpertsCall, result: Tensor) -> None:
        name = self._names[id(call.module)]
        if call.inputs.shape[0] != self._length or name in self.routed:
            self.unfit.add(name)
            return
        output = LinearOutput(name, -1, call.inputs, result)
        output.follow(result)
        self.routed[name] = RoutedOutput(name, call, output)
        self._keep(result, [output])

    def _taken(self) -> LinearOutput | None:
        pending, self._pending = self._pending, None
        return pending

    def _begin(self, output: LinearOutput, result: Tensor) -> None:
        rows = self._shapes[output.name][-3 - output.input_axis]
        if result.shape[-1] != rows or result.numel() != rows * self._length:
            self.unfit.add(output.name)  # the product was computed with tokens as columns
            return
        output.follow(result)
        self.found[output.name] = output
        self._keep(result, [output])

    def _keep(self, tensor: Tensor, outputs: list[LinearOutput]) -> None:
        self._open[id(tensor)] = outputs
        self._alive.append(tensor)  # so that its id is not used again

    def _used(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        return [t for t in _tensors((*args, *kwargs.values())) if id(t) in self._open]

    def _go_on(self, func: Any, args: tuple[Any, ...], used: list[Tensor], result: Tensor) -> None:
        """Follow the chains of the tensors in `used` into the result, or end them."""
        outputs = list({id(o): o for t in used for o in self._open[id(t)]}.values())
        factor = _factor(func, args)
        if factor is None or result.numel() != used[0].numel():
            for tensor in used:
                self._open.pop(id(tensor), None)
            self._stop_when_done()
            return
        summed = func in _SUMS or func in _IN_PLACE_SUMS
        for output in outputs:
            output.follow(result, factor, summed=summed)
        for tensor in used:
            self._open.pop(id(tensor), None)
        self._keep(result, outputs)

    def _enter_norm(self, norm: nn.Module, inputs: Tensor) -> list[LinearOutput] | None:
        """The chains that go on after the norm: those of one map that has met no sum."""
        outputs = self._open.get(id(inputs), [])
        if not outputs or any(one.summed or one.name not in self.found for one in outputs):
            return None
        scale = scale_of(norm)
        if scale is None:
            return None
        for output in outputs:
            output.normed = PassedNorm(inputs, scale)
        return self._open.pop(id(inputs))

    def _leave_norm(self, outputs: list[LinearOutput], result: Tensor) -> None:
        for output in outputs:
            output.follow(result)
        self._keep(result, outputs)

    def _stop_when_done(self) -> None:
        if self._wanted is None or self._wanted - self.found.keys() - self.unfit:
            return
        if not any(self._open.values()):
            raise LayerCutShort


def _factor(func: Any, args: tuple[Any, ...]) -> float | None:
    """The number by which the function multiplies; None if it ends the chain."""
    if func in _SUMS or func in _IN_PLACE_SUMS:
        same = len(args) == 2 and all(isinstance(arg, Tensor) for arg in args)
        return 1.0 if same else None
    if func in _SAME_VALUES:
        return 1.0
    if func in _SCALINGS and len(args) == 2:
        number = next((arg for arg in args if isinstance(arg, (int, float))), None)
        return None if number is None or number == 0 else float(number)
    return None


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
