"""What a calibration file says of stream matching: errors by layer and group, ranks by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import ValueRange, locate, module_order, value_range
from rain_mergekit.system.wording import counted


@dataclass(frozen=True)
class MatchedExperts:
    """The routed experts of one module: how many fitted tokens each of them saw.

    few: experts that stay as they are, with too few tokens. worse: by weight, those that stay as
    they are because every change would be worse on the texts that were held out.
    """

    name: str
    tokens: tuple[int, ...]
    few: tuple[int, ...]
    worse: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MatchedLayer:
    """Relative distance of the merged hidden states from their teacher's after one layer.

    By group of tokens: on the texts that were fitted, and on those that were held out.
    """

    name: str
    fitted: Mapping[str, float]
    held_out: Mapping[str, float]
    experts: tuple[MatchedExperts, ...] = ()


@dataclass(frozen=True)
class MatchedModule:
    """The changes of one module over all layers.

    explained: the share of the full-rank solution that the rank keeps. fitted: the share of the
    targets' energy that the change explains. epsilon: the ridge penalties; None in older files.
    """

    name: str
    weights: int
    rank: ValueRange
    explained: ValueRange
    fitted: ValueRange
    epsilon: ValueRange | None


@dataclass(frozen=True)
class Matching:
    """Stream matching as a calibration file records it.

    start: the share of W_I - W_R that weights have beside their changes, in `started` of all.
    """

    layers: tuple[MatchedLayer, ...]
    modules: tuple[MatchedModule, ...]
    start: float = 0.0
    started: int = 0
    weights: int = 0

    @property
    def origin(self) -> str:
        """Where the changes are added to, as a phrase; nothing where that is W_R itself."""
        if not self.started:
            return ""
        share = f"{self.start:g} (W_instruct − W_reasoning)"  # noqa: RUF001
        some = f" in {self.started} of {counted(self.weights, 'weight')}"
        return f"added to W_reasoning + {share}{some * (self.started < self.weights)}"

    @property
    def mean_rank(self) -> float:
        """Over all changed weights."""
        total = sum(module.rank.mean * module.weights for module in self.modules)
        return total / max(1, sum(module.weights for module in self.modules))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of tokens, in the order of the file."""
        return tuple(dict.fromkeys(group for layer in self.layers for group in layer.fitted))


def matching(file: CalibrationFile) -> Matching | None:
    """Read the header; None if the file holds no stream matching."""
    section = file.header.get("streams")
    if section is None:
        return None
    layers = tuple(
        MatchedLayer(str(one["name"]), dict(one["fitted"]), dict(one["held_out"]), _experts(one))
        for one in section["layers"]
    )
    starts = [plan.start for plan in file.tensors.values() if plan.start]
    start, count = max(starts, default=0.0), len(file.tensors)
    return Matching(layers, _modules(file), start, len(starts), count)


def _experts(layer: Mapping[str, Any]) -> tuple[MatchedExperts, ...]:
    return tuple(
        MatchedExperts(
            name=f"{layer['name']}.{module}",
            tokens=tuple(one["tokens"]),
            few=tuple(one["few"]),
            worse={name: tuple(found) for name, found in one["worse"].items()},
        )
        for module, one in (layer.get("experts") or {}).items()
    )


def ranks(file: CalibrationFile) -> dict[str, dict[int, float]]:
    """The rank of each change by module and layer, the mean of the experts'."""
    found: dict[str, dict[int, list[float]]] = {}
    for name in file.tensors:
        layer, module = locate(name.removesuffix(".weight"))
        fit = file.header["tensors"][name].get("fit")
        if isinstance(fit, dict) and layer is not None:
            found.setdefault(module, {}).setdefault(layer, []).append(fit["rank"])
    return {
        module: {layer: fmean(ranks) for layer, ranks in sorted(found[module].items())}
        for module in sorted(found, key=module_order)
    }


def _modules(file: CalibrationFile) -> tuple[MatchedModule, ...]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in file.tensors:
        fit = file.header["tensors"][name].get("fit")
        if isinstance(fit, dict):
            module = locate(name.removesuffix(".weight"))[1]
            found.setdefault(module, []).append(fit)
    modules = [
        MatchedModule(
            name=name,
            weights=len(fits),
            rank=value_range([fit["rank"] for fit in fits]),
            explained=value_range([fit["explained"] for fit in fits]),
            fitted=value_range([fit["fitted"] for fit in fits]),
            epsilon=_penalties(fits),
        )
        for name, fits in found.items()
    ]
    return tuple(sorted(modules, key=lambda module: module_order(module.name)))


def _penalties(fits: Sequence[Mapping[str, Any]]) -> ValueRange | None:
    found = [fit["epsilon"] for fit in fits if "epsilon" in fit]
    return value_range(found) if found else None
