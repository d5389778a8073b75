"""The report's pictures of a calibration file: ranks, stream matching, spectra, heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import Kind, Site
from rain_mergekit.calibration_file.stream_summary import matching, ranks
from rain_mergekit.calibration_file.summary import FileSummary
from rain_mergekit.report import figures
from rain_mergekit.report import spectra as curves_of
from rain_mergekit.report.picture import Picture, module_names
from rain_mergekit.system.evenly_spaced import with_both_ends

_CURVES = 5  # sites of one kind in a figure of spectra
_HEADS = {
    "alpha": ("coefficient alpha", 1.0),
    "alignment": ("alignment a", None),
    "leakage": ("leakage u", None),
}


def overview(summary: FileSummary) -> Iterator[Picture]:
    """Rank, kept energy and kept response by layer."""
    quantities: tuple[tuple[str, str, Callable[[Site], float | None]], ...] = (
        ("rank", "rank", lambda site: site.rank),
        ("share", "rank / width", lambda site: site.rank / site.width),
        ("kept", "kept energy", lambda site: site.kept),
        ("response", "kept response energy", lambda site: site.response),
    )
    for name, what, value in quantities:
        rows = {module_names(kind): _means(summary.sites, kind, value) for kind in summary.kinds}
        filled = {kind: row for kind, row in rows.items() if row}
        if filled:
            svg = figures.lines(f"o-{name}", what, filled)
            yield Picture(svg, f"{what[0].upper()}{what[1:]} by layer", name)


def matched(file: CalibrationFile) -> Iterator[Picture]:
    """Pictures of stream matching: errors by layer and group, and ranks by module and layer."""
    found = matching(file)
    if found is None:
        return
    for name, title in (("fitted", "texts that were fitted"), ("held_out", "held-out texts")):
        rows = {
            group: {
                layer: 100 * errors[group]
                for layer, one in enumerate(found.layers)
                if group in (errors := getattr(one, name))
            }
            for group in found.groups
        }
        if filled := {group: row for group, row in rows.items() if row}:
            svg = figures.lines(f"f-{name}", "distance from the teacher, percent", filled)
            yield Picture(svg, f"Distance from the teacher, {title}", name)
    yield Picture(figures.lines("f-rank", "rank", ranks(file)), "Rank of the changes", "rank")


def _means(
    sites: Sequence[Site], kind: Kind, value: Callable[[Site], float | None]
) -> dict[int, float]:
    """By layer; several sites of one kind in a layer (experts) are averaged.

    What is in no layer comes as one more after the last.
    """
    found: dict[int, list[float]] = {}
    end = max((site.layer + 1 for site in sites if site.layer is not None), default=0)
    for site in sites:
        if site.kind == kind.name and (number := value(site)) is not None:
            found.setdefault(end if site.layer is None else site.layer, []).append(number)
    return {layer: sum(row) / len(row) for layer, row in sorted(found.items())}


def spectra(file: CalibrationFile, summary: FileSummary) -> Iterator[Picture]:
    """For each kind of site: its singular values, and its response energies."""
    by_response = summary.settings.get("rank_by") == "response_energy"
    makers = (
        ("singular", "singular value / largest", curves_of.singular),
        ("response", "response energy / largest", curves_of.response),
    )
    for index, kind in enumerate(summary.kinds):
        sites = with_both_ends([site for site in summary.sites if site.kind == kind.name], _CURVES)
        for name, what, make in makers:
            curves = [make(file, site, by_response=by_response) for site in sites]
            found = [curve for curve in curves if curve is not None]
            if found:
                svg = figures.spectrum(f"s{index}-{name}", found, what, module_names(kind))
                yield Picture(svg, f"Input of {module_names(kind)}", name)


def heads(summary: FileSummary) -> Iterator[Picture]:
    """The coefficient, alignment and leakage of each attention head."""
    for name, (what, middle) in _HEADS.items():
        values = [v for layer in summary.layers for v in layer.heads.get(name, ())]
        finite = [v for v in values if math.isfinite(v)]
        if not finite:
            continue
        svg = figures.heat(f"h-{name}", what, summary.layers, name, middle)
        yield Picture(svg, f"{what[0].upper()}{what[1:]}, layer by head", name)
        if name == "alpha":
            svg = figures.histogram("h-histogram", what, finite, _bounds(summary))
            yield Picture(svg, "How often each coefficient occurs", "histogram")


def _bounds(summary: FileSummary) -> list[float]:
    found = [summary.settings.get(name) for name in ("alpha_min", "alpha_max")]
    return [float(v) for v in found if isinstance(v, (int, float)) and abs(v) < 1e6]


def numbers_of(sites: Sequence[Site], value: Callable[[Site], float | None]) -> list[float]:
    """The numbers of the sites that have one."""
    return [number for site in sites if (number := value(site)) is not None]
