"""How a model's makers recommend to draw tokens: its generation_config.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import parse_reference
from rain_mergekit.models.source import named
from rain_mergekit.system.json_samples import read_json
from rain_mergekit.system.untrusted_input import finite_number

FILE = "generation_config.json"
# Fields that decide how tokens are drawn.
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def recommended(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """The fields of FIELDS that a model's generation_config.json has, as numbers.

    Temperature 0 where it does not ask for sampling. name: a folder, or `owner/name@revision` on
    the hub, of which this one file is fetched. RainError if there is none, or a field is no number.
    """
    path = _file(name, cache_dir)
    found = read_json(path)
    if not isinstance(found, dict):
        raise RainError(f"{path}: expected a JSON object of settings, as transformers writes it")
    if found.get("do_sample") is not True:
        return {"temperature": 0}
    given = {field: found[field] for field in FIELDS if found.get(field) is not None}
    for field, value in given.items():
        if isinstance(value, str) or finite_number(value) is None:
            raise RainError(f"{path}: {field} is no number; correct it")
    return given


def _file(name: str, cache_dir: str | None) -> Path:
    if os.path.isdir(name):
        path = Path(name, FILE)
        if not path.is_file():
            raise RainError(
                f"{name}: has no {FILE}, where a model's makers say how to draw tokens; give "
                "--temperature and --top-p instead"
            )
        return path
    model = parse_reference(name).model
    with named(f"{name}: no {FILE} found", model.path):
        found = hf_hub_download(model.path, FILE, revision=model.revision, cache_dir=cache_dir)
    return Path(found)
