"""Download a published merge's record and calibration, and rebuild its configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download

from rain_mergekit.config.merge_config import RainConfig, parse_config, read_config
from rain_mergekit.errors import RainError
from rain_mergekit.publish.layout import CALIBRATION, FOLDER, MERGE_CONFIG
from rain_mergekit.publish.record import MergeRecord
from rain_mergekit.publish.upload import told
from rain_mergekit.system.json_samples import file_digest


def fetch(name: str, cache_dir: str | None) -> Path:
    """The folder with record, calibration and configuration: local, or of the hub's cache.

    RainError if there is none.
    """
    if os.path.isdir(name):
        return Path(name)
    with told(name):
        patterns = [f"{FOLDER}/*", MERGE_CONFIG]
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_dir))


def calibration_in(folder: Path, record: MergeRecord) -> Path:
    """The published calibration file; RainError if it is not the one of the record."""
    here = folder / CALIBRATION
    if not here.exists():  # a merge of `mergekit-rain merge`, on this machine
        here = read_config(folder / MERGE_CONFIG).calibration
    if file_digest(here) != record.calibration:
        raise RainError(
            f"{here}: is not the calibration file of which rain/reproduce.json speaks; fetch both "
            "again"
        )
    return here


def config_again(folder: Path, calibration: Path, models: Mapping[str, str]) -> RainConfig:
    """The published configuration with this calibration file, and other places of models.

    models: by role, where models are that have no public name. RainError if one is not given.
    """
    path = folder / MERGE_CONFIG
    found = read_config(path)
    content: dict[str, Any] = dict(found.content)
    content["parameters"] = {**content.get("parameters", {}), "calibration": str(calibration)}
    places = {role: models.get(role, str(one)) for role, one in found.models.items()}
    if found.pretrained == found.reasoning:
        places["pretrained"] = places["reasoning"]
    content["base_model"] = places["reasoning"]
    listed = content["models"]
    roles = {str(one): role for role, one in found.models.items() if role != "reasoning"}
    content["models"] = [
        {**item, "model": places.get(roles.get(str(item["model"]), ""), item["model"])}
        for item in listed
    ]
    for role, place in places.items():
        if "/" not in place and not os.path.exists(place):
            raise RainError(
                f"{path}: the {role} model was a folder called {place}, which nobody can "
                f"download; say where it is with --{role} FOLDER"
            )
    return parse_config(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), str(path))
