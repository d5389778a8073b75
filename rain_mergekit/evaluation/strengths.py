"""Answers of one merge at several strengths: curves over lambda, and which strengths are best."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.answer_files import AnswerSet
from rain_mergekit.evaluation.answer_summary import means
from rain_mergekit.evaluation.sweep import AUTHOR, REPORT, folder_name
from rain_mergekit.system.json_samples import StrPath, read_json
from rain_mergekit.system.untrusted_input import finite_number

_NAME = re.compile(r"lambda-(-?\d[\w.+-]*)$")
# What a merge is for, the first of them that the prompts can show.
_QUALITIES = ("both", "followed", "correct", "whole")


@dataclass(frozen=True)
class Strength:
    """The answers at one lambda. l_think: the divergence that `sweep` measured, None: unknown."""

    name: str
    strength: float
    l_think: float | None
    means: Mapping[str, float]


def read_divergences(path: StrPath) -> dict[str, float]:
    """L_think by the name of the model's folder, from `sweep.json` or the folder that holds it.

    RainError if `mergekit-rain sweep` has not written it.
    """
    place = Path(path)
    place = place / REPORT if place.is_dir() else place
    content = read_json(place)
    known: dict[Any, Any] = content if isinstance(content, dict) else {}
    rows = known.get("rows")
    if not isinstance(rows, list) or known.get("created_by") != AUTHOR:
        raise RainError(f"{place}: is not a table of `{AUTHOR}`")
    try:
        return {folder_name(float(r["strength"])): float(r["drift"]["think"]["mean"]) for r in rows}
    except (KeyError, TypeError, ValueError):
        raise RainError(f"{place}: is damaged; run `{AUTHOR}` again") from None


def read_verified(path: StrPath) -> float:
    """L_think from what `mergekit-rain verify --json` has printed.

    RainError if it is something else, or no texts were given to `verify`.
    """
    found: Any = read_json(path)
    for name in ("divergence", "drift", "think", "mean"):
        found = found.get(name) if isinstance(found, dict) else None
    number = finite_number(found)
    if number is None:
        raise RainError(
            f"{path}: holds no L_think; keep there what `mergekit-rain verify --json` prints with "
            "--reasoning-data"
        )
    return number


def strengths(sets: Sequence[AnswerSet], divergences: Mapping[str, float]) -> list[Strength]:
    """The sets whose file is called `lambda-NUMBER`, in the order of the numbers."""
    found = []
    for one in sets:
        match = _NAME.search(Path(one.path).stem)
        if match is not None and (number := finite_number(match[1])) is not None:
            known = divergences.get(folder_name(number))
            found.append(Strength(one.name, number, known, means(one)))
    return sorted(found, key=lambda one: one.strength)


def quality(found: Sequence[Strength]) -> str:
    """The metric by which strengths are judged; the first in the order above that all have."""
    return next((n for n in _QUALITIES if all(n in one.means for one in found)), "whole")


def best(found: Sequence[Strength]) -> set[str]:
    """Names of those that no other beats in quality without losing in L_think.

    Where a divergence is not known, tokens take its place.
    """
    name, known = quality(found), all(one.l_think is not None for one in found)
    points = {
        one.name: (one.l_think if known and one.l_think is not None else one.means["tokens"],
                   one.means[name])
        for one in found
    }  # fmt: skip
    line = set(pareto(list(points.values()), less=True))
    return {name for name, point in points.items() if point in line}


def pareto(points: Sequence[tuple[float, float]], *, less: bool) -> list[tuple[float, float]]:
    """The points that no other beats in one coordinate without losing in the other, in order.

    The second coordinate is better the larger it is; the first too, or with `less` the smaller.
    """
    sign = -1.0 if less else 1.0
    most, found = float("-inf"), []
    for x, y in sorted(points, key=lambda point: (-sign * point[0], -point[1])):
        if y > most:
            most = y
            found.append((x, y))
    return sorted(found)
