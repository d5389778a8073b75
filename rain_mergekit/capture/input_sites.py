"""The input sites of a layer and their feature rows, found while the layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from rain_mergekit.capture.left_alone import nothing
from rain_mergekit.capture.product_hook import WeightProductHook
from rain_mergekit.models.experts import ExpertsCall, ExpertsObserver, observe_experts

# pick(site, inputs (n, d), tokens (n) or None): row i of the inputs belongs to token tokens[i] of
# the text at hand, or to token i.
RowPicker = Callable[[str, Tensor, "Tensor | None"], None]
# leave(name, rows, width): whether a weight of that shape is no linear weight of the layer.
Leave = Callable[[str, int, int], bool]


@dataclass(frozen=True)
class LinearWeight:
    """A weight that multiplies features: W (d_out, d_in), or one such matrix for each expert.

    name: the parameter's, within the layer. input_axis: -1, or -2 for a transposed weight. sites:
    one, or one for each expert. Modules that see the same tensor share a site.
    """

    name: str
    shape: tuple[int, ...]
    input_axis: int
    sites: tuple[str, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """d_out, d_in."""
        return self.shape[-3 - self.input_axis], self.shape[self.input_axis]

    def site_of(self, expert: int) -> str:
        """The site of one expert: its own, or the one that all share."""
        return self.sites[expert] if len(self.sites) > 1 else self.sites[0]


@dataclass
class SiteMap:
    """The linear weights of a layer and the sites of their inputs, found while the layer runs."""

    weights: dict[str, LinearWeight] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    @property
    def owners(self) -> tuple[str, ...]:
        """All sites, in the order in which they were found."""
        return tuple(self.widths)

    def members(self, site: str) -> list[tuple[LinearWeight, int | None]]:
        """The weights that see the site's tensor; with each, the expert if it is one expert's."""
        return [
            (weight, index if len(weight.sites) > 1 else None)
            for weight in self.weights.values()
            for index, owner in enumerate(weight.sites)
            if owner == site
        ]


def dotted(*parts: str) -> str:
    """The names joined by dots, without empty ones."""
    return ".".join(part for part in parts if part)


def site_name(parameter: str) -> str:
    """The name of a site: that of the first weight that receives the tensor."""
    return parameter.removesuffix(".weight")


class _InputSiteFinder:
    """Watches one pass of one sample and hands out the feature rows of every site."""

    def __init__(
        self,
        layer: nn.Module,
        sites: SiteMap,
        pick: RowPicker,
        length: Callable[[], int],
        leave: Leave,
    ) -> None:
        self._layer, self._sites, self._pick, self._length = layer, sites, pick, length
        self._leave = leave
        self._seen: list[tuple[Tensor, str]] = []  # kept alive, so that addresses are not reused

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self._layer.named_modules()}

    def product(self, name: str, inputs: Tensor, input_axis: int) -> None:
        """One weight multiplies `inputs` (..., d_in), or each expert its own (E, n, d_in)."""
        weight = self._layer.get_parameter(name)
        if weight.dim() == 3:
            self._experts(name, inputs, input_axis)
            return
        width = int(weight.shape[input_axis])
        if self._leave(name, int(weight.shape[-3 - input_axis]), width):
            return
        # Only products with one row of features a token are projected.
        if inputs.shape[-1] == width and inputs.numel() == width * self._length():
            self._linear(name, inputs.reshape(-1, width), input_axis)

    def _linear(self, name: str, inputs: Tensor, input_axis: int) -> None:
        known = self._sites.weights.get(name)
        if known is None:
            owner = next((site for seen, site in self._seen if same_tensor(seen, inputs)), None)
            if owner is None:
                owner = site_name(name)
                self._sites.widths[owner] = inputs.shape[-1]
            known = self._add(name, input_axis, (owner,))
            self._seen.append((inputs, owner))
        site = known.sites[0]
        if site_name(name) == site:
            self._pick(site, inputs, None)

    def _experts(self, name: str, inputs: Tensor, input_axis: int) -> None:
        """A batched product; tokens that were not routed to an expert are zero there."""
        if inputs.dim() != 3 or inputs.shape[1] != self._length():
            return
        for expert, site in enumerate(self._own_sites(name, input_axis)):
            tokens = inputs[expert].abs().amax(-1).nonzero().flatten()
            self._pick(site, inputs[expert][tokens], tokens)

    def _own_sites(self, name: str, input_axis: int) -> tuple[str, ...]:
        known = self._sites.weights.get(name)
        if known is None:
            count = self._layer.get_parameter(name).shape[0]
            own = tuple(f"{site_name(name)}.{expert}" for expert in range(count))
            known = self._add(name, input_axis, own)
            self._sites.widths.update(dict.fromkeys(own, known.matrix[1]))
        return known.sites

    def _add(self, name: str, input_axis: int, sites: tuple[str, ...]) -> LinearWeight:
        shape = tuple(self._layer.get_parameter(name).shape)
        weight = self._sites.weights[name] = LinearWeight(name, shape, input_axis, sites)
        return weight

    def routed(self, call: ExpertsCall) -> None:
        """Routed experts: all first projections see the same tensor, at every token."""
        axis = -2 if call.transposed else -1
        self._linear(self._parameter(call, call.up), call.inputs, axis)
        self._own_sites(self._parameter(call, call.down), axis)

    def inner(self, call: ExpertsCall, expert: int, tokens: Tensor, features: Tensor) -> None:
        """What one expert's down projection sees, at the tokens routed to it."""
        sites = self._sites.weights[self._parameter(call, call.down)].sites
        self._pick(sites[expert], features, tokens)

    def _parameter(self, call: ExpertsCall, name: str) -> str:
        prefix = self._names[id(call.module)]
        return f"{prefix}.{name}" if prefix else name


@contextmanager
def capture_inputs(
    layer: nn.Module,
    sites: SiteMap,
    pick: RowPicker,
    length: Callable[[], int],
    leave: Leave = nothing,
) -> Iterator[None]:
    """Call `pick` for each site of the layer during the forward pass inside.

    The layer's first pass also finds its sites, so that no pass is spent on that alone.
    `length` tells how many tokens the layer is working on: a text, or a part of it. `leave`: which
    weights are not wanted.
    """
    finder = _InputSiteFinder(layer, sites, pick, length, leave)
    observer = ExpertsObserver(finder.routed, finder.inner)
    with observe_experts(observer), WeightProductHook(layer, finder.product):
        yield


def same_tensor(left: Tensor, right: Tensor) -> bool:
    """Whether two views begin at the same memory and hold as many numbers."""
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()
