"""The entries of experts in a calibration file: of each alone, or of all in one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rain_mergekit.models.merge_names import Target

Sources: TypeAlias = "dict[str, Tensor | Callable[[], Tensor]]"


def expert_entries(
    name: str, entry: Mapping[str, Any], targets: Sequence[Target], sources: Sources
) -> dict[str, dict[str, Any]]:
    """The entries of one weight of the model by the names of the merge.

    entry: with `experts`, the factors of each that has some. targets: what the merge calls the
    weight; none where it leaves it out. sources: what is stored, by key; changed to what the
    entries ask for.
    """
    changes: Mapping[str, Any] = entry["experts"]
    plain = {key: value for key, value in entry.items() if key != "experts"}
    targets = targets or (Target(name),)
    if any(target.expert is not None for target in targets):
        found = {
            target.name: _single(plain, changes[str(target.expert)], target, sources)
            for target in targets
            if str(target.expert) in changes
        }
        used = {entry["a"] for entry in found.values()}
        for change in changes.values():
            if change["a"] not in used:  # divided among several weights
                del sources[change["a"]]
        return found
    (target,) = targets
    return {target.name: _packed(name, plain, target, changes, sources)}


def _single(
    plain: Mapping[str, Any], change: Mapping[str, Any], target: Target, sources: Sources
) -> dict[str, Any]:
    """One expert alone; of a weight that holds two projections, the rows of one of them."""
    a, rows = change["a"], target.shape[0]
    if plain["shape"][-3 - plain["input_axis"]] != rows:
        whole, a = sources[a], f"{a}.{target.first}"
        sources[a] = partial(_rows, whole, target.first, rows)
    return {**plain, **change, "a": a, "shape": list(target.shape)}


def _packed(
    name: str,
    plain: Mapping[str, Any],
    target: Target,
    changes: Mapping[str, Any],
    sources: Sources,
) -> dict[str, Any]:
    """All experts in one weight: their factors beside one another, in order."""
    shape, axis = plain["shape"], plain["input_axis"]
    if target.shape:
        shape, axis = list(target.shape), -3 - axis
    order = sorted(changes, key=int)
    ranks = [
        int(changes[str(e)]["fit"]["rank"]) if str(e) in changes else 0 for e in range(shape[0])
    ]
    keys = {}
    for kind in ("a", "b"):
        parts = [sources.pop(changes[expert][kind]) for expert in order]
        keys[kind] = f"change.{name}.{kind}"
        sources[keys[kind]] = _beside(parts)
    fit = _mean([changes[expert]["fit"] for expert in order])
    return {**plain, **keys, "shape": shape, "input_axis": axis, "ranks": ranks, "fit": fit}


def fits(tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """How each change was fitted, by name, of layers' entries; an expert's with its number."""
    for name, entry in tensors.items():
        if "fit" in entry:
            yield name, entry["fit"]
        for expert, change in entry.get("experts", {}).items():
            yield f"{name}, expert {expert}", change["fit"]


def _beside(parts: Sequence[Tensor | Callable[[], Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.cat([_value(part) for part in parts], dim=1)


def _rows(source: Tensor | Callable[[], Tensor], first: int, count: int) -> Tensor:
    return _value(source)[first : first + count].contiguous()


def _value(source: Tensor | Callable[[], Tensor]) -> Tensor:
    return source if isinstance(source, Tensor) else source()


def _mean(fits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the experts that have a change."""
    return {name: fmean(fit[name] for fit in fits) for name in fits[0]}
