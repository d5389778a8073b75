"""A calibration file summarised in numbers, for `inspect` and `report`.

Sections that a reader need not check (`data`, `settings`, `layers`) may hold anything in files of
other programs, so every value is looked at before it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.site_names import Kind, Site, kinds, locate, place, site_modules
from rain_mergekit.calibration_file.stream_summary import Matching, matching
from rain_mergekit.config.presets import beside, preset_of
from rain_mergekit.config.roles import is_proxy
from rain_mergekit.config.settings import RainSettings

_DATA = ("reasoning", "instruction")
_STATISTICS = ("alignment", "leakage", "alpha_raw", "alpha")
_MOST_HEADS = 4096
_LONGEST = 300


@dataclass(frozen=True)
class Data:
    """One calibration set; counts of None were not recorded.

    later: how many of those used are a chat's second turn, after another sample's.
    """

    path: str
    sha256: str
    total: int | None
    used: int | None
    positions: int | None
    later: int | None = None


@dataclass(frozen=True)
class Layer:
    """Statistics of one layer's attention heads by name, one number for each head."""

    name: str
    heads: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class PresetUse:
    """The named preset, the settings given beside it, and where it differs from its name."""

    name: str
    beside: tuple[str, ...]
    limits: tuple[str, ...]


@dataclass(frozen=True)
class FileSummary:
    """Everything that `inspect` shows.

    `changed`: the settings that differ from the defaults. `settings` is empty where none are
    recorded.
    """

    path: str
    kind: str
    bytes: int
    created_by: str
    models: Mapping[str, str]
    data: Mapping[str, Data]
    settings: Mapping[str, Any]
    changed: Mapping[str, Any]
    tensors: int
    kinds: tuple[Kind, ...]
    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    matching: Matching | None = None
    taken_back: tuple[float, ...] = ()
    preset: PresetUse | None = None
    gamma: float = 0.0

    @property
    def listed(self) -> dict[str, str]:
        """The models by role, without a reasoning model that stands for the pretrained one too."""
        proxy = is_proxy(self.models)
        return {k: v for k, v in self.models.items() if not (proxy and k == "pretrained")}


def summarise(file: CalibrationFile) -> FileSummary:
    """Read header and head statistics; bases stay on disk. RainError if a statistic is damaged."""
    header = file.header
    sites = tuple(sorted((_site(file, name) for name in file.sites), key=place))
    settings = header.get("settings") or {}
    return FileSummary(
        path=file.path,
        kind=file.kind,
        bytes=os.path.getsize(file.path),
        created_by=_text(header.get("created_by") or "an unnamed program"),
        models={role: _model(record) for role, record in file.models.items()},
        data=_data(header.get("data") or {}),
        settings=settings,
        changed=changed_settings(settings),
        tensors=len(file.tensors),
        kinds=kinds(sites, site_modules(file)),
        sites=sites,
        layers=tuple(_layers(file)),
        warnings=tuple(dict.fromkeys(header.get("warnings") or ())),
        matching=matching(file),
        taken_back=tuple(_taken_back(header["tensors"])),
        preset=_preset(settings),
        gamma=file.gamma,
    )


def _preset(settings: Mapping[str, Any]) -> PresetUse | None:
    found = preset_of(settings)
    if found is None:
        return None
    return PresetUse(settings["preset"], beside(settings), found.limits)


def _taken_back(tensors: Mapping[str, Any]) -> Iterator[float]:
    """For each weight in a file for AIM, the share of an even change that is taken back."""
    for entry in tensors.values():
        share = _number(entry.get("taken_back"))
        if share is not None:
            yield share


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from this version's defaults or are unknown to it.

    Also those that are the default again beside a preset.
    """
    fields = RainSettings.model_fields
    required = {name for name, field in fields.items() if field.is_required()}
    paths = {*required, "instruction_data"}  # shown with the data
    defaults = RainSettings.model_construct().model_dump(mode="json")
    own = beside(settings)
    return {
        name: value
        for name, value in settings.items()
        if name not in paths and (name not in defaults or defaults[name] != value or name in own)
    }


def _site(file: CalibrationFile, name: str) -> Site:
    plan, extra = file.sites[name], file.header["sites"][name]
    layer, kind = locate(name)
    return Site(
        name=name,
        kind=kind,
        layer=layer,
        width=plan.width,
        rank=plan.rank,
        kept=plan.kept_energy,
        response=_number(extra.get("kept_response_energy")),
        capped=extra.get("capped") is True,
    )


def _model(record: Any) -> str:
    revision = record.revision
    if revision is None or revision in record.reference:
        return _text(record.reference)
    return _text(f"{record.reference}, revision {revision}")


def _data(section: Mapping[str, Any]) -> dict[str, Data]:
    found = {name: section.get(name) for name in _DATA}
    return {
        name: Data(
            path=_text(entry.get("path", "not recorded")),
            sha256=_text(entry.get("sha256", "")),
            total=_count(entry.get("total")),
            used=_count(entry.get("used")),
            later=_count(entry.get("later")),
            positions=_count(entry.get("positions")),
        )
        for name, entry in found.items()
        if isinstance(entry, dict)
    }


def _layers(file: CalibrationFile) -> Iterable[Layer]:
    for layer in file.header.get("layers") or ():
        heads = {
            name: _values(file, layer["stats"][name])
            for name in _STATISTICS
            if name in layer["stats"]
        }
        if any(heads.values()):
            yield Layer(_text(layer["name"]), {name: row for name, row in heads.items() if row})


def _values(file: CalibrationFile, key: str) -> tuple[float, ...]:
    tensor = file.tensor(key)
    if tensor.dim() != 1 or tensor.numel() > _MOST_HEADS:
        return ()  # not one number for each head
    return tuple(float(value) for value in tensor.double())


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None
