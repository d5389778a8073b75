"""The page of `mergekit-rain diff`: how far each kind of tensor moved, layer by layer."""

from __future__ import annotations

import math

from rain_mergekit.evaluation.model_diff import ModelDiff, TensorChange, by_layer
from rain_mergekit.report import figures
from rain_mergekit.report.picture import Picture
from rain_mergekit.report.templates import fill

_MOST = 200  # rows of the table


def render(first: str, second: str, found: ModelDiff) -> str:
    """The page as HTML text; `first` and `second` are what the models are called."""
    largest = sorted((one for one in found.changes if not one.equal), key=_size, reverse=True)
    return fill(
        "diff.html",
        title=f"{second}, changed from {first}",
        first=first,
        second=second,
        found=found,
        equal=sum(one.equal for one in found.changes),
        pictures=_pictures(found),
        largest=largest[:_MOST],
        left_out=max(0, len(largest) - _MOST),
    )


def _size(one: TensorChange) -> float:
    return one.relative if math.isfinite(one.relative) else 0.0


def _pictures(found: ModelDiff) -> list[Picture]:
    """Matrices and the rest (norms, biases) apart: their changes are of other sizes."""
    rows = {kind: by_layer(group) for kind, group in found.kinds.items()}
    drawn = {kind: {x: 100 * y for x, y in row.items()} for kind, row in rows.items() if row}
    small = {kind: row for kind, row in drawn.items() if "norm" in kind or "bias" in kind}
    large = {kind: row for kind, row in drawn.items() if kind not in small}
    titles = (("matrices", "Matrices", large), ("others", "Norms and biases", small))
    return [
        Picture(figures.lines(f"d-{name}", "change, percent of the norm", part), title, name)
        for name, title, part in titles
        if part
    ]
