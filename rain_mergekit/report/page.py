"""The report: one page about a calibration, with everything in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import fmean
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import Kind, Site
from rain_mergekit.calibration_file.stream_summary import matching, ranks
from rain_mergekit.calibration_file.summary import FileSummary, summarise
from rain_mergekit.evaluation.task_vectors import Change, TaskVectors, by_module
from rain_mergekit.report import figures, spectra
from rain_mergekit.system.evenly_spaced import with_both_ends

if TYPE_CHECKING:
    from rain_mergekit.evaluation.divergence import Drift
    from rain_mergekit.evaluation.verify import VerificationResult


_CURVES = 5  # sites of one kind in a figure of spectra
_HEADS = {
    "alpha": ("coefficient alpha", 1.0),
    "alignment": ("alignment a", None),
    "leakage": ("leakage u", None),
}


@dataclass(frozen=True)
class Merged:
    """A merged model beside the calibration: what `measure` and `verification` found of it.

    note: why the drift was not measured, or on which texts it was. window: of the think positions.
    """

    path: str
    moved: Mapping[str, Mapping[int, float]]
    measured: VerificationResult | None
    note: str = ""
    window: int = 5

    @property
    def drift(self) -> Drift | None:
        """Of the next tokens, by place."""
        return None if self.measured is None else self.measured.drift


@dataclass(frozen=True)
class Picture:
    """One SVG with the title and the name of the caption in the template."""

    svg: str
    title: str
    caption: str


def render(
    file: CalibrationFile,
    merged: Merged | None = None,
    vectors: TaskVectors | str = "they were not asked for",
) -> str:
    """The page as HTML text.

    vectors: the models' task vectors, or why they are not shown.

    Raises RainError if the file is damaged.
    """
    source = resources.files("rain_mergekit.report") / "page.html"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _markup
    summary = summarise(file)
    page: str = environment.from_string(source.read_text(encoding="utf-8")).render(
        summary=summary,
        merged=merged,
        overview=list(_overview(summary)),
        matched=list(_matched(file)),
        spectra=list(_spectra(file, summary)),
        heads=list(_heads(summary)),
        moved=list(_moved(merged)),
        around=list(_around(merged)),
        layers=list(_layers(merged, summary)),
        vectors=vectors,
        norms=list(_norms(vectors)),
        overlaps=list(_overlaps(vectors)),
        modules=_module_rows(vectors),
        kept=_all(summary.sites, lambda site: site.kept),
        responses=_all(summary.sites, lambda site: site.response),
    )
    return page.lstrip()


def _markup(svg: str) -> Markup:
    """Mark our own SVG as safe; everything else on the page is escaped."""
    return Markup(svg)  # noqa: S704 - serialised by ElementTree, which escapes all text in it


def _all(sites: Sequence[Site], value: Callable[[Site], float | None]) -> list[float]:
    return [number for site in sites if (number := value(site)) is not None]


def _overview(summary: FileSummary) -> Iterator[Picture]:
    """Rank, kept energy and kept response by layer."""
    quantities: tuple[tuple[str, str, Callable[[Site], float | None]], ...] = (
        ("rank", "rank", lambda site: site.rank),
        ("share", "rank / width", lambda site: site.rank / site.width),
        ("kept", "kept energy", lambda site: site.kept),
        ("response", "kept response energy", lambda site: site.response),
    )
    for name, what, value in quantities:
        rows = {_name(kind): _means(summary.sites, kind, value) for kind in summary.kinds}
        filled = {kind: row for kind, row in rows.items() if row}
        if filled:
            svg = figures.lines(f"o-{name}", what, filled)
            yield Picture(svg, f"{what[0].upper()}{what[1:]} by layer", name)


def _matched(file: CalibrationFile) -> Iterator[Picture]:
    """Of stream matching: errors by layer and group, and the rank of each module by layer."""
    from rain_mergekit.report import figures  # noqa: PLC0415 - an extra

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


def _name(kind: Kind) -> str:
    return " ".join(kind.modules) or kind.name


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


def _spectra(file: CalibrationFile, summary: FileSummary) -> Iterator[Picture]:
    """For each kind of site: its singular values, and its response energies."""
    by_response = summary.settings.get("rank_by") == "response_energy"
    makers = (
        ("singular", "singular value / largest", spectra.singular),
        ("response", "response energy / largest", spectra.response),
    )
    for index, kind in enumerate(summary.kinds):
        sites = with_both_ends([site for site in summary.sites if site.kind == kind.name], _CURVES)
        for name, what, make in makers:
            curves = [make(file, site, by_response=by_response) for site in sites]
            found = [curve for curve in curves if curve is not None]
            if found:
                svg = figures.spectrum(f"s{index}-{name}", found, what, _name(kind))
                yield Picture(svg, f"Input of {_name(kind)}", name)


def _heads(summary: FileSummary) -> Iterator[Picture]:
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


def _moved(merged: Merged | None) -> Iterator[Picture]:
    if merged is not None and merged.moved:
        svg = figures.lines("m-moved", "change / weight (norms)", merged.moved)
        yield Picture(svg, "How far the weights moved", "moved")


def _around(merged: Merged | None) -> Iterator[Picture]:
    """The drift of the next token by distance from the markers."""
    if merged is None or merged.measured is None:
        return
    found, width = merged.measured.around, merged.window
    sides = (("open", found.open, (0, width)), ("close", found.close, (-width, 0)))
    for name, values, window in sides:
        if values:
            svg = figures.around(f"d-{name}", f"tokens from the {name} marker", values, window)
            yield Picture(svg, f"Drift around the {name} marker", name)


def _layers(merged: Merged | None, summary: FileSummary) -> Iterator[Picture]:
    """The drift of the features at think positions, by site and layer."""
    if merged is None or merged.measured is None:
        return
    names = {kind.name: _name(kind) for kind in summary.kinds}
    rows: dict[str, dict[int, float]] = {}
    for layer, sites in enumerate(merged.measured.layers):
        for site, found in sites.items():
            name = names.get(site, site.rpartition(".")[2])
            rows.setdefault(name, {})[layer] = 100 * found.relative
    if rows:
        svg = figures.lines("d-layers", "drift, percent", rows)
        yield Picture(svg, "Drift of the features at think positions", "layers")


def _norms(vectors: TaskVectors | str) -> Iterator[Picture]:
    """The task vector before and after, and what is left of it."""
    quantities: tuple[tuple[str, str, Callable[[Change], float | None]], ...] = (
        ("before", "norm of the task vector", lambda change: change.before),
        ("after", "norm of what is merged", lambda change: change.after),
        ("left", "merged / task vector (norms)", _left),
    )
    for name, what, value in quantities:
        rows = by_module(vectors.changes, value) if isinstance(vectors, TaskVectors) else {}
        if rows:
            yield Picture(figures.lines(f"t-{name}", what, rows), _NORMS[name], name)


_NORMS = {
    "before": "The task vector, before",
    "after": "What is merged of it at strength 1",
    "left": "What the projection leaves",
}


def _left(change: Change) -> float | None:
    return change.after / change.before if change.before else None


def _overlaps(vectors: TaskVectors | str) -> Iterator[Picture]:
    """How much the two task vectors' principal subspaces share, by layer."""
    sides: tuple[tuple[str, str, Callable[[Change], float | None]], ...] = (
        ("right", "input side", lambda c: c.overlap.right if c.overlap else None),
        ("left", "output side", lambda c: c.overlap.left if c.overlap else None),
    )
    for name, side, value in sides:
        rows = by_module(vectors.changes, value) if isinstance(vectors, TaskVectors) else {}
        if rows:
            svg = figures.lines(f"p-{name}", f"overlap, {side}", rows)
            yield Picture(svg, f"Shared principal directions, {side}", name)


@dataclass(frozen=True)
class ModuleRow:
    """Means of one module over the layers; overlaps with what chance would give."""

    name: str
    before: float
    after: float
    left: float | None
    right: float | None
    chance_left: float | None
    chance_right: float | None


def _module_rows(vectors: TaskVectors | str) -> list[ModuleRow]:
    if not isinstance(vectors, TaskVectors):
        return []
    found: dict[str, list[Change]] = {}
    for change in vectors.changes:
        found.setdefault(change.module, []).append(change)
    return [_module_row(name, group) for name, group in found.items()]


def _module_row(name: str, group: Sequence[Change]) -> ModuleRow:
    shared = [change.overlap for change in group if change.overlap is not None]
    return ModuleRow(
        name=name,
        before=fmean(change.before for change in group),
        after=fmean(change.after for change in group),
        left=fmean(o.left for o in shared) if shared else None,
        right=fmean(o.right for o in shared) if shared else None,
        chance_left=fmean(o.chance_left for o in shared) if shared else None,
        chance_right=fmean(o.chance_right for o in shared) if shared else None,
    )
