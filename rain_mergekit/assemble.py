"""Layer parts -> the calibration file: header, factors, scale vectors, report numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

import rain_mergekit
from rain_mergekit import coefficients
from rain_mergekit.artifact_writer import write_calibration
from rain_mergekit.coefficients import HeadStatistics
from rain_mergekit.modules import HeadLayout
from rain_mergekit.parts import STORED_DTYPE, LayerPart
from rain_mergekit.settings import RainSettings

Sources: TypeAlias = "dict[str, Tensor | Callable[[], Tensor]]"


def write_file(
    path: Path,
    header: Mapping[str, Any],
    parts: Sequence[LayerPart],
    layout: HeadLayout,
    settings: RainSettings,
) -> tuple[str, ...]:
    """Add coefficients and write the calibration file atomically; returns recorded warnings.

    header: models, data, settings and warnings so far; the rest is added here.
    """
    sources: Sources = {key: partial(part.read, key) for part in parts for key in part.keys}
    sites = {name: site for part in parts for name, site in part.sites.items()}
    tensors = {name: dict(entry) for part in parts for name, entry in part.tensors.items()}
    layers = _coefficients(parts, layout, settings, tensors, sources)
    warnings = [*header.get("warnings", ()), *_warnings(sites)]
    complete = {
        "created_by": f"rain_mergekit {rain_mergekit.__version__}",
        **header,
        "sites": sites,
        "tensors": tensors,
        "layers": layers,
        "warnings": warnings,
    }
    write_calibration(path, complete, sources)
    return tuple(warnings)


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
    parts: Sequence[LayerPart],
    layout: HeadLayout,
    settings: RainSettings,
    tensors: dict[str, dict[str, Any]],
    sources: Sources,
) -> list[dict[str, Any]]:
    """Scale vectors of every tensor, and the statistics behind them."""
    measured = [(part.name, part.statistics) for part in parts if part.statistics is not None]
    if not measured:
        return []
    raw, used = used_coefficients([item for _, item in measured], settings)
    layers: list[dict[str, Any]] = []
    for (name, item), raw_alpha, alpha in zip(measured, raw, used, strict=True):
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
        layers.append({"name": name, "stats": keys})
        _scale_layer(name, layout, alpha, tensors, sources)
    return layers


def _scale_layer(
    name: str,
    layout: HeadLayout,
    alpha: Tensor,
    tensors: dict[str, dict[str, Any]],
    sources: Sources,
) -> None:
    for module in layout.kinds:
        entry = tensors[f"{name}.{module}.weight"]
        scale = layout.scales(module, alpha, (entry["shape"][0], entry["shape"][1]))
        for axis, vector in (("rows", scale.rows), ("cols", scale.cols)):
            if vector is not None:
                key = f"scale.{name}.{module}.{axis}"
                sources[key] = vector.to(STORED_DTYPE)
                entry[axis] = key


def _warnings(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    capped = [name for name, site in sites.items() if site["capped"]]
    if not capped:
        return []
    text = (
        f"{len(capped)} of {len(sites)} sites reached the rank cap (the first: {capped[0]}); "
        "raise `max_rank` or `size_budget` for more protection"
    )
    return [text]
