"""The report: one page about a calibration, with everything in it."""

from __future__ import annotations

from importlib import resources

import jinja2
from markupsafe import Markup

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.summary import summarise
from rain_mergekit.evaluation.task_vectors import TaskVectors
from rain_mergekit.report import calibration_pictures, merge_pictures, task_vector_pictures
from rain_mergekit.report.merge_pictures import Merged


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
        overview=list(calibration_pictures.overview(summary)),
        matched=list(calibration_pictures.matched(file)),
        spectra=list(calibration_pictures.spectra(file, summary)),
        heads=list(calibration_pictures.heads(summary)),
        moved=list(merge_pictures.moved(merged)),
        around=list(merge_pictures.around(merged)),
        layers=list(merge_pictures.layers(merged, summary)),
        vectors=vectors,
        norms=list(task_vector_pictures.norms(vectors)),
        overlaps=list(task_vector_pictures.overlaps(vectors)),
        modules=task_vector_pictures.module_rows(vectors),
        kept=calibration_pictures.numbers_of(summary.sites, lambda site: site.kept),
        responses=calibration_pictures.numbers_of(summary.sites, lambda site: site.response),
    )
    return page.lstrip()


def _markup(svg: str) -> Markup:
    """Mark our own SVG as safe; everything else on the page is escaped."""
    return Markup(svg)  # noqa: S704 - serialised by ElementTree, which escapes all text in it
