"""The report: one page about a calibration, with everything in it."""

from __future__ import annotations

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.summary import summarise
from rain_mergekit.evaluation.task_vectors import TaskVectors
from rain_mergekit.report import calibration_pictures, merge_pictures, task_vector_pictures
from rain_mergekit.report.merge_pictures import Merged
from rain_mergekit.report.templates import fill


def render(
    file: CalibrationFile,
    merged: Merged | None = None,
    vectors: TaskVectors | str = "they were not asked for",
) -> str:
    """The page as HTML text.

    vectors: the models' task vectors, or why they are not shown.

    Raises RainError if the file is damaged.
    """
    summary = summarise(file)
    return fill(
        "page.html",
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
