"""The report's pictures and table of the task vectors, before and after the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from rain_mergekit.evaluation.task_vectors import Change, TaskVectors, by_module
from rain_mergekit.report import figures
from rain_mergekit.report.picture import Picture


def norms(vectors: TaskVectors | str) -> Iterator[Picture]:
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


def overlaps(vectors: TaskVectors | str) -> Iterator[Picture]:
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


def module_rows(vectors: TaskVectors | str) -> list[ModuleRow]:
    """One row a module; none where the task vectors were not measured."""
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
