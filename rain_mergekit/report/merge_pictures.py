"""The report's pictures of a merged model: how far it moved, and how far its outputs drifted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rain_mergekit.calibration_file.summary import FileSummary
from rain_mergekit.report import figures
from rain_mergekit.report.picture import Picture, module_names

if TYPE_CHECKING:
    from rain_mergekit.evaluation.divergence import Drift
    from rain_mergekit.evaluation.verify import VerificationResult


@dataclass(frozen=True)
class Merged:
    """A merged model beside the calibration: how far it moved, and what verification measured.

    moved: by module and layer, the norm of the change over the norm of the weight. note: why the
    drift was not measured, or on which texts it was. window: tokens protected beside each marker.
    """

    path: str
    moved: Mapping[str, Mapping[int, float]]
    measured: VerificationResult | None
    note: str = ""
    window: int = 5

    @property
    def drift(self) -> Drift | None:
        """The drift of the next-token distributions, by place."""
        return None if self.measured is None else self.measured.drift


def moved(merged: Merged | None) -> Iterator[Picture]:
    """Norm of each module's change over the norm of its weight, by layer."""
    if merged is not None and merged.moved:
        svg = figures.lines("m-moved", "change / weight (norms)", merged.moved)
        yield Picture(svg, "How far the weights moved", "moved")


def around(merged: Merged | None) -> Iterator[Picture]:
    """The drift of the next token by distance from the markers."""
    if merged is None or merged.measured is None:
        return
    found, width = merged.measured.around, merged.window
    sides = (("open", found.open, (0, width)), ("close", found.close, (-width, 0)))
    for name, values, window in sides:
        if values:
            svg = figures.around(f"d-{name}", f"tokens from the {name} marker", values, window)
            yield Picture(svg, f"Drift around the {name} marker", name)


def layers(merged: Merged | None, summary: FileSummary) -> Iterator[Picture]:
    """The drift of the features at think positions, by site and layer."""
    if merged is None or merged.measured is None:
        return
    names = {kind.name: module_names(kind) for kind in summary.kinds}
    rows: dict[str, dict[int, float]] = {}
    for layer, sites in enumerate(merged.measured.layers):
        for site, found in sites.items():
            name = names.get(site, site.rpartition(".")[2])
            rows.setdefault(name, {})[layer] = 100 * found.relative
    if rows:
        svg = figures.lines("d-layers", "drift, percent", rows)
        yield Picture(svg, "Drift of the features at think positions", "layers")
