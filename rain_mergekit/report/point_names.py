"""Names beside the points of a figure, where neither another name nor a point is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SIZE = 9.0  # of the letters, in points; all lengths here are in points
_LETTER = 0.6  # width of a letter as a part of its size, on average
_GAP, _LINE, _DOT = 5.0, 12.0, 4.0
_ROWS = 5  # so many lines above and below are tried


@dataclass(frozen=True)
class Box:
    """A rectangle, its left lower corner first."""

    x: float
    y: float
    wide: float
    high: float

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.x + self.wide, other.x + other.wide) - max(self.x, other.x)
        up = min(self.y + self.high, other.y + other.high) - max(self.y, other.y)
        return max(across, 0.0) * max(up, 0.0)


def name_points(
    axes: Any, names: Sequence[tuple[str, str]], points: Sequence[tuple[float, float]]
) -> None:
    """Write each name beside its point, and a thin line to it where it had to go further.

    names: with the point's colour, which tells whose name it is. The axes' limits must be final.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()
    scale = 72.0 / figure.dpi
    found = [axes.transData.transform(point) * scale for point in points]
    corner, size = axes.bbox.p0 * scale, axes.bbox.size * scale
    frame = Box(*map(float, corner), *map(float, size))
    boxes = places([(float(x), float(y)) for x, y in found], [name for name, _ in names], frame)
    for (name, colour), point, (x, y), box in zip(names, points, found, boxes, strict=True):
        far = abs(box.y + box.high / 2 - y) > _LINE
        note = axes.annotate(
            name,
            point,
            (box.x - x, box.y - y),
            textcoords="offset points",
            fontsize=SIZE,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8} if far else None,
        )
        note.set_in_layout(False)  # the axes keep their size


def places(points: Sequence[tuple[float, float]], names: Sequence[str], frame: Box) -> list[Box]:
    """A box for each name: the first of those around its point that covers nothing, else least."""
    dots = [Box(x - _DOT, y - _DOT, 2 * _DOT, 2 * _DOT) for x, y in points]
    taken: list[Box] = []
    for (x, y), name in zip(points, names, strict=True):
        wide = _LETTER * SIZE * len(name)
        tried = [Box(x + left, y + up, wide, SIZE) for left, up in _offsets(wide)]
        costs = [_cost(box, [*taken, *dots], frame) for box in tried]
        taken.append(tried[costs.index(min(costs))])
    return taken


def _offsets(wide: float) -> Iterator[tuple[float, float]]:
    """From the point to the name's left lower corner: near and right first."""
    for row in range(_ROWS):
        for up in (_GAP + row * _LINE, -_GAP - SIZE - row * _LINE):
            yield from ((_GAP, up), (-_GAP - wide, up), (-wide / 2, up))


def _cost(box: Box, others: Sequence[Box], frame: Box) -> float:
    outside = box.wide * box.high - box.shared(frame)
    return outside + sum(box.shared(other) for other in others)
