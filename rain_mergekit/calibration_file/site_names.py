"""The kind and the layer of an input site, read from its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rain_mergekit.calibration_file.reader import CalibrationFile

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ValueRange:
    """Mean and extremes of a quantity over layers."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Site:
    """One input site; `layer` and `kind` are read from its name, None where it has no number."""

    name: str
    kind: str
    layer: int | None
    width: int
    rank: int
    kept: float | None
    response: float | None
    capped: bool


@dataclass(frozen=True)
class Kind:
    """The sites of one kind over all layers; `modules` are those that receive its input."""

    name: str
    modules: tuple[str, ...]
    sites: int
    width: ValueRange
    rank: ValueRange
    kept: ValueRange | None
    response: ValueRange | None
    capped: int


def locate(name: str) -> tuple[int | None, str]:
    """Layer and kind of a site or tensor: `model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`.

    The first whole number in the name is the layer; later ones (experts) become `*`.
    """
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if re.fullmatch(r"[0-9]{1,6}", part)]
    if places:
        tail = ["*" if part.isdecimal() else part for part in parts[places[0] + 1 :]]
        return int(parts[places[0]]), ".".join(tail) or name
    found = re.fullmatch(r"(.*?)([0-9]{1,6})[._/-]?(.*)", name, re.DOTALL)
    if found is None:
        return None, name
    return int(found[2]), found[3] or found[1] or name


def site_modules(file: CalibrationFile) -> dict[str, tuple[str, ...]]:
    """For each kind of site, the modules (last part of their names) that receive its input."""
    found: dict[str, dict[str, None]] = {}
    for name, plan in file.tensors.items():
        sites = plan.site if isinstance(plan.site, tuple) else (plan.site,)
        module = name.removesuffix(".weight").split(".")[-1]
        for site in sites:
            if site is not None:
                found.setdefault(locate(site)[1], {})[module] = None
    return {kind: tuple(sorted(modules, key=module_order)) for kind, modules in found.items()}


def kinds(sites: Iterable[Site], modules: Mapping[str, tuple[str, ...]]) -> tuple[Kind, ...]:
    """The sites grouped by kind, in the order of a layer's computation where it is known."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.kind, []).append(site)
    found = [_kind(name, group, modules.get(name, ())) for name, group in groups.items()]
    return tuple(sorted(found, key=lambda kind: module_order((kind.modules or (kind.name,))[0])))


def value_range(values: Sequence[float]) -> ValueRange:
    """Mean, smallest and largest of at least one value."""
    return ValueRange(fmean(values), min(values), max(values))


def module_order(module: str) -> tuple[int, str]:
    """A sort key: q to down as a layer computes them, others after them by name."""
    last = module.rsplit(".", 1)[-1]
    return _ORDER.index(last) if last in _ORDER else len(_ORDER), module


def place(site: Site) -> tuple[int, tuple[int, str]]:
    """A sort key: by layer, then as computed; weights outside of layers come last."""
    return sys.maxsize if site.layer is None else site.layer, module_order(site.kind)


def _kind(name: str, sites: Sequence[Site], modules: tuple[str, ...]) -> Kind:
    kept = [site.kept for site in sites if site.kept is not None]
    response = [site.response for site in sites if site.response is not None]
    return Kind(
        name=name,
        modules=modules,
        sites=len(sites),
        width=value_range([site.width for site in sites]),
        rank=value_range([site.rank for site in sites]),
        kept=value_range(kept) if kept else None,
        response=value_range(response) if response else None,
        capped=sum(site.capped for site in sites),
    )
