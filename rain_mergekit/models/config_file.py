"""A model's `config.json` as its publisher wrote it, with few fields changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rain_mergekit.errors import RainError
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.untrusted_input import first_line, read_regular

NAME = "config.json"
_TYPE_FIELDS = ("dtype", "torch_dtype")  # of transformers 5, and of 4
_SIZE_FIELD = "vocab_size"
QUANTISATION = "quantization_config"


def read_config_file(folder: str | Path) -> dict[str, Any]:
    """The fields in their order; RainError if there is no such file or it is not a JSON object."""
    return read_config(Path(folder, NAME))


def read_config(path: Path) -> dict[str, Any]:
    """The same of a file that may have any name."""
    try:
        found = json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RainError(f"{path}: cannot be read as a model config: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise RainError(f"{path}: cannot be read as a model config: it is not a JSON object")
    return found


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says on how its model is quantised; None where its weights are plain."""
    for part in (config, config.get("text_config")):
        section = part.get(QUANTISATION) if isinstance(part, Mapping) else None
        if isinstance(section, Mapping):
            return section
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields without what `section_of` finds, for plain weights of the same model."""
    kept = {key: value for key, value in config.items() if key != QUANTISATION}
    if isinstance(text := config.get("text_config"), Mapping):
        kept["text_config"] = without_quantisation(text)
    return kept


def published_config(
    original: Mapping[str, Any], *, dtype: str | None, vocabulary: tuple[int, int] | None
) -> dict[str, Any]:
    """The fields of `original`, key for key, for other weights of the same model.

    dtype: the type of the weights, None for the same as before. vocabulary: the number of tokens
    before and after, None where it is the same.

    A config without a field for the type gets one that every transformers reads.
    """
    changed = _changed(original, dtype, vocabulary)
    if dtype is not None and not any(field in original for field in _TYPE_FIELDS):
        changed["torch_dtype"] = dtype
    return changed


def _changed(
    part: Mapping[str, Any], dtype: str | None, vocabulary: tuple[int, int] | None
) -> dict[str, Any]:
    """The same for one level of the config; text and vision parts have such fields too."""
    result = dict(part)
    for key, value in part.items():
        if isinstance(value, dict) and key.endswith("_config"):
            result[key] = _changed(value, dtype, vocabulary)
        elif key in _TYPE_FIELDS and dtype is not None and isinstance(value, str):
            result[key] = dtype
        elif key == _SIZE_FIELD and vocabulary is not None and value == vocabulary[0]:
            result[key] = vocabulary[1]
    return result


def write_config_file(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write it atomically: a folder with half a config is no model."""
    with replacing(Path(folder, NAME)) as out:
        out.write((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
