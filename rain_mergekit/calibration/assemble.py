"""Combine the layers' result files into the calibration file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from rain_mergekit.calibration.expert_entries import Sources, expert_entries
from rain_mergekit.calibration.header import CalibrationHeader, Origin
from rain_mergekit.calibration.layer_file import STORED_DTYPE, LayerResultFile
from rain_mergekit.calibration.stream_warnings import stream_warnings
from rain_mergekit.capture.input_sites import site_name
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.errors import RainError
from rain_mergekit.linalg import coefficients
from rain_mergekit.linalg.coefficients import HeadStatistics
from rain_mergekit.models.head_layout import HeadLayout
from rain_mergekit.models.merge_names import Names, Target

_FEW = 8  # protected tokens of an expert


def assemble(
    origin: Origin,
    parts: Sequence[LayerResultFile],
    names: Names,
    matrices: Sequence[str],
    noted: Sequence[str],
) -> tuple[CalibrationHeader, Sources]:
    """The header of the calibration file and the tensors to be written, by key.

    Args:
        origin: models, data, settings, and how the calibration ran.
        parts: what each layer contributes.
        names: what the merge calls each tensor.
        matrices: all weights of the layers that may multiply features.
        noted: warnings so far.
    """
    sources: Sources = {key: partial(part.read, key) for part in parts for key in part.keys}
    sites = {name: site for part in parts for name, site in part.sites.items()}
    tensors = {name: dict(entry) for part in parts for name, entry in part.tensors.items()}
    layers = _coefficients(parts, origin.settings, tensors, sources)
    left = _untouched(matrices, parts)
    streams = [part.streams for part in parts if part.streams is not None]
    warnings = [*noted, *_warnings(sites, parts, layers, left), *stream_warnings(streams, tensors)]
    warnings += _small_coefficients(layers, sources)
    header = CalibrationHeader(
        origin, left, warnings, sites, _renamed(tensors, names, sources), layers, streams
    )
    return header, sources


def _untouched(names: Sequence[str], parts: Sequence[LayerResultFile]) -> list[str]:
    """The layers' weights that are not merged: routers, convolutions and the like."""
    merged = {name for part in parts for name in part.tensors}
    return [name for name in names if name not in merged]


def used_coefficients(
    statistics: Sequence[HeadStatistics], settings: RainSettings
) -> tuple[list[Tensor], list[Tensor]]:
    """Raw (Eq. 15 before clipping) and used coefficients, n_heads each, one entry a layer."""
    raw = [coefficients.closed_form(item, settings.rho) for item in statistics]
    low, high = settings.alpha_min, settings.alpha_max
    if settings.coefficients == "normalized":
        return raw, coefficients.normalised(raw, low, high)
    return raw, [coefficients.clip(alpha, low, high) for alpha in raw]


def _coefficients(
    parts: Sequence[LayerResultFile],
    settings: RainSettings,
    tensors: dict[str, dict[str, Any]],
    sources: Sources,
) -> list[dict[str, Any]]:
    """Scale vectors of every tensor, and the statistics behind them."""
    measured = [part for part in parts if part.statistics is not None]
    if not measured:
        if settings.coefficients == "off":
            return []
        raise RainError(
            "the model computes no attention that can be observed: set `coefficients: off`"
        )
    raw, used = used_coefficients([p.statistics for p in measured if p.statistics], settings)
    layers: list[dict[str, Any]] = []
    for part, raw_alpha, alpha in zip(measured, raw, used, strict=True):
        assert part.statistics is not None and part.layout is not None  # noqa: S101, PT018
        name, item = part.name, part.statistics
        values = {
            "alignment": item.alignment,
            "leakage": item.leakage,
            "gain": coefficients.gain(item, settings.rho),
            "curvature": coefficients.curvature(item),
            "alpha_raw": raw_alpha,
            "alpha": alpha,
        }
        keys = {kind: f"stats.{name}.{kind}" for kind in values}
        sources.update({keys[kind]: value for kind, value in values.items()})
        layers.append({"name": name, "stats": keys, "heads": asdict(part.layout)})
        _scale_layer(part, part.layout, alpha, tensors, sources)
    return layers


def _scale_layer(
    part: LayerResultFile,
    layout: HeadLayout,
    alpha: Tensor,
    tensors: dict[str, dict[str, Any]],
    sources: Sources,
) -> None:
    for name in part.tensors:
        entry, module = tensors[name], site_name(name.removeprefix(f"{part.name}."))
        axis = entry["input_axis"]
        matrix = entry["shape"][-3 - axis], entry["shape"][axis]
        scale = layout.scales(module, alpha, matrix)
        for side, vector in (("rows", scale.rows), ("cols", scale.cols)):
            if vector is not None:
                key = f"scale.{part.name}.{module}.{side}"
                sources[key] = vector.to(STORED_DTYPE)
                entry[side] = key


def _renamed(
    tensors: Mapping[str, dict[str, Any]], names: Names, sources: Sources
) -> dict[str, dict[str, Any]]:
    """The entries under the names of the merge, one an expert where it merges them singly.

    Tensors that mergekit omits keep the model's own name.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, entry in tensors.items():
        if "experts" in entry:
            result |= expert_entries(name, entry, names(name), sources)
            continue
        for target in names(name) or (Target(name),):
            if target.expert is not None:
                result[target.name] = _expert(entry, target, sources)
            elif target.shape:
                axes = {-1: -2, -2: -1}
                stored = {"shape": list(target.shape), "input_axis": axes[entry["input_axis"]]}
                result[target.name] = {**entry, **stored}
            else:
                result[target.name] = entry
    return result


def _expert(entry: Mapping[str, Any], target: Target, sources: Sources) -> dict[str, Any]:
    """The entry of one expert. Its rows belong to no attention head, so all have the same scale."""
    site, rows = entry["site"], entry["rows"]
    if rows is not None:
        vector, rows = sources[rows], f"{rows}.{target.shape[0]}"
        assert isinstance(vector, Tensor)  # noqa: S101 - scales are computed, not read back
        sources[rows] = vector[: target.shape[0]].clone()
    own = site[target.expert or 0] if isinstance(site, list) else site
    return {**entry, "site": own, "shape": list(target.shape), "rows": rows}


def _warnings(
    sites: Mapping[str, Mapping[str, Any]],
    parts: Sequence[LayerResultFile],
    layers: Sequence[Mapping[str, Any]],
    left: Sequence[str],
) -> Iterator[str]:
    capped = [name for name, site in sites.items() if site["capped"]]
    if capped:
        yield (
            f"{len(capped)} of {len(sites)} sites reached the rank cap (the first: {capped[0]}); "
            "raise `max_rank` or `size_budget` for more protection"
        )
    idle = [name for name, site in sites.items() if not site["positions"]]
    if idle:
        yield (
            f"no protected token was routed to {len(idle)} of the experts (the first: {idle[0]}): "
            "their output weights take the task vector unprojected; more reasoning samples reach "
            "more experts"
        )
    few = [name for name, site in sites.items() if _rarely_reached(name, site)]
    if few:
        yield (
            f"fewer than {_FEW} protected tokens were routed to {len(few)} of the experts (the "
            f"first: {few[0]}): their output weights are protected on these alone; more reasoning "
            "samples reach them more often"
        )
    if left:
        yield (
            f"{len(left)} layer weights are kept unchanged ({', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}): they route tokens to experts, are linear "
            "attention's, or do not multiply token features"
        )
    coarse = [name for part in parts for name in _coarse(part)]
    if layers and coarse:
        yield (
            f"{len(coarse)} weights of the attention follow no known layout of heads (the first: "
            f"{coarse[0]}): they take the mean coefficient of their layer"
        )
    depth = sum(bool(part.name) for part in parts)  # the head's part is the model's own
    if layers and len(layers) < depth:
        yield (
            f"{depth - len(layers)} of {depth} layers have no attention that can be "
            "observed: their coefficients are 1"
        )


def _rarely_reached(name: str, site: Mapping[str, Any]) -> bool:
    """Whether it is the site of one expert with few protected tokens."""
    return name.rpartition(".")[2].isdigit() and 0 < site["positions"] < _FEW


# Below this share of the task vector a merge at lambda 1 hardly differs from the reasoning model.
_SMALL = 0.1


def _small_coefficients(layers: Sequence[Mapping[str, Any]], sources: Sources) -> Iterator[str]:
    """A warning if the coefficients are so small that the merge would do almost nothing."""
    used = [sources[layer["stats"]["alpha"]] for layer in layers]
    values = [float(value) for alpha in used if isinstance(alpha, Tensor) for value in alpha]
    mean = fmean(map(abs, values)) if values else 1.0
    if mean < _SMALL:
        yield (
            f"the coefficients are {mean:.2g} on average, so that at lambda 1 the merge adds only "
            f"{mean:.1%} of the task vector: a `lambda` of about {1 / max(mean, 1e-6):.0f}, a "
            "larger `alpha_min`, or `coefficients: normalized`"
        )


def _coarse(part: LayerResultFile) -> list[str]:
    """Weights of the attention module whose shape fits no known layout of heads."""
    if part.layout is None:
        return []
    found = []
    for name, entry in part.tensors.items():
        module, axis = site_name(name.removeprefix(f"{part.name}.")), entry["input_axis"]
        matrix = entry["shape"][-3 - axis], entry["shape"][axis]
        if part.layout.lacks_heads(module, matrix):
            found.append(name)
    return found
