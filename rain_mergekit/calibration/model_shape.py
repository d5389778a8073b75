"""The shapes that the estimate of a calibration rests on."""

from __future__ import annotations

from dataclasses import dataclass

from rain_mergekit.calibration.estimate_site import SiteShape
from rain_mergekit.models.experts import beyond_budget, stays_stored


@dataclass(frozen=True)
class ModelShape:
    """The largest decoder layer and what surrounds it."""

    layers: int
    layer_parameters: int
    largest_matrix: int
    hidden: int
    heads_width: int
    ffn: int
    stored_itemsize: int
    model_bytes: int
    # In the order in which they are solved; by default those of a plain decoder: attention (key and
    # value heads counted as query heads), its output, MLP, its output.
    sites: tuple[SiteShape, ...] = ()
    # Rows of the output head where it is merged too, else 0.
    vocabulary: int = 0
    # Of the layer's weights those that one token passes; 0: all of them.
    active: int = 0
    # Weights of each tensor of routed experts; large ones stay in memory as they are stored.
    experts: tuple[int, ...] = ()
    # Of one expert, of its largest tensor; 0 where none can be read alone.
    single: int = 0
    # Of the layer that has most besides its experts.
    besides: int = 0

    def memory(self, itemsize: int) -> int:
        """One layer in the forward type, and one matrix of each other model, as stored, in bytes.

        Or, once no layer is needed any more, the output heads of both.
        """
        stored = self.stored_itemsize
        if self.apart:
            layer = self.besides * itemsize + self.single * (itemsize + stored)
        else:
            kept = sum(n for n in self.experts if stays_stored(n, itemsize, stored))
            layer = (self.layer_parameters - kept) * itemsize + kept * stored
        layer += 2 * self.largest_matrix * stored
        return max(layer, 2 * self.vocabulary * self.hidden * stored)

    @property
    def waiting(self) -> int:
        """Bytes of a layer that is read ahead, as it is stored."""
        return (self.besides if self.apart else self.layer_parameters) * self.stored_itemsize

    @property
    def apart(self) -> bool:
        """Whether experts are read when they are used."""
        return self.single > 0 and beyond_budget(sum(self.experts) * self.stored_itemsize)

    @property
    def passed(self) -> int:
        """Weights of a layer that one token passes."""
        return self.active or self.layer_parameters

    @property
    def all_sites(self) -> tuple[SiteShape, ...]:
        """The input sites as given, or those of a plain decoder."""
        return self.sites or (
            SiteShape(self.hidden, 3 * self.heads_width, reads=True),
            SiteShape(self.heads_width, self.hidden),
            SiteShape(self.hidden, 2 * self.ffn),
            SiteShape(self.ffn, self.hidden),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the input sites."""
        return tuple(site.width for site in self.all_sites)
