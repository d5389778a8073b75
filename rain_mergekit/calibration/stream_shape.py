"""What stream matching will meet in a model: the sites of each layer, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rain_mergekit.calibration.estimate_inputs import (
    MapInput,
    experts_share,
    largest_expert,
    map_input,
    of_experts,
    straight,
)
from rain_mergekit.calibration.estimate_site import FLOAT32
from rain_mergekit.calibration.options import MIN_RANK_CAP, MIN_RANK_CAP_EXPERTS
from rain_mergekit.capture.left_alone import routes
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.models.experts import beyond_budget, normalised, stays_stored
from rain_mergekit.models.model_tensors import has_single_experts
from rain_mergekit.models.outline import ModelOutline


@dataclass(frozen=True)
class FittedSite:
    """Linear maps that see the same input.

    Attributes:
        width: d, of the input.
        outputs: d_out of each map.
        before: weights that a token passes up to the end of these maps, from the layer's start.
        reads: whether attention follows.
        experts: how many routed experts have such maps; 0 where they are no experts'.
        share: of the tokens, how many one of these experts sees.
        kept: features of a token that are kept for the fit: the targets, and of experts the inputs.
    """

    width: int
    outputs: tuple[int, ...]
    before: int = 0
    reads: bool = False
    experts: int = 0
    share: float = 1.0
    kept: int = 0

    @property
    def rows(self) -> int:
        """Σ d_out."""
        return sum(self.outputs)

    @property
    def elements_per_rank(self) -> int:
        """What one rank more takes in the two factors of every map."""
        return self.copies * sum(rows + self.width for rows in self.outputs)

    @property
    def copies(self) -> int:
        """How often such maps are fitted: once, or once for each expert."""
        return max(1, self.experts)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        parameters: all of its weights.
        active: those that one token passes; of experts, a share.
        experts: weights of each tensor of routed experts.
        sites: what is fitted, in the order in which it runs.
        single: weights of the largest tensor of one expert; 0 where none can be read alone.
    """

    parameters: int
    active: int
    experts: tuple[int, ...]
    sites: tuple[FittedSite, ...]
    single: int = 0

    def held(self, itemsize: int, stored: int) -> int:
        """Bytes of the filled layer; large tensors of experts stay as they are stored."""
        if self.apart(stored):
            alone = self.single * (itemsize + stored)
            return (self.parameters - sum(self.experts)) * itemsize + alone
        kept = self.kept(itemsize, stored)
        return (self.parameters - kept) * itemsize + kept * stored

    def ahead(self, stored: int) -> int:
        """Bytes of the layer while it waits, as it is stored."""
        return (self.parameters - self.apart(stored)) * stored

    def apart(self, stored: int) -> int:
        """How many weights are read when they are used: those of all experts, or none."""
        count = sum(self.experts)
        return count if self.single and beyond_budget(count * stored) else 0

    def kept(self, itemsize: int, stored: int) -> int:
        """How many weights stay as they are stored."""
        return sum(count for count in self.experts if stays_stored(count, itemsize, stored))

    @property
    def features(self) -> int:
        """Of a token, all that the maps receive and give."""
        return sum(site.width + site.rows for site in self.sites)

    @property
    def widest(self) -> int:
        """The most features that a map gives, all maps of its site together."""
        return max((site.rows for site in self.sites), default=0)

    @classmethod
    def of(
        cls, layer: nn.Module, share: float, *, experts: bool = True, alone: bool = False
    ) -> LayerShape:
        """The shape of one layer; share: of the experts that one token goes through.

        experts: whether these are fitted; alone: whether each can be read without the others.
        """
        sizes = [(n, p.numel() * (share if of_experts(n, p) else 1)) for n, p in _weights(layer)]
        routed = _experts(layer, share, sum(n for _, n in sizes)) if experts else ()
        return cls(
            parameters=sum(parameter.numel() for parameter in layer.parameters()),
            active=int(sum(size for _, size in sizes)),
            experts=tuple(p.numel() for n, p in _weights(layer) if of_experts(n, p)),
            single=largest_expert(layer) if alone else 0,
            sites=(*_sites(layer, dict(sizes)), *routed),
        )


def _weights(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, one) for name, one in layer.named_parameters() if one.dim() > 1]


def _sites(layer: nn.Module, sizes: dict[str, float]) -> Iterator[FittedSite]:
    """The sites in order; sizes: how many numbers of each tensor one token passes, by name."""
    members: dict[MapInput, dict[str, int]] = {}
    for name, parameter in _weights(layer):
        found = map_input(layer, name, parameter, routes)
        if found is not None:
            members.setdefault(found[0], {})[name] = found[1]
    order = list(sizes)
    for seen, rows in members.items():
        end = order.index(list(rows)[-1]) + 1
        before = int(sum(sizes[name] for name in order[:end]))
        outputs = tuple(rows.values())
        yield FittedSite(seen.width, outputs, before, seen.reads, kept=sum(outputs))


def _experts(layer: nn.Module, share: float, passed: float) -> Iterator[FittedSite]:
    """The sites of routed experts, which are fitted last; passed: weights that a token passes.

    Of the first projection the inputs of all models are kept, and of the second one what is to be
    given; see `expert_rows`.
    """
    for name, module in layer.named_modules():
        if not hasattr(module, "is_transposed"):
            continue
        for which, parameter in module.named_parameters(name, recurse=False):
            down = which.endswith("down_proj")
            if not of_experts(which, parameter) or (down and normalised(module)):
                continue
            count, rows, width = straight(module, parameter)
            kept = rows if down else 3 * width
            yield FittedSite(width, (rows,), int(passed), experts=count, share=share, kept=kept)


@dataclass(frozen=True)
class StreamShape:
    """All layers, alike ones counted, and what surrounds them.

    vocabulary: rows of the output head; head: whether it is fitted too.
    """

    layers: tuple[tuple[LayerShape, int], ...]
    hidden: int
    vocabulary: int
    stored_itemsize: int
    model_bytes: int
    head: bool = False

    @classmethod
    def of(cls, outline: ModelOutline, *, experts: bool = True, head: bool = False) -> StreamShape:
        """The shape of a model without weights; no tensor is read.

        experts: whether routed ones are fitted.
        """
        share, alone = experts_share(outline.config), has_single_experts(outline.model)
        layers = (
            LayerShape.of(layer, share, experts=experts, alone=alone) for layer in outline.layers
        )
        counts = Counter(layers)
        return cls(
            layers=tuple(counts.items()),
            hidden=outline.hidden_size,
            vocabulary=int(getattr(outline.config.get_text_config(), "vocab_size", 0)),
            stored_itemsize=outline.stored_itemsize,
            model_bytes=outline.bytes,
            head=head,
        )

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return sum(count for _, count in self.layers)

    @property
    def elements_per_rank(self) -> int:
        """What one rank more takes in the factors of all weights."""
        return self.head * (self.vocabulary + self.hidden) + sum(
            count * site.elements_per_rank for layer, count in self.layers for site in layer.sites
        )

    @property
    def sides(self) -> tuple[int, ...]:
        """The smaller side of each fitted weight, beyond which its rank cannot go."""
        sites = [site for layer, _ in self.layers for site in layer.sites]
        return tuple(min(rows, site.width) for site in sites for rows in site.outputs)

    def rank_within(self, settings: RainSettings) -> int:
        """The largest rank of a change: as given, or what the size budget allows.

        Experts are so many that the lower bound of other models would decide in their place.
        """
        if settings.max_rank is not None:
            return settings.max_rank
        routed = any(site.experts for layer, _ in self.layers for site in layer.sites)
        least = MIN_RANK_CAP_EXPERTS if routed else MIN_RANK_CAP
        room = settings.size_budget * self.model_bytes
        return max(least, int(room / (max(1, self.elements_per_rank) * FLOAT32)))

    def bytes_at(self, rank: int) -> int:
        """The factors of all weights at that rank, or at their own where they have fewer."""
        elements = sum(
            count * site.copies * min(rank, rows, site.width) * (rows + site.width)
            for layer, count in self.layers
            for site in layer.sites
            for rows in site.outputs
        )
        if self.head:
            elements += min(rank, self.hidden) * (self.vocabulary + self.hidden)
        return elements * FLOAT32
