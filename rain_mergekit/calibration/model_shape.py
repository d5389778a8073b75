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

    def memory(self, itemsize: int) -> int:
        """One layer in the forward type, and one matrix of each other model, as stored, in bytes.

        Or, once no layer is needed any more, the output heads of both.
        """
        kept = sum(n for n in self.experts if stays_stored(n, itemsize, self.stored_itemsize))
        left = self.layer_parameters - self.apart
        kept = 0 if self.apart else kept
        converted = (left - kept) * itemsize + kept * self.stored_itemsize
        layer = converted + 2 * self.largest_matrix * self.stored_itemsize
        return max(layer, 2 * self.vocabulary * self.hidden * self.stored_itemsize)

    @property
    def waiting(self) -> int:
        """Bytes of a layer that is read ahead, as it is stored."""
        return (self.layer_parameters - self.apart) * self.stored_itemsize

    @property
    def apart(self) -> int:
        """Weights of a layer that are read when they are used: those of all experts, or none."""
        count = sum(self.experts)
        return count if beyond_budget(count * self.stored_itemsize) else 0

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
